"""Experts of every family with a plan for them: what transformers itself writes, and plain indexing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from fxfuse.errors import PlanError, UnsupportedModelError
from fxfuse.runtime.convert import convert, differences
from fxfuse.runtime.families import known_model_types
from fxfuse.runtime.load import load_state_dict
from fxfuse.runtime.plan import LAYOUTS as PLANNED
from fxfuse.runtime.plan import plan

HIDDEN, WIDTH, EXPERTS = 16, 6, 3
NARROW: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "num_experts_per_tok": 2,
}
INNER: dict[str, Any] = {"moe_intermediate_size": WIDTH, "intermediate_size": 12}
LATENT: dict[str, Any] = {
    **INNER,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen2_moe": Qwen2MoeConfig(
        **NARROW, **INNER, num_experts=EXPERTS, shared_expert_intermediate_size=8, mlp_only_layers=[0]
    ),
    "qwen3_moe": Qwen3MoeConfig(**NARROW, **INNER, num_experts=EXPERTS, head_dim=8, mlp_only_layers=[0]),
    "deepseek_v2": DeepseekV2Config(**NARROW, **LATENT),
    "deepseek_v3": DeepseekV3Config(**NARROW, **LATENT),
    "mixtral": MixtralConfig(**NARROW, intermediate_size=WIDTH, num_local_experts=EXPERTS),
}
MIXTRAL = ("w1", "w3", "w2")
STACK = "model.layers.1.mlp.experts."


def state_of(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(AutoModelForCausalLM.from_config(CONFIGS[kind]).state_dict())


def single(kind: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By indexing, and by the names of the family's files."""
    result = {}
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    gate, up, down = MIXTRAL if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in weights.items():
        layer, _, rest = name.partition(".mlp.")
        if rest == "experts.gate_up_proj":
            for e in range(EXPERTS):
                result[f"{layer}.{block}.experts.{e}.{gate}.weight"] = tensor[e, :WIDTH]
                result[f"{layer}.{block}.experts.{e}.{up}.weight"] = tensor[e, WIDTH:]
        elif rest == "experts.down_proj":
            for e in range(EXPERTS):
                result[f"{layer}.{block}.experts.{e}.{down}.weight"] = tensor[e]
        else:
            result[name.replace(".mlp.", f".{block}.") if rest == "gate.weight" else name] = tensor
    return result


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], t) for n, t in right.items())


