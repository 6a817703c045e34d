"""Experts stacked, turned and one by one, against indexing."""

from typing import Any

import pytest
import torch

from fxfuse.errors import PlanError
from fxfuse.passes.weights import Draft
from fxfuse.runtime.layouts.experts import to_single, to_stack

STACK = "model.layers.3.mlp.experts."
GATE_UP, DOWN = STACK + "gate_up_proj", STACK + "down_proj"


def single(stacked: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gate_up, down = stacked[GATE_UP], stacked[DOWN]
    result = {name: t for name, t in stacked.items() if not name.startswith(STACK)}
    for e in range(3):
        result[f"{STACK}{e}.gate_proj.weight"] = gate_up[e, :8]
        result[f"{STACK}{e}.up_proj.weight"] = gate_up[e, 8:]
        result[f"{STACK}{e}.down_proj.weight"] = down[e]
    return result


def test_a_stack_comes_apart_and_together(make: Any, equal_and_back: Any) -> None:
    c = make.config()
    stacked = make.weights(c)
    plan = Draft(make.specs(stacked)).then(to_single(make.decoder(stacked, c))).plan()
    apart = equal_and_back(plan, stacked, single(stacked))
    together = Draft(make.specs(apart)).then(to_stack(make.decoder(apart, c))).plan()
    equal_and_back(together, apart, stacked)
    assert to_single(make.decoder(apart, c)) == []
    assert to_stack(make.decoder(stacked, c)) == []


@pytest.mark.parametrize(("hidden", "inner"), [(10, 8), (16, 8), (8, 8), (4, 8)])
def test_a_turned_stack_is_told_by_both_shapes(
    hidden: int, inner: int, make: Any, equal_and_back: Any
) -> None:
    """H = 2I is where gate_up's shape alone would not tell."""
    c = make.config()
    gate_up = torch.randn(3, 2 * inner, hidden)
    down = torch.randn(3, hidden, inner)
    straight = {GATE_UP: gate_up, DOWN: down}
    turned = {n: t.transpose(1, 2).contiguous() for n, t in straight.items()}
    expected = {}
    for e in range(3):
        expected[f"{STACK}{e}.gate_proj.weight"] = gate_up[e, :inner]
        expected[f"{STACK}{e}.up_proj.weight"] = gate_up[e, inner:]
        expected[f"{STACK}{e}.down_proj.weight"] = down[e]
    for given in (straight, turned):
        plan = Draft(make.specs(given)).then(to_single(make.decoder(given, c))).plan()
        equal_and_back(plan, given, expected)
    plan = Draft(make.specs(turned)).then(to_stack(make.decoder(turned, c))).plan()
    equal_and_back(plan, turned, straight)


def test_what_is_no_whole_set_of_experts_is_refused(make: Any) -> None:
    c = make.config()
    stacked = make.weights(c)
    half = {name: t for name, t in stacked.items() if name != DOWN}
    with pytest.raises(PlanError, match=r"experts\.down_proj: missing"):
        to_single(make.decoder(half, c))
    with pytest.raises(PlanError, match="no stack of experts"):
        to_single(make.decoder(stacked | {DOWN: torch.zeros(3, 10, 7)}, c))
    apart = single(stacked)
    del apart[f"{STACK}1.up_proj.weight"]
    with pytest.raises(PlanError, match=r"experts\.1\.up_proj\.weight: missing \(1 in all\)"):
        to_stack(make.decoder(apart, c))
    with pytest.raises(PlanError, match="experts of one layer differ"):
        to_stack(make.decoder(apart | {f"{STACK}1.up_proj.weight": torch.zeros(7, 10)}, c))
