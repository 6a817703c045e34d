"""Scales of exported experts against slices of what the fused weight was calibrated with."""

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, Qwen3_5MoeTextConfig

from fxfuse.errors import OptionError, PlanError
from fxfuse.runtime.export_experts import export_experts

EXPERTS, WIDTH, HIDDEN = 3, 8, 16
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 8,
    "num_experts_per_tok": 2,
}
CONFIG = Qwen3_5MoeTextConfig(
    **SIZES,
    layer_types=["full_attention"],
    num_experts=EXPERTS,
    moe_intermediate_size=WIDTH,
    shared_expert_intermediate_size=8,
)
STACK = "model.layers.0.mlp.experts."
GATE_UP, DOWN = STACK + "gate_up_proj", STACK + "down_proj"


@pytest.fixture
def stacks() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        GATE_UP: torch.randn(EXPERTS, 2 * WIDTH, HIDDEN),
        DOWN: torch.randn(EXPERTS, HIDDEN, WIDTH),
        "model.norm.weight": torch.ones(HIDDEN),
    }


def scales(exported: dict[str, torch.Tensor], e: int, leaf: str = "weight_scale") -> list[torch.Tensor]:
    return [exported[f"{STACK}{e}.{part}_proj.{leaf}"] for part in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("format", "leaf", "largest"), [("fp8", "weight_scale", 448), ("nvfp4", "weight_scale_2", 2688)]
)
def test_gate_and_up_share_the_amax_of_the_fused_weight(
    stacks: dict[str, torch.Tensor], format: str, leaf: str, largest: float
) -> None:
    """Expert 1 was calibrated, the others never saw a token: theirs is taken before the split."""
    calibrated = [None, torch.tensor(7.0), None]
    exported = export_experts(stacks, CONFIG, {GATE_UP: calibrated}, format=format)
    for e in range(EXPERTS):
        fused = torch.tensor(7.0) if e == 1 else stacks[GATE_UP][e].abs().max()
        gate, up, down = scales(exported, e, leaf)
        assert torch.equal(gate, fused / largest)
        assert torch.equal(up, gate)
        assert torch.equal(down, stacks[DOWN][e].abs().max() / largest)
        assert torch.equal(exported[f"{STACK}{e}.gate_proj.weight"], stacks[GATE_UP][e, :WIDTH])
        assert torch.equal(exported[f"{STACK}{e}.up_proj.weight"], stacks[GATE_UP][e, WIDTH:])
        assert torch.equal(exported[f"{STACK}{e}.down_proj.weight"], stacks[DOWN][e])
        # gate alone would have another one: the test would not see a split before the maximum
        assert stacks[GATE_UP][e, :WIDTH].abs().max() != stacks[GATE_UP][e, WIDTH:].abs().max()
    assert {n for n in exported if not n.startswith(STACK)} == {"model.norm.weight"}
    assert not {GATE_UP, DOWN} & exported.keys()


@pytest.mark.parametrize("shape", [(16,), (16, 1), (4,), (2,), (16, 4), (4, 2), (2, 8)])
def test_several_values_are_cut_in_proportion(
    stacks: dict[str, torch.Tensor], shape: tuple[int, ...]
) -> None:
    """By row, by runs of rows, by blocks in a row, by blocks of rows and columns."""
    values = [torch.rand(shape) + e for e in range(EXPERTS)]
    exported = export_experts(stacks, CONFIG, {GATE_UP: values})
    half = shape[0] // 2
    for e in range(EXPERTS):
        gate, up, _ = scales(exported, e)
        assert torch.equal(gate, values[e][:half] / 448)
        assert torch.equal(up, values[e][half:] / 448)


def test_a_turned_stack_is_cut_by_its_columns(stacks: dict[str, torch.Tensor]) -> None:
    turned = stacks | {n: stacks[n].transpose(1, 2).contiguous() for n in (GATE_UP, DOWN)}
    values = [torch.rand(2 * WIDTH) for _ in range(EXPERTS)]
    exported, expected = (export_experts(given, CONFIG, {GATE_UP: values}) for given in (turned, stacks))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[n], t) for n, t in expected.items())


@pytest.mark.parametrize("count", [3, 5, 6, 32 + 1])
def test_values_that_do_not_divide_are_refused(stacks: dict[str, torch.Tensor], count: int) -> None:
    with pytest.raises(
        PlanError, match=r"gate_up_proj: \[\d+\] values of amax for 16 rows of expert 0 do not"
    ):
        export_experts(stacks, CONFIG, {GATE_UP: [torch.ones(count)] * EXPERTS})


def test_runs_that_do_not_end_between_gate_and_up_are_refused() -> None:
    """Six rows of each and four values for twelve: the third run would be in both."""
    stacks = {GATE_UP: torch.randn(EXPERTS, 12, HIDDEN), DOWN: torch.randn(EXPERTS, HIDDEN, 6)}
    config = Qwen3_5MoeTextConfig(**{**CONFIG.to_dict(), "moe_intermediate_size": 6})
    export_experts(stacks, config, {GATE_UP: [torch.ones(4)] * EXPERTS})
    with pytest.raises(PlanError, match="do not divide at rows 0:6"):
        export_experts(stacks, config, {GATE_UP: [torch.ones(3)] * EXPERTS})


def test_inputs_have_scales_of_their_own(stacks: dict[str, torch.Tensor]) -> None:
    seen = [torch.tensor(2.0), None, torch.tensor(4.0)]
    exported = export_experts(stacks, CONFIG, input_amax={GATE_UP: seen})
    for e in (0, 2):
        for part in ("gate", "up"):
            assert exported[f"{STACK}{e}.{part}_proj.input_scale"] == seen[e] / 448
    assert {n for n in exported if n.endswith("input_scale")} == {
        f"{STACK}{e}.{part}_proj.input_scale" for e in (0, 2) for part in ("gate", "up")
    }


def test_names_are_the_familys(stacks: dict[str, torch.Tensor]) -> None:
    config = MixtralConfig(**SIZES, num_local_experts=EXPERTS, intermediate_size=WIDTH)
    exported = export_experts(stacks, config)
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight_scale" in exported


def test_what_is_no_amax_is_refused(stacks: dict[str, torch.Tensor]) -> None:
    with pytest.raises(OptionError, match="format 'int3' is not known; known are: fp8, nvfp4"):
        export_experts(stacks, CONFIG, format="int3")
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(PlanError, match="amax of expert 0 is not finite or negative"):
            export_experts(stacks, CONFIG, {DOWN: [torch.tensor(wrong)] * EXPERTS})
    with pytest.raises(PlanError, match="2 values of amax, the stacks are"):
        export_experts(stacks, CONFIG, {DOWN: [None] * 2})
    with pytest.raises(PlanError, match="x: 3 values of amax"):
        export_experts(stacks, CONFIG, {"x": [None] * 3})
    with pytest.raises(PlanError, match="weight_scale_2 is one number, expert 0 has 8"):
        export_experts(stacks, CONFIG, {GATE_UP: [torch.ones(16)] * EXPERTS}, format="nvfp4")
