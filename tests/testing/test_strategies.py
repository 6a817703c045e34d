"""What the strategies draw is what their docstrings promise."""

import torch
from hypothesis import HealthCheck, given, settings
from transformers import AutoModelForCausalLM

from fxfuse.testing import strategies

quick = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@quick
@given(config=strategies.configs())
def test_configs_build_models_with_full_attention(config: object) -> None:
    assert "full_attention" in config.layer_types  # type: ignore[attr-defined]
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) < 10**6


@quick
@given(inputs=strategies.inputs())
def test_inputs_keep_one_token_in_every_row(inputs: dict[str, torch.Tensor]) -> None:
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    assert mask.shape == ids.shape and bool((mask.sum(-1) >= 1).all())
    assert bool((mask.diff(dim=-1) >= 0).all()), "padding is on the left"
    if "position_ids" in inputs:
        steps = inputs["position_ids"].diff(dim=-1)
        assert bool(((steps == 1) | (inputs["position_ids"][:, 1:] == 0)).all())


@quick
@given(x=strategies.tensors((3, 5), torch.float16))
def test_tensors_are_finite_in_their_dtype(x: torch.Tensor) -> None:
    assert x.dtype == torch.float16 and x.shape == (3, 5) and bool(x.isfinite().all())


@quick
@given(drawn=strategies.state_dicts())
def test_state_dicts_have_every_name_in_one_file(drawn: strategies.StateDict) -> None:
    assert sorted(name for shard in drawn.shards for name in shard) == sorted(drawn.tensors)
    assert ("mtp" in drawn.traits) == any(name.startswith("mtp.") for name in drawn.tensors)
    assert ("tied" in drawn.traits) == ("lm_head.weight" not in drawn.tensors)
    scaled = [name for name in drawn.tensors if name.endswith("_scale_inv")]
    assert all(name.removesuffix("_scale_inv") in drawn.tensors for name in scaled)


@quick
@given(drawn=strategies.graphs())
def test_graphs_run_and_are_well_formed(drawn: strategies.RandomProgram) -> None:
    drawn.module.graph.lint()
    assert all(y.isfinite().all() for y in drawn.module(*(x.clone() for x in drawn.inputs)))


@quick
@given(drawn=strategies.mutants())
def test_near_misses_run(drawn: object) -> None:
    mutant, inputs = drawn  # type: ignore[misc]
    mutant.module(*(x.clone() for x in inputs))
    assert mutant.change