def write(folder: Path, config: PretrainedConfig, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    config.save_pretrained(folder)
    save_file({n: t.clone().contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
def test_single_experts_are_those_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    weights = dict(model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    planned = plan(model, "per_expert")
    apart = planned.apply(weights)
    assert equal(apart, saved)
    assert equal(apart, single(kind, weights))
    assert equal(planned.inverse().apply(saved), weights)
    # and from the files' own names
    assert equal(plan(tmp_path / "saved", "hf").apply(saved), weights)
    assert plan(CONFIGS[kind], "per_expert").bind(weights).digest == planned.digest
    assert len(planned) == (2 if kind == "mixtral" else 1) * EXPERTS * 3 + 2 * (kind == "mixtral")


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_convert_both_ways(kind: str, tmp_path: Path) -> None:
    weights = state_of(kind)
    source = write(tmp_path / "stacked", CONFIGS[kind], weights)
    convert(source, tmp_path / "single", "per_expert")
    assert equal(load_file(tmp_path / "single" / "model.safetensors"), single(kind, weights))
    apart = write(tmp_path / "foreign", CONFIGS[kind], single(kind, weights))
    convert(apart, tmp_path / "back", "hf")
    assert equal(load_file(tmp_path / "back" / "model.safetensors"), weights)
    assert list(differences(source, apart)) == []


def test_a_vision_language_models_turned_stacks_are_told_by_their_shapes(tmp_path: Path) -> None:
    """Its files hold [E, H, 2I] and [E, I, H], which transformers turns when it loads them."""
    text = {**NARROW, **INNER, "num_experts": EXPERTS, "head_dim": 8, "mlp_only_layers": [0]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen3VLMoeConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]})
    model = Qwen3VLMoeForConditionalGeneration(config)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    stacks = [n for n in weights if ".experts." in n]
    assert len(stacks) == 2
    turned = weights | {n: weights[n].transpose(1, 2).contiguous() for n in stacks}
    source = write(tmp_path / "turned", config, turned)
    assert equal(plan(source, "hf").apply(turned), weights)
    layer = "model.language_model." + STACK.removeprefix("model.")
    for given in (source, write(tmp_path / "straight", config, weights)):
        apart = plan(given, "per_expert").apply(load_file(given / "model.safetensors"))
        for e in range(EXPERTS):
            gate_up, down = weights[layer + "gate_up_proj"][e], weights[layer + "down_proj"][e]
            assert torch.equal(apart[f"{layer}{e}.gate_proj.weight"], gate_up[:WIDTH])
            assert torch.equal(apart[f"{layer}{e}.up_proj.weight"], gate_up[WIDTH:])
            assert torch.equal(apart[f"{layer}{e}.down_proj.weight"], down)
    loaded = Qwen3VLMoeForConditionalGeneration.from_pretrained(source)
    assert equal(dict(loaded.state_dict()), weights)
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(config)
    load_state_dict(model, source)
    assert equal(dict(model.state_dict()), weights)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("on_meta", [True, False])
def test_single_experts_are_loaded_into_models(kind: str, on_meta: bool, tmp_path: Path) -> None:
    weights = state_of(kind)
    given = single(kind, weights)
    for source in (given, write(tmp_path / "single", CONFIGS[kind], given)):
        with torch.device("meta" if on_meta else "cpu"):
            model = AutoModelForCausalLM.from_config(CONFIGS[kind])
        load_state_dict(model, source)
        assert equal(dict(model.state_dict()), weights)
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_experts_that_the_config_counts_and_the_files_lack_are_missed(kind: str, tmp_path: Path) -> None:
    """The last one would not be missed by the numbers of the others."""
    last = f"experts.{EXPERTS - 1}."
    weights = {n: t for n, t in single(kind, state_of(kind)).items() if last not in n}
    source = write(tmp_path / "source", CONFIGS[kind], weights)
    with pytest.raises(PlanError, match=rf"experts\.{EXPERTS - 1}\..*missing \(3 in all\)"):
        plan(source, "hf")


def test_stacks_of_other_sizes_than_the_configs_are_refused(tmp_path: Path) -> None:
    weights = state_of("qwen3_moe")
    fields = CONFIGS["qwen3_moe"].to_dict()
    source = write(tmp_path / "source", CONFIGS["qwen3_moe"], weights)
    for change, message in (
        ({"num_local_experts": 4}, "3 experts, the config gives 4"),
        ({"moe_intermediate_size": 7}, "6 rows in an expert's gate, the config gives 7"),
    ):
        (source / "config.json").write_text(json.dumps(fields | change, default=str))
        with pytest.raises(PlanError, match=message):
            plan(source, "per_expert")


def test_ranks_of_a_mixture_have_experts_of_their_part() -> None:
    config = Qwen3_5MoeTextConfig(
        **{**NARROW, "num_key_value_heads": 1},
        moe_intermediate_size=WIDTH,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
    )
    shapes = {t.shape for t in plan(config, "per_expert", tp=(1, 2)).targets if ".experts." in t.name}
    assert shapes == {(WIDTH // 2, HIDDEN), (HIDDEN, WIDTH // 2)}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("layout", "tp"),
    [*((name, None) for name in PLANNED if name not in ("hf", "per_expert")), ("hf", (0, 2))],
)
def test_what_else_is_asked_of_them_is_refused_with_what_can_be(
    kind: str, layout: str, tp: tuple[int, int] | None
) -> None:
    with pytest.raises(PlanError) as caught:
        plan(CONFIGS[kind], layout, tp=tp)
    message = str(caught.value)
    assert f"only its experts are planned, so not layout '{layout}'" in message
    assert ("for tp=(0, 2)" in message) == (tp is not None)
    can_be = re.findall(r"'(\w+)' \(", message)
    assert can_be == ["hf", "per_expert"]
    for name in can_be:
        plan(CONFIGS[kind], name)


def test_an_unknown_architecture_is_refused_with_all_known_ones() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        plan(LlamaConfig(), "per_expert")
    assert all(known in str(caught.value) for known in known_model_types())
    assert {*CONFIGS, "qwen3_5_moe", "qwen3_next"} < set(known_model_types())
