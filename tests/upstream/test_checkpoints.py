"""Bugs that loaders and converters of other projects had, on tiny checkpoints; see docs/upstream-cases.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig, Qwen3NextConfig

import fxfuse
from fxfuse.errors import CheckpointError, PlanError

HIDDEN, BLOCK = 16, 8
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "vocab_size": 32,
}
SPARSE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
DENSE = Qwen3_5TextConfig(**SIZES, intermediate_size=24)
MOE = Qwen3_5MoeTextConfig(**SIZES, **SPARSE)
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
WIDE = ("A_log", "linear_attn.norm.weight")  # float32 in the published files

MTP = {
    "mtp.fc.weight": (HIDDEN, 2 * HIDDEN),
    "mtp.norm.weight": (HIDDEN,),
    "mtp.embed_tokens.weight": (32, HIDDEN),
    "mtp.lm_head.weight": (32, HIDDEN),
    "mtp.layers.0.self_attn.q_proj.weight": (32, HIDDEN),
    "mtp.layers.0.self_attn.k_proj.weight": (8, HIDDEN),
    "mtp.layers.0.self_attn.v_proj.weight": (8, HIDDEN),
    "mtp.layers.0.mlp.gate.weight": (4, HIDDEN),
    "mtp.layers.0.mlp.experts.0.gate_proj.weight": (8, HIDDEN),
    "mtp.layers.0.mlp.experts.0.up_proj.weight": (8, HIDDEN),
    "mtp.layers.0.mlp.experts.gate_up_proj": (4, 16, HIDDEN),
    "mtp.layers.0.mlp.shared_expert.gate_proj.weight": (8, HIDDEN),
    "mtp.layers.0.mlp.shared_expert.up_proj.weight": (8, HIDDEN),
    "mtp.layers.0.mlp.shared_expert_gate.weight": (1, HIDDEN),
}


def model_of(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def weights_of(config: Any, *, wide: tuple[str, ...] = WIDE) -> dict[str, Tensor]:
    """bfloat16 as in published files, with parts in float32 whose values bfloat16 cannot hold."""
    state = model_of(config).state_dict()
    return {n: torch.rand_like(t) + 0.1 if n.endswith(wide) else t.bfloat16() for n, t in state.items()}


def quantised(weights: dict[str, Tensor], chosen: Callable[[str], bool]) -> dict[str, Tensor]:
    """Some weights in FP8, each with its table of scales."""
    made = {}
    for name, tensor in weights.items():
        if not chosen(name):
            made[name] = tensor
            continue
        made[name] = tensor.to(torch.float8_e4m3fn)
        table = [-(-size // BLOCK) for size in tensor.shape]
        made[name + "_scale_inv"] = 2.0 ** torch.randint(-3, 4, table)
    return made


def dequantised(weights: dict[str, Tensor], name: str) -> Tensor:
    weight, scale = weights[name].float(), weights.get(name + "_scale_inv")
    if scale is None:
        return weight
    rows, columns = weight.shape
    return weight * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def write(folder: Path, weights: dict[str, Tensor], config: Any, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | fields, default=str))
    save_file({n: t.clone().contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    view = torch.uint8
    return (
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and bool(a.numel())
        and torch.equal(a.reshape(-1).view(view), b.reshape(-1).view(view))
    )


@pytest.fixture(autouse=True)
def _quiet(quiet: None) -> None:
    pass


@pytest.mark.parametrize("layout", ["fused", "sglang", "qwen3_next", "fastdeploy"])
def test_nemo_automodel_2484_what_is_float32_in_a_bfloat16_file_stays_so(layout: str, tmp_path: Path) -> None:
    """Also of vllm#51836 and ms-swift#9972: decay rates and norms, there and back."""
    weights = weights_of(DENSE)
    wide = {n for n in weights if n.endswith(WIDE)}
    assert len(wide) == 2
    source = write(tmp_path / "source", weights, DENSE)
    fxfuse.convert(source, tmp_path / "there", layout)
    there = read(tmp_path / "there")
    assert sum(t.dtype == torch.float32 for t in there.values()) == len(wide)
    fxfuse.convert(tmp_path / "there", tmp_path / "back", "hf")
    back = read(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert all(same_bits(back[n], t) for n, t in weights.items())


def test_vllm_51836_float32_parts_of_a_bfloat16_model_are_loaded_without_rounding(tmp_path: Path) -> None:
    weights = weights_of(DENSE)
    model = model_of(DENSE, seed=1).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith(WIDE):
            parameter.data = parameter.float()
    fxfuse.optimize(model, inner="eager", report="off")
    fxfuse.load_state_dict(model, write(tmp_path, weights, DENSE))
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long))
    state = model.state_dict()
    assert all(same_bits(state[n], t) for n, t in weights.items())


