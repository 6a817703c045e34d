"""Gradients of the chunked gated delta rule as an operator: autograd over the recurrence is the oracle."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError, UnsupportedModelError
from fxfuse.runtime.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from fxfuse.runtime.ops.chunk_gated_delta_rule_backward import chunk_gated_delta_rule_backward
from fxfuse.runtime.ops.gated_delta_rule import L2_EPSILON

DK, DV, KEY_HEADS = 8, 6, 2


def inputs(lengths: list[int], ratio: int = 2, batch: int = 1, state: bool = True) -> list[Any]:
    """query, key, value, g, beta and states, of packed sequences where there are several."""
    torch.manual_seed(sum(lengths) + ratio)
    length, heads = sum(lengths), KEY_HEADS * ratio
    sequences = batch * len(lengths)
    return [
        torch.randn(batch, length, KEY_HEADS, DK),
        F.normalize(torch.randn(batch, length, KEY_HEADS, DK), dim=-1),
        torch.randn(batch, length, heads, DV),
        F.logsigmoid(torch.randn(batch, length, heads)),
        torch.rand(batch, length, heads),
        torch.randn(sequences, heads, DK, DV) * 0.1 if state else None,
    ]


def cotangents(given: list[Any], sequences: int) -> list[Tensor]:
    heads = given[2].shape[2]
    return [torch.randn(given[2].shape), torch.randn(sequences, heads, DK, DV)]


def token_by_token(given: list[Any], normalise: bool, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written."""
    query, key, value, g, beta, state = given
    ratio = value.shape[2] // key.shape[2]
    if normalise:
        query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON) for x in (query, key))
    query, key = (x.repeat_interleave(ratio, dim=2) for x in (query * DK**-0.5, key))
    sequences = len(value) if bounds is None else len(bounds) - 1
    state = value.new_zeros(sequences, value.shape[2], DK, DV) if state is None else state
    parts = [(slice(None), slice(None))]
    if bounds is not None:
        parts = [
            (slice(n, n + 1), slice(a, b)) for n, (a, b) in enumerate(itertools.pairwise(bounds.tolist()))
        ]
    outs, states = [value[:, :0]], []
    for own, part in parts:
        now = state[own]
        for q, k, v, decay, rate in zip(
            *(x[:, part].unbind(1) for x in (query, key, value, g.exp(), beta)), strict=True
        ):
            now = now * decay[..., None, None]
            missing = v - (k.unsqueeze(-2) @ now).squeeze(-2)
            now = now + k.unsqueeze(-1) * (rate.unsqueeze(-1) * missing).unsqueeze(-2)
            outs.append((q.unsqueeze(-2) @ now).transpose(1, 2))
        states.append(now)
    return torch.cat(outs, dim=1), torch.cat(states)


