"""FP8 planned from a config, a model and files alike, and the scales of experts that are one stack."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3_5MoeTextConfig, Qwen3_5TextConfig
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

from fxfuse.errors import PlanError
from fxfuse.passes.weights import WeightPlan
from fxfuse.runtime.live_weights import is_packed
from fxfuse.runtime.load import load_state_dict
from fxfuse.runtime.plan import plan

BLOCK = 8
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "vocab_size": 16,
}
EXPERTS, WIDTH = 3, 8
SPARSE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 16,
}
# as published files except them: one by whole name and prefix, others by the last parts of their names
PLAIN = [
    "lm_head",
    "model.language_model.layers.0.linear_attn.in_proj_a",
    "in_proj_b",
    "mlp.gate",
    "mlp.shared_expert_gate",
]
STACK = "model.layers.1.mlp.experts."


# the same modules as compressed-tensors and ModelOpt write them
IGNORED = ["lm_head", "re:.*linear_attn.in_proj_[ab]$", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]
GLOBS = ["lm_head", "*linear_attn.in_proj_a", "*.in_proj_b", "model.layers.*.mlp.gate", "*shared_expert_gate"]


def fields(strategy: str) -> dict[str, Any]:
    if strategy == "channel":
        weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": IGNORED}
    if strategy == "modelopt":
        return {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": GLOBS}
    given: dict[str, Any] = {"quant_method": "fp8", "modules_to_not_convert": PLAIN}
    return given | ({"weight_block_size": [BLOCK, BLOCK]} if strategy == "block" else {})


def config_of(kind: str, strategy: str) -> Any:
    if kind == "dense":
        return Qwen3_5TextConfig(**SIZES, intermediate_size=24, quantization_config=fields(strategy))
    return Qwen3_5MoeTextConfig(**SIZES, **SPARSE, quantization_config=fields(strategy))


def weights_of(kind: str, strategy: str) -> dict[str, torch.Tensor]:
    """As files have them: every linear that is not excepted in FP8 with its scales, experts one by one."""
    torch.manual_seed(0)
    config = config_of(kind, strategy)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    given = dict(model.state_dict())
    given = plan(model, "per_expert").apply(given) if kind == "moe" else given
    linears = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    result = {}
    for i, (name, tensor) in enumerate(given.items()):
        module = name.removesuffix(".weight")
        if (name not in linears and ".experts." not in name) or module.endswith(
            ("lm_head", "in_proj_a", "in_proj_b", "mlp.gate", "shared_expert_gate")
        ):
            result[name] = tensor.to(torch.bfloat16)
            continue
        result[name] = tensor.to(torch.float8_e4m3fn)
        if strategy == "block":
            table = [-(-size // BLOCK) for size in tensor.shape]
            result[f"{module}.weight_scale_inv"] = torch.rand(table) + 0.5
        elif strategy == "channel":
            result[f"{module}.weight_scale"] = torch.rand(tensor.shape[0], 1) + 0.5
        else:
            one: list[tuple[int, ...]] = [(), (1,), (1, 1)]
            result[f"{module}.weight_scale"] = torch.tensor(float(i + 1)).reshape(one[i % 3])
    return result


def write(folder: Path, config: Any, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    return folder


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("strategy", ["block", "tensor", "channel", "modelopt"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("layout", ["hf", "fused", "sglang"])
def test_a_config_gives_the_plan_of_its_files(kind: str, strategy: str, layout: str, tmp_path: Path) -> None:
    config, weights = config_of(kind, strategy), weights_of(kind, strategy)
    from_files = plan(write(tmp_path, config, weights), layout)
    template = plan(config, layout)
    bound = template.bind(weights) if len(template) else template
    assert bound.digest == from_files.digest


@pytest.mark.parametrize("strategy", ["block", "tensor", "channel", "modelopt"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("layout", ["fused", "sglang"])
def test_fused_fp8_files_of_other_programs_are_recognised(
    kind: str, strategy: str, layout: str, tmp_path: Path
) -> None:
    config, weights = config_of(kind, strategy), weights_of(kind, strategy)
    there = plan(write(tmp_path / "a", config, weights), layout).apply(weights)
    back = plan(write(tmp_path / "b", config, there), "hf").apply(there)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        # one number may be stored as [1] where the way back cannot know better
        assert bits(back[name].reshape(tensor.shape)) == bits(tensor), name


def fp8_model(strategy: str) -> Any:
    """What transformers holds after loading an FP8 checkpoint: linears and experts of its own."""
    config = config_of("moe", strategy)
    quantization = FineGrainedFP8Config(
        weight_block_size=(BLOCK, BLOCK) if strategy == "block" else None, modules_to_not_convert=PLAIN
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        names = ["lm_head", "in_proj_a", "in_proj_b", "mlp.gate", "shared_expert_gate"]
        model = replace_with_fp8_linear(model, names, quantization)
    model.config.quantization_config = quantization
    return model


@pytest.mark.parametrize("strategy", ["block", "tensor"])
def test_a_model_in_fp8_is_planned_with_its_scales(strategy: str) -> None:
    model = fp8_model(strategy)
    targets = {t.name: t for t in plan(model, "fused").targets}
    layer = "model.layers.0.linear_attn."
    assert targets[layer + "in_proj_qkv_z.weight"].dtype == "float8_e4m3fn"
    assert targets[layer + "in_proj_qkv_z.weight_scale_inv"].shape == (
        (12, 2) if strategy == "block" else (2,)
    )
    assert targets[layer + "in_proj_b_a.weight"].dtype == "float32"


def filled(model: Any) -> dict[str, torch.Tensor]:
    """Any bits for every parameter; every scale is its own number."""
    torch.manual_seed(0)
    result = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        made = torch.randn(p.shape) if "scale" not in name else torch.rand(p.shape) + i
        result[name] = made.to(p.dtype)
    return result


@pytest.mark.parametrize("strategy", ["block", "tensor"])
def test_experts_of_a_stack_in_fp8_come_apart_with_their_scales(strategy: str) -> None:
    """transformers holds [E, 2I/b, H/b] tables or, per tensor, [E, 2, 1] and [E, 1, 1]."""
    model = fp8_model(strategy)
    weights = filled(model)
    gate_up, down = weights[STACK + "gate_up_proj"], weights[STACK + "down_proj"]
    up_scales, down_scales = weights[STACK + "gate_up_proj_scale_inv"], weights[STACK + "down_proj_scale_inv"]
    planned = plan(model, "per_expert")
    apart = planned.apply(weights)
    for e in range(EXPERTS):
        for part, block, scale in (
            ("gate", gate_up[e, :WIDTH], up_scales[e, : WIDTH // BLOCK]),
            ("up", gate_up[e, WIDTH:], up_scales[e, WIDTH // BLOCK :]),
            ("down", down[e], down_scales[e]),
        ):
            assert torch.equal(apart[f"{STACK}{e}.{part}_proj.weight"].float(), block.float())
            got = apart[f"{STACK}{e}.{part}_proj.weight_scale_inv"]
            assert torch.equal(got, scale if strategy == "block" else scale.reshape(1))
    back = planned.inverse().apply(apart)
    assert back.keys() == weights.keys()
    assert all(bits(back[n]) == bits(t) for n, t in weights.items())


@pytest.mark.parametrize("strategy", ["block", "tensor"])
def test_a_model_in_fp8_is_loaded_and_its_linears_are_not_packed(strategy: str) -> None:
    model = fp8_model(strategy)
    weights = filled(model)
    load_state_dict(model, weights)
    own = dict(model.named_parameters())
    assert all(bits(own[n].detach()) == bits(t) for n, t in weights.items())
    packed = {n for n, p in own.items() if is_packed(p)}
    assert packed == {
        *(f"model.layers.0.linear_attn.in_proj_{n}.weight" for n in "ba"),
        *(f"model.layers.{i}.mlp.{n}.weight" for i in (0, 1) for n in ("gate", "shared_expert_gate")),
    }


def test_single_experts_in_fp8_are_loaded_into_the_stack_with_their_scales(tmp_path: Path) -> None:
    weights = weights_of("moe", "block")
    source = write(tmp_path, config_of("moe", "block"), weights)
    model = fp8_model("block")
    load_state_dict(model, source)
    own = model.state_dict()
    gate_up, scales = own[STACK + "gate_up_proj"], own[STACK + "gate_up_proj_scale_inv"]
    for e in range(EXPERTS):
        for i, part in enumerate(("gate", "up")):
            name = f"{STACK}{e}.{part}_proj.weight"
            assert bits(gate_up[e, i * WIDTH : (i + 1) * WIDTH]) == bits(weights[name])
            assert torch.equal(scales[e, i : i + 1], weights[name + "_scale_inv"])


@pytest.mark.parametrize("shape", [(EXPERTS,), (EXPERTS, 1), (EXPERTS, 1, 1)])
def test_gate_and_up_share_the_one_scale_of_their_expert(shape: tuple[int, ...]) -> None:
    model = fp8_model("tensor")
    model.model.layers[1].mlp.experts.gate_up_proj_scale_inv = nn.Parameter(torch.empty(shape, device="meta"))
    weights = filled(model)
    planned = plan(model, "per_expert")
    apart = planned.apply(weights)
    scales = weights[STACK + "gate_up_proj_scale_inv"].reshape(EXPERTS)
    for e in range(EXPERTS):
        for part in ("gate", "up"):
            assert torch.equal(apart[f"{STACK}{e}.{part}_proj.weight_scale_inv"], scales[e : e + 1])
    assert ("repeated", "expert_scale") in {(u.how, u.role) for u in planned.usages}
    assert WeightPlan.from_json(planned.to_json()) == planned
    back = planned.inverse().apply(apart)
    assert all(bits(back[n]) == bits(t) for n, t in weights.items())


def test_one_scale_for_the_inputs_of_all_experts_goes_to_each() -> None:
    model = fp8_model("tensor")
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj_activation_scale = nn.Parameter(torch.empty((), device="meta"))
    weights = filled(model)
    apart = plan(model, "per_expert").apply(weights)
    one = weights[STACK + "gate_up_proj_activation_scale"]
    names = {f"{STACK}{e}.{part}_proj.activation_scale" for e in range(EXPERTS) for part in ("gate", "up")}
    assert {n for n in apart if n.startswith(STACK) and n.endswith("activation_scale")} == names
    assert all(torch.equal(apart[n], one) for n in names)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((EXPERTS, 3, 1), "3 values for an expert do not divide"), ((EXPERTS + 1,), "no number of values")],
)
def test_scales_that_do_not_divide_are_refused(shape: tuple[int, ...], message: str) -> None:
    model = fp8_model("tensor")
    model.model.layers[1].mlp.experts.gate_up_proj_scale_inv = nn.Parameter(torch.empty(shape, device="meta"))
    with pytest.raises(PlanError, match=message):
        plan(model, "per_expert")


def test_blocks_that_reach_into_the_next_expert_are_refused() -> None:
    model = fp8_model("block")
    sizes = [("gate_up_proj", 20, 16), ("down_proj", 16, 10)]
    for experts, (name, rows, width) in product([layer.mlp.experts for layer in model.model.layers], sizes):
        stack = torch.empty(EXPERTS, rows, width, device="meta", dtype=torch.float8_e4m3fn)
        setattr(experts, name, nn.Parameter(stack, requires_grad=False))
        table = torch.empty(EXPERTS, -(-rows // BLOCK), -(-width // BLOCK), device="meta")
        setattr(experts, f"{name}_scale_inv", nn.Parameter(table))
    model.config.moe_intermediate_size = 10
    with pytest.raises(PlanError, match="do not end with an expert's 20"):
        plan(model, "per_expert")