@pytest.mark.parametrize("layout", ["fused", "sglang", "per_expert"])
def test_sglang_35719_and_vllm_52013_the_draft_model_stays_under_its_names(
    layout: str, tmp_path: Path
) -> None:
    """Stacked and single experts, a head and embeddings of its own, a shared expert: nothing is taken for
    the decoder's."""
    weights = weights_of(MOE)
    weights |= {name: torch.randn(shape).bfloat16() for name, shape in MTP.items()}
    source = write(tmp_path / "source", weights, MOE)
    fxfuse.convert(source, tmp_path / "there", layout)
    there = read(tmp_path / "there")
    assert {n for n in there if "mtp" in n} == MTP.keys()
    assert all(same_bits(there[n], weights[n]) for n in MTP)
    total = sum(t.nbytes for t in weights.values())
    assert sum(t.nbytes for t in there.values()) == total
    fxfuse.convert(tmp_path / "there", tmp_path / "back", "hf")
    back = read(tmp_path / "back")
    assert back.keys() == weights.keys() and all(same_bits(back[n], t) for n, t in weights.items())


@pytest.mark.parametrize("layout", ["fused", "sglang"])
def test_sglang_18926_scales_of_the_draft_model_are_not_merged_with_the_decoders(
    layout: str, tmp_path: Path
) -> None:
    weights = weights_of(DENSE)
    weights |= {n: torch.randn(s).bfloat16() for n, s in MTP.items() if "self_attn" in n}
    weights = quantised(weights, lambda n: "self_attn" in n and "_proj" in n)
    there = fxfuse.plan(write(tmp_path, weights, DENSE, quantization_config=FP8), layout).apply(weights)
    draft = {n for n in weights if n.startswith("mtp.")}
    assert len(draft) == 6 and draft <= there.keys()
    assert all(same_bits(there[n], weights[n]) for n in draft)
    merged = [n for n in there if "layers.1" in n and n.endswith("weight_scale_inv")]
    tables = [weights[f"model.layers.1.self_attn.{n}_proj.weight_scale_inv"] for n in "qkv"]
    assert any(same_bits(there[n], torch.cat(tables)) for n in merged)