def by_autograd(above: list[Any], given: list[Any], normalise: bool, bounds: Tensor | None) -> list[Tensor]:
    """In float64, rounded to the dtypes of what is given."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in given]
    outs = token_by_token(leaves, normalise, bounds)
    used = [(out, d.double()) for out, d in zip(outs, above, strict=True) if d is not None]
    wanted = [x for x in leaves if x is not None]
    found, weights = zip(*used, strict=True)
    gradients = torch.autograd.grad(found, wanted, weights, allow_unused=True, materialize_grads=True)
    return [d.to(x.dtype) for d, x in zip(gradients, (x for x in given if x is not None), strict=True)]


def assert_equal(got: tuple[Tensor, ...], expected: list[Tensor], rtol: float = 1e-5) -> None:
    names = ("query", "key", "value", "g", "beta", "state")
    for name, x, y in zip(names, got, expected, strict=False):
        assert x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous() and x.isfinite().all(), name
        worst = float((x.double() - y.double()).abs().amax()) if x.numel() else 0.0
        assert worst <= rtol * float(y.double().abs().amax() if y.numel() else 0) + 1e-6, (name, worst)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("lengths", [[1], [65], [130], [3, 0, 66]])
def test_they_are_those_that_autograd_finds(lengths: list[int], ratio: int, normalise: bool) -> None:
    packed = len(lengths) > 1
    bounds = torch.tensor([0, *lengths]).cumsum(0) if packed else None
    for state in (True, False):
        given = inputs(lengths, ratio, 1 if packed else 2, state)
        above = cotangents(given, len(lengths) if packed else 2)
        for each in (above, [above[0], None], [None, above[1]]):
            got = chunk_gated_delta_rule_backward(*each, *given, normalise, bounds)
            assert_equal(got, by_autograd(each, given, normalise, bounds))
            assert len(got) == 6 and (state or got[5].numel() == 0)


def test_without_a_token_the_states_gradient_goes_through() -> None:
    given = inputs([0])
    above = cotangents(given, 1)
    *rest, state = chunk_gated_delta_rule_backward(*above, *given, True, None)
    assert torch.equal(state, above[1]) and state.data_ptr() != above[1].data_ptr()
    assert [x.shape for x in rest] == [x.shape for x in given[:5]]
    nothing = chunk_gated_delta_rule_backward(above[0], None, *given, True, None)
    assert torch.equal(nothing[5], torch.zeros_like(state))


def test_zeros_extreme_decays_and_full_rates_give_the_same_numbers() -> None:
    given = inputs([70])
    given[0][:, :3] = 0
    given[1][:, 2:9] = 0
    given[3][:, 5:8] = -1e4
    given[3][:, 12] = -torch.inf
    given[3][:, 20:23] = 0
    given[4][:, 30:40] = 1
    above = cotangents(given, 1)
    got = chunk_gated_delta_rule_backward(*above, *given, True, None)
    assert_equal(got, by_autograd(above, given, True, None))
    assert not got[3][:, 5:8].any() and not got[3][:, 12].any() and got[3][:, 13:].any()


def test_rates_of_zero_have_gradients() -> None:
    """As sigmoid gives them for gates of less than -104 in float32."""
    given = inputs([70])
    given[4][:, 3:70:5] = 0
    given[4][:, 4] = 1e-42
    given[4][:, 5] = -0.5
    above = cotangents(given, 1)
    got = chunk_gated_delta_rule_backward(*above, *given, True, None)
    assert_equal(got, by_autograd(above, given, True, None))
    assert got[4][:, 3].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    given = inputs([65])
    given[:3] = [x.to(dtype) for x in given[:3]]
    above = cotangents(given, 1)
    above[0] = above[0].to(dtype)
    expected = by_autograd([x.float() for x in above], [x.float() for x in given], True, None)
    got = chunk_gated_delta_rule_backward(*above, *given, True, None)
    assert [x.dtype for x in got] == [dtype] * 3 + [torch.float32] * 3
    assert_equal(got, [x.to(y.dtype) for x, y in zip(expected, got, strict=True)], torch.finfo(dtype).eps)


def test_strides_make_no_difference() -> None:
    given = inputs([65])
    above = cotangents(given, 1)
    expected = chunk_gated_delta_rule_backward(*above, *given, True, None)
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (*above, *given)]
    expanded = [above[0].new_ones(1).expand_as(above[0]), above[1]]
    assert_equal(chunk_gated_delta_rule_backward(*strided, True, None), list(expected))
    dense = [x.contiguous() for x in expanded]
    assert_equal(
        chunk_gated_delta_rule_backward(*expanded, *given, True, None),
        list(chunk_gated_delta_rule_backward(*dense, *given, True, None)),
    )


def test_what_does_not_fit_is_named() -> None:
    given = inputs([5])
    with pytest.raises(ShapeError, match=r"chunk_gated_delta_rule_backward takes query and key"):
        chunk_gated_delta_rule_backward(*cotangents(given, 1), given[0][:, 1:], *given[1:], True, None)
    with pytest.raises(ShapeError, match=r"grad_out is \(1, 5, 4, 5\), not \(1, 5, 4, 6\)"):
        chunk_gated_delta_rule_backward(torch.randn(1, 5, 4, 5), None, *given, True, None)


def test_a_second_backward_says_what_to_do() -> None:
    given = [x.requires_grad_() for x in inputs([5])]
    out, _ = chunk_gated_delta_rule(*given, True, None)
    (found,) = torch.autograd.grad(out.square().sum(), given[0], create_graph=True)
    with pytest.raises(UnsupportedModelError, match=r"call model.deoptimize\(\) first"):
        found.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_keeps_torchs_rules(dtype: torch.dtype) -> None:
    given = [x.to(dtype) for x in inputs([2, 0, 3])]
    out, final = cotangents(given, 3)
    bounds = torch.tensor([0, 2, 2, 5])
    torch.library.opcheck(chunk_gated_delta_rule_backward, (out.to(dtype), final, *given, True, bounds))
    for above in ((None, final[:1]), (out.to(dtype), None)):
        torch.library.opcheck(chunk_gated_delta_rule_backward, (*above, *given[:5], None, False, None))
