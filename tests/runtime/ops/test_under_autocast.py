"""Under autocast operators give what they give without it, in the dtypes that tracing is told."""

import pytest
import torch
from torch import Tensor

from fxfuse.runtime import ops

assert ops  # registers the operators


def _given() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 9, 3, 8) for _ in range(3))
    return query, key, value, -torch.rand(2, 9, 3), torch.rand(2, 9, 3)


def chunked() -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = torch.ops.fxfuse.chunk_gated_delta_rule(*_given(), None, True)
    return out


def chunks() -> tuple[Tensor, ...]:
    query, key, value, g, beta = _given()
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, _ = torch.ops.fxfuse.chunk_gated_delta_rule(*leaves, g, beta, None, True)
    return torch.autograd.grad(out.square().sum(), leaves)


def convolved() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 9), torch.randn(6, 4)
    return (torch.ops.fxfuse.causal_conv1d(x, weight, None, None, None, True),)


@pytest.mark.parametrize("run", [chunked, chunks, convolved])
def test_an_operator_computes_as_it_does_without(run: object) -> None:
    expected = run()  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        got = run()  # type: ignore[operator]
    assert [x.dtype for x in got] == [x.dtype for x in expected]
    assert all(map(torch.equal, got, expected))