@pytest.mark.parametrize("layout", ["fused", "sglang", "per_expert"])
def test_atom_782_a_merged_tensor_fills_its_parts_or_is_missed(layout: str) -> None:
    config = MOE if layout == "per_expert" else DENSE
    weights = model_of(config).state_dict()
    given = fxfuse.plan(model_of(config), layout).apply(weights)
    new = [name for name in given if name not in weights]
    assert new
    model = model_of(config, seed=1)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    fxfuse.load_state_dict(model, given)
    assert all(same_bits(t, weights[n]) for n, t in model.state_dict().items())
    for name in new:
        for changed in ({}, {name + "_": given[name]}):
            left = {n: t for n, t in given.items() if n != name}
            with pytest.raises(CheckpointError):
                fxfuse.load_state_dict(model, left | changed)
            assert all(same_bits(t, weights[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("single", [False, True])
def test_gptqmodel_2694_experts_under_another_prefix_are_loaded_or_refused(
    single: bool, tmp_path: Path
) -> None:
    weights = model_of(MOE).state_dict()
    given = fxfuse.plan(model_of(MOE), "per_expert").apply(weights) if single else dict(weights)
    for prefix, known in (("model.language_model.", True), ("language_model.model.", False)):
        moved = {n.replace("model.", prefix, 1): t for n, t in given.items()}
        model = model_of(MOE, seed=1)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        if known:
            fxfuse.load_state_dict(model, moved)
        else:
            with pytest.raises(CheckpointError):
                fxfuse.load_state_dict(model, moved)
        expected = weights if known else before
        assert all(same_bits(t, expected[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("listed", ["model.language_model.", "model.", ""])
def test_transformers_48349_modules_left_out_of_fp8_are_known_under_any_prefix(
    listed: str, tmp_path: Path
) -> None:
    """The list names modules as the composite model does, as the text model does, or by their last parts."""
    weights = quantised(
        weights_of(DENSE), lambda n: n.endswith("_proj.weight") or "in_proj_qkv" in n or "_z." in n
    )
    plain = {n.removesuffix(".weight") for n in weights if ".in_proj_a" in n or ".in_proj_b" in n}
    names = [n.replace("model.", listed, 1) for n in sorted(plain)] + ["lm_head"]
    fields = FP8 | {"modules_to_not_convert": names}
    source = write(tmp_path, weights, DENSE, quantization_config=fields)
    for layout in ("fused", "sglang"):
        planned = fxfuse.plan(source, layout)
        dtypes = {s.name: s.dtype for s in planned.sources}
        for transform in planned.transforms:
            assert len({dtypes[name] for name in transform.sources}) == 1
        there = planned.apply(weights)
        bf16 = [n for n in there if n.endswith(".weight") and "linear_attn.in_proj" in n and "qkv" not in n]
        assert bf16 and all(there[n].dtype == torch.bfloat16 for n in bf16)
        config = Qwen3_5TextConfig(**SIZES, intermediate_size=24, quantization_config=fields)
        assert fxfuse.plan(config, layout).bind(weights).digest == planned.digest


def test_vllm_41457_layers_are_quantised_each_for_itself(tmp_path: Path) -> None:
    """The first layer in FP8, the second as it was: each is merged by what it is."""
    weights = quantised(weights_of(DENSE), lambda n: "layers.0.mlp" in n)
    there = fxfuse.plan(write(tmp_path, weights, DENSE, quantization_config=FP8), "fused").apply(weights)
    for layer, dtype in ((0, torch.float8_e4m3fn), (1, torch.bfloat16)):
        merged = f"model.layers.{layer}.mlp.gate_up_proj.weight"
        parts = [dequantised(weights, merged.replace("gate_up", n)) for n in ("gate", "up")]
        assert there[merged].dtype == dtype
        assert torch.equal(dequantised(there, merged), torch.cat(parts))
    assert not any("layers.1" in n and n.endswith("_inv") for n in there)


def test_vllm_47445_and_prime_rl_2166_plain_rows_beside_fp8_stay_plain(tmp_path: Path) -> None:
    """The rates of Gated DeltaNet, and the one row of the shared expert's gate, are no FP8."""
    left_out = ("in_proj_a", "in_proj_b", "mlp.gate.", "shared_expert_gate", "lm_head", "embed", "conv1d")
    weights = fxfuse.plan(MOE, "per_expert").apply(weights_of(MOE))
    weights = quantised(weights, lambda n: weights[n].dim() == 2 and not any(part in n for part in left_out))
    source = write(tmp_path, weights, MOE, quantization_config=FP8)
    planned = fxfuse.plan(source, "fused")
    there = planned.apply(weights)
    gate = "model.layers.1.mlp.shared_expert_gate.weight"
    for transform in planned.transforms:
        name, parts = transform.target.name, transform.sources
        if not name.endswith(".weight"):
            continue
        assert len({weights[part].dtype for part in parts}) == 1, name
        whole = torch.cat([dequantised(weights, part) for part in parts])
        assert torch.equal(dequantised(there, name), whole), name
        assert (name + "_scale_inv" in there) == (parts[0] + "_scale_inv" in weights)
    assert all(
        weights[n].dtype == torch.bfloat16 for t in planned.transforms if gate in t.sources for n in t.sources
    )
    missing = {
        n: t for n, t in weights.items() if n != "model.layers.0.linear_attn.in_proj_z.weight_scale_inv"
    }
    with pytest.raises(PlanError, match=r"in_proj_z\.weight: float8_e4m3fn without a scale"):
        fxfuse.plan(write(tmp_path / "missing", missing, MOE, quantization_config=FP8), "fused")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_vllm_35924_few_rows_for_each_rank_are_whole_heads_or_refused(world: int) -> None:
    config = Qwen3_5TextConfig(**SIZES | {"num_attention_heads": 8}, intermediate_size=24)
    weights = model_of(config).state_dict()
    for rank in range(world):
        if world == 4:
            with pytest.raises(PlanError, match="2 linear-attention key heads do not divide over 4"):
                fxfuse.plan(config, "sglang", tp=(rank, world))
            continue
        layer = "model.layers.0.linear_attn.in_proj_"
        there = fxfuse.plan(config, "sglang", tp=(rank, world)).apply(weights)
        own = slice(rank * 4 // world, (rank + 1) * 4 // world)
        assert torch.equal(
            there[layer + "ba.weight"],
            torch.cat([weights[layer + "b.weight"][own], weights[layer + "a.weight"][own]]),
        )


def test_vllm_34697_each_family_has_the_sizes_of_its_own_projections() -> None:
    keys, values, heads = 2 * 8, 4 * 8, 4
    flat = fxfuse.plan(DENSE, "sglang")
    grouped = Qwen3NextConfig(**SIZES, **SPARSE, intermediate_size=24, mlp_only_layers=[0, 1])
    layer = "model.layers.0.linear_attn."
    shapes = {t.name: t.shape for t in flat.targets}
    assert shapes[layer + "in_proj_qkvz.weight"] == (2 * keys + 2 * values, HIDDEN)
    assert shapes[layer + "in_proj_ba.weight"] == (2 * heads, HIDDEN)
    fused = {t.name: t.shape for t in fxfuse.plan(DENSE, "fused").targets}
    assert fused[layer + "in_proj_qkv_z_b_a.weight"] == (2 * keys + 2 * values + 2 * heads, HIDDEN)
    apart = fxfuse.plan(grouped, "qwen3_5")
    sizes = {t.name: t.shape for t in apart.targets}
    assert sizes[layer + "in_proj_qkv.weight"] == (2 * keys + values, HIDDEN)
    assert sizes[layer + "in_proj_z.weight"] == (values, HIDDEN)
    assert sizes[layer + "in_proj_b.weight"] == sizes[layer + "in_proj_a.weight"] == (heads, HIDDEN)
    # the row that was a value of the second key head's group, by the index that the model computes
    state = model_of(grouped).state_dict()
    rows = torch.arange(2 * keys + 2 * values).float()[:, None].expand(-1, HIDDEN).contiguous()
    state[layer + "in_proj_qkvz.weight"] = rows
    got = apart.apply(state)
    per_group = 8 + 8 + 2 * 8 * 2
    expected = [
        *(g * per_group + i for g in range(2) for i in range(8)),
        *(g * per_group + 8 + i for g in range(2) for i in range(8)),
        *(g * per_group + 16 + i for g in range(2) for i in range(16)),
    ]
    assert got[layer + "in_proj_qkv.weight"][:, 0].tolist() == expected


class _WithLoader(nn.Parameter):
    """As engines have them: the loader is a property that cannot be set."""

    @property
    def weight_loader(self) -> Callable[[Tensor, Tensor], None]:
        return _load


def _load(parameter: Tensor, given: Tensor) -> None:
    parameter.data.copy_(given)


@pytest.mark.parametrize("kind", [_WithLoader, nn.Parameter])
def test_sglang_21662_what_parameters_carry_is_left_on_them(kind: type) -> None:
    """No loader is set here and none is lost: a subclass stays as it is, an attribute on its object."""
    module = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
    for linear in module:
        linear.weight = kind(linear.weight.detach().clone(), requires_grad=False)
        if kind is nn.Parameter:
            linear.weight.weight_loader = _load

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[0](x) + 2 * self.parts[1](x)

    model, x = Both(), torch.randn(3, 8)
    compiled = torch.compile(model, backend="fxfuse", options={"inner": "eager", "report": "off"})
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x))
            for linear in module:
                assert type(linear.weight) is kind
                given = torch.randn(8, 8)
                linear.weight.weight_loader(linear.weight, given)
                assert torch.equal(linear.weight, given)
