"""The chunked delta rule opened up gives what the operator gives, at every length."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse import rewrite
from fxfuse.passes import chunked_delta_rule
from fxfuse.runtime.ops import gated_delta_rule
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced

PASS = "chunked_delta_rule"
WIDTH = 8


class Rule(nn.Module):
    def __init__(self, normalise: bool, groups: int) -> None:
        super().__init__()
        self.normalise, self.groups = normalise, groups

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *state: Tensor) -> Any:
        q, k = (x.unflatten(-1, (2, WIDTH)) for x in (q, k))
        v = v.unflatten(-1, (2 * self.groups, WIDTH))
        given = state[0] if state else None
        return torch.ops.fxfuse.chunk_gated_delta_rule(q, k, v, g, beta, given, self.normalise)


def drawn(length: int, groups: int, state: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    heads = 2 * groups
    wide = [normal(2, length, n * WIDTH).to(dtype) for n in (2, 2, heads)]
    gates = [-normal(2, length, heads).abs(), normal(2, length, heads).sigmoid().to(dtype)]
    return [*wide, *gates, *([normal(2, heads, WIDTH, WIDTH)] if state else [])]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_every_length_from_one_capture(groups: int, state: bool, normalise: bool) -> None:
    module = Rule(normalise, groups)
    rewritten = rewrite(module, drawn(70, groups, state), passes=PASS)
    (match,) = rewritten.report.graphs[0].outcomes[PASS].matches
    targets = [str(node.target) for node in rewritten.graph_module.graph.nodes]
    assert match.rule == PASS and targets.count("fxfuse.delta_rule_chunks.default") == 1
    assert "fxfuse.chunk_gated_delta_rule.default" not in targets
    for length in (2, 63, 64, 65, 200):
        inputs = drawn(length, groups, state)
        for got, expected in zip(rewritten.graph_module(*inputs), module(*inputs), strict=True):
            assert (got.shape, got.stride()) == (expected.shape, expected.stride())
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_half_precision_in_and_out() -> None:
    inputs = drawn(70, 2, True, torch.bfloat16)
    rewritten = rewrite(Rule(True, 2), inputs, passes=PASS)
    got, expected = rewritten.graph_module(*inputs), Rule(True, 2)(*inputs)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-4)


def test_the_loop_is_a_sound_operator() -> None:
    q, k, v, g, beta, state = drawn(70, 2, True)
    q, k = (x.unflatten(-1, (2, WIDTH)) for x in (q, k))
    tokens = gated_delta_rule.pieces(q, k, v.unflatten(-1, (4, WIDTH)), g, beta, True, gated_delta_rule.CHUNK)
    parts = gated_delta_rule.prepared(tokens)
    torch.library.opcheck(torch.ops.fxfuse.delta_rule_chunks.default, (*parts, state))


def test_with_gradients_and_elsewhere_it_stays() -> None:
    program = traced(Rule(True, 1), {}, drawn(70, 1, False), Options())
    assert len(chunked_delta_rule.run(program.copy()).matches) == 1
    assert chunked_delta_rule.run(replace(program.copy(), grad_enabled=True)).matches == []
    program = traced(Rule(True, 1), {}, [x.to("meta") for x in drawn(70, 1, False)], Options())
    assert chunked_delta_rule.run(program).matches == []
