"""FP8 checkpoints: merged weights times their merged scales are the parts, dequantised one by one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

from fxfuse.errors import CheckpointError, PlanError
from fxfuse.passes.weights import RowMap, TensorSpec, Transform, all_ranks
from fxfuse.runtime.convert import convert, differences
from fxfuse.runtime.layouts.scales import with_scales
from fxfuse.runtime.load import load_state_dict
from fxfuse.runtime.plan import plan
from fxfuse.runtime.quantization import Scheme

BLOCK = 8
CONFIG = Qwen3_5TextConfig(
    hidden_size=20,
    intermediate_size=24,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    vocab_size=16,
)
L0, L1 = "model.layers.0.", "model.layers.1."
PLAIN = {L0 + "linear_attn.in_proj_b": 4, L0 + "linear_attn.in_proj_a": 4}
LINEAR = {
    L0 + "linear_attn.in_proj_qkv": (64, 20),
    L0 + "linear_attn.in_proj_z": (32, 20),
    L0 + "linear_attn.out_proj": (20, 32),
    L1 + "self_attn.q_proj": (64, 20),
    L1 + "self_attn.k_proj": (16, 20),
    L1 + "self_attn.v_proj": (16, 20),
    L1 + "self_attn.o_proj": (20, 32),
    **{f"{layer}mlp.{n}_proj": (24, 20) for layer in (L0, L1) for n in ("gate", "up")},
    **{f"{layer}mlp.down_proj": (20, 24) for layer in (L0, L1)},
}
FIELDS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    "ue8m0": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    "tensor": {"quant_method": "fp8"},
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}},
    },
}
ONE: list[tuple[int, ...]] = [(), (1,), (1, 1)]


def weights_of(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = {f"{name}.weight": torch.randn(rows, 20).to(torch.bfloat16) for name, rows in PLAIN.items()}
    made[L0 + "linear_attn.A_log"] = torch.randn(4)
    for i, (name, (rows, width)) in enumerate(LINEAR.items()):
        made[f"{name}.weight"] = torch.randn(rows, width).to(torch.float8_e4m3fn)
        if kind in ("block", "ue8m0"):
            table = torch.rand(rows if kind == "ue8m0" else -(-rows // BLOCK), -(-width // BLOCK)) + 0.5
            dtype = torch.float8_e8m0fnu if kind == "ue8m0" else torch.bfloat16
            made[f"{name}.weight_scale_inv"] = (table * 2 ** (i % 4)).to(dtype)
        elif kind == "channel":
            made[f"{name}.weight_scale"] = torch.rand(rows, 1) + i
        else:
            made[f"{name}.weight_scale"] = torch.tensor(float(i + 1)).reshape(ONE[i % 3])
            made[f"{name}.input_scale"] = torch.tensor(float(i + 101)).reshape(ONE[(i + 1) % 3])
    return made


def dequantised(weight: torch.Tensor, scale: torch.Tensor, shards: list[int], kind: str) -> torch.Tensor:
    """Every element times its own scale."""
    w, s = weight.float(), scale.float()
    if kind in ("block", "ue8m0"):
        rows = s.repeat_interleave(1 if kind == "ue8m0" else BLOCK, 0)
        return w * rows.repeat_interleave(BLOCK, 1)[: w.shape[0], : w.shape[1]]
    if kind == "tensor":
        s = s.reshape(-1).repeat_interleave(torch.tensor(shards))[:, None]
    return w * s


def write(folder: Path, kind: str, weights: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    fields = CONFIG.to_dict() | {"quantization_config": FIELDS[kind]}
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    save_file(weights_of(kind) if weights is None else weights, folder / "model.safetensors")
    return folder


MERGES = {
    ("fused", L0 + "linear_attn.in_proj_qkv_z"): (["in_proj_qkv", "in_proj_z"], [64, 32]),
    ("sglang", L0 + "linear_attn.in_proj_qkvz"): (["in_proj_qkv", "in_proj_z"], [16, 16, 32, 32]),
    ("fused", L1 + "self_attn.q_k_v_proj"): (["q_proj", "k_proj", "v_proj"], [64, 16, 16]),
    ("sglang", L1 + "qkv_proj"): (["q_proj", "k_proj", "v_proj"], [64, 16, 16]),
    ("sglang", L1 + "mlp.gate_up_proj"): (["gate_proj", "up_proj"], [24, 24]),
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize(("layout", "name"), MERGES)
def test_merged_weights_and_scales_are_the_parts(kind: str, layout: str, name: str, tmp_path: Path) -> None:
    weights = weights_of(kind)
    got = plan(write(tmp_path, kind), layout).apply(weights)
    members, shards = MERGES[layout, name]
    leaf = "weight_scale_inv" if kind in ("block", "ue8m0") else "weight_scale"
    layer = name.split("layers.")[1][:2]
    whole = [n for m in members for n in LINEAR if n.endswith("." + m) and f"layers.{layer}" in n]
    expected = [
        dequantised(weights[f"{n}.weight"], weights[f"{n}.{leaf}"], [LINEAR[n][0]], kind) for n in whole
    ]
    assert torch.equal(
        dequantised(got[f"{name}.weight"], got[f"{name}.{leaf}"], shards, kind), torch.cat(expected)
    )
    if kind == "tensor":
        counts = [3 if layout == "sglang" and m == "in_proj_qkv" else 1 for m in members]
        inputs = [
            weights[f"{n}.input_scale"].reshape(1).expand(c) for n, c in zip(whole, counts, strict=True)
        ]
        assert torch.equal(got[f"{name}.input_scale"], torch.cat(inputs))
    assert got[f"{name}.{leaf}"].dtype == weights[f"{whole[0]}.{leaf}"].dtype


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("layout", ["fused", "sglang"])
def test_quantised_checkpoints_convert_there_and_back(kind: str, layout: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", kind)
    convert(source, tmp_path / "there", layout)
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert list(differences(source, tmp_path / "there")) == []
    back, weights = load_file(tmp_path / "back" / "model.safetensors"), weights_of(kind)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        bits = [t.reshape(-1).view(torch.uint8).tolist() for t in (back[name], tensor)]
        assert bits[0] == bits[1]
    # in_proj_b and in_proj_a stay apart from the FP8 rows, and in their own dtype
    there = load_file(tmp_path / "there" / "model.safetensors")
    name = L0 + "linear_attn." + {"fused": "in_proj_b_a", "sglang": "in_proj_ba"}[layout] + ".weight"
    assert there[name].dtype == torch.bfloat16
    assert there[name].shape == (8, 20)


@pytest.mark.parametrize("kind", ["tensor", "channel", "ue8m0", "block"])
def test_each_ranks_scales_go_with_its_rows_and_columns(kind: str, tmp_path: Path) -> None:
    weights = weights_of(kind)
    source = write(tmp_path, kind)
    leaf = "weight_scale_inv" if kind in ("block", "ue8m0") else "weight_scale"
    name = L0 + "linear_attn.in_proj_qkv"
    whole = dequantised(weights[f"{name}.weight"], weights[f"{name}.{leaf}"], [64], kind)
    out = L1 + "self_attn.o_proj"
    columns = dequantised(weights[f"{out}.weight"], weights[f"{out}.{leaf}"], [20], kind)
    if kind in ("block", "ue8m0"):
        # 24 rows of the MLP are no 2x8, 12 each: a block would be cut
        with pytest.raises(PlanError, match=r"mlp\..*does not begin and end at blocks"):
            plan(source, "hf", tp=(0, 2))
        kept = {n: t for n, t in weights.items() if "mlp" not in n}
        source = write(tmp_path, kind, kept)
        weights = kept
    plans = [plan(source, "hf", tp=(rank, 2)) for rank in range(2)]
    for rank, own in enumerate(plans):
        held = own.apply(weights)
        got = dequantised(held[f"{name}.weight"], held[f"{name}.{leaf}"], [32], kind)
        assert torch.equal(got, torch.cat([p.chunk(2)[rank] for p in whole.split([16, 16, 32])]))
        got = dequantised(held[f"{out}.weight"], held[f"{out}.{leaf}"], [20], kind)
        assert torch.equal(got, columns.chunk(2, dim=1)[rank])
    together = all_ranks(plans)
    back = together.inverse().apply(together.apply(weights))
    assert all(torch.equal(back[n].float(), t.float()) for n, t in weights.items())


def test_one_scale_for_a_tensor_cannot_follow_interleaved_rows(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"in_proj_qkvz\.weight: its members have one scale each"):
        plan(write(tmp_path, "tensor"), "qwen3_next")
    assert plan(write(tmp_path, "channel"), "qwen3_next").targets
    assert plan(write(tmp_path, "block"), "qwen3_next").targets


# --- the role of a tensor, not its number of elements


def test_a_table_of_one_block_is_a_table(tmp_path: Path) -> None:
    specs = {"a.weight": TensorSpec("a.weight", (8, 8), "float8_e4m3fn")}
    specs["a.weight_scale_inv"] = TensorSpec("a.weight_scale_inv", (1, 1), "float32")
    twice = [Transform(TensorSpec("b.weight", (4, 8)), RowMap.identity("a.weight", 8).take(0, 4))]
    with pytest.raises(PlanError, match="share one scale each"):
        with_scales(twice, specs, Scheme("fp8", "block", (8, 8)))
    halves, usages = with_scales(
        [Transform(TensorSpec("b.weight", (8, 8)), RowMap.identity("a.weight", 8))],
        specs,
        Scheme("fp8", "block", (8, 8)),
        {"a": 3},
    )
    assert [t.target.shape for t in halves] == [(8, 8), (1, 1)]
    assert usages == []


def test_one_element_tensors_that_are_no_scales_are_not_repeated() -> None:
    """A_log and a bias of a single head, in a group whose weight is three logical shards."""
    specs = {n: TensorSpec(n, (1,), "float32") for n in ("x.A_log", "x.in_proj_qkv.bias")}
    steps = [Transform(TensorSpec(f"y{i}", (1,)), RowMap.identity(n, 1)) for i, n in enumerate(specs)]
    made, usages = with_scales(steps, specs, Scheme("fp8", "tensor"), {"in_proj_qkv": 3, "x": 3})
    assert (made, usages) == (steps, [])


# --- what does not fit


def test_dtypes_and_scales_that_disagree_are_refused(tmp_path: Path) -> None:
    weights = weights_of("block")
    table = L0 + "linear_attn.in_proj_qkv.weight_scale_inv"
    for change, message in (
        ({table: None}, r"in_proj_qkv\.weight: float8_e4m3fn without a scale"),
        ({table: torch.ones(7, 3)}, "no table of 8x8 blocks"),
        ({table.replace("_scale_inv", "_offset"): torch.ones(1)}, "weight_offset is not known to belong"),
        (
            {table.replace("qkv.weight_scale_inv", "b.weight_scale_inv"): torch.ones(1, 3)},
            r"in_proj_b\.weight: bfloat16, yet with weight_scale_inv",
        ),
    ):
        changed = {n: t for n, t in (weights | change).items() if t is not None}
        with pytest.raises(PlanError, match=message):
            plan(write(tmp_path, "block", changed), "sglang")


def test_nan_in_a_scale_is_found_before_anything_is_written(tmp_path: Path) -> None:
    for kind, name in (("block", "weight_scale_inv"), ("tensor", "input_scale")):
        weights = weights_of(kind)
        name = f"{L0}mlp.up_proj.{name}"
        weights[name] = torch.full_like(weights[name], float("nan"))
        source = write(tmp_path / "source", kind, weights)
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds NaN"):
            convert(source, tmp_path / "there")
        assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("leaf", "strategy"),
    [("scale_inv", "block"), ("scale", "tensor"), ("input_scale", "tensor"), ("activation_scale", "tensor")],
)
def test_nan_in_the_scales_of_a_stack_is_found(leaf: str, strategy: str, narrow: Any, tmp_path: Path) -> None:
    """A stack has no leaf of its own: its scales are called by its name."""
    quantization: dict[str, Any] = {"quant_method": "fp8"}
    if strategy == "block":
        quantization["weight_block_size"] = [8, 8]
    weights, name = narrow.state("moe"), f"model.layers.0.mlp.experts.gate_up_proj_{leaf}"
    for stack in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, rows, width = weights[stack].shape
        weights[stack] = weights[stack].to(torch.float8_e4m3fn)
        if strategy == "block":
            weights[stack + "_scale_inv"] = torch.ones(experts, -(-rows // 8), -(-width // 8))
        else:
            weights[stack + "_scale"] = torch.ones(experts, 1, 1)
            weights[f"{stack}_{leaf}"] = torch.ones(experts, 1, 1)
    weights[name] = weights[name] * float("nan")
    fields = narrow.configs["moe"].to_dict() | {"quantization_config": quantization}
    source = narrow.write(tmp_path / "source", weights, fields)
    message = rf"model\.safetensors: {name} holds NaN"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "there", "per_expert")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(narrow.model("moe"), source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("dtype", "size"), [("F4", 10), ("F6_E2M3", 15), ("F8_E4M3FNUZ", 20)])
def test_a_scale_of_a_dtype_that_torch_lacks_is_refused(dtype: str, size: int, tmp_path: Path) -> None:
    weights, name = weights_of("channel"), f"{L0}mlp.down_proj.weight_scale"
    weights[name] = torch.zeros(size, dtype=torch.uint8)
    source = write(tmp_path / "source", "channel", weights)
    file = source / "model.safetensors"
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    header[name] |= {"dtype": dtype, "shape": [20, 1]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    message = rf"model\.safetensors: {name} has dtype {dtype}, which torch has not"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "there", "fused")
    assert not (tmp_path / "there").exists()
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(AutoModelForCausalLM.from_config(CONFIG), source)


def test_scales_of_channels_of_a_turned_stack_are_refused(tmp_path: Path) -> None:
    """A scale for each row of [E, H, 2I] is one for an input, which no output channel has."""
    stack = "model.layers.0.mlp.experts."
    sizes = {"hidden_size": 16, "moe_intermediate_size": 4, "num_experts": 2, "num_hidden_layers": 1}
    fields = {"model_type": "qwen3_5_moe_text", **sizes, "quantization_config": FIELDS["channel"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for rows in (16, 1):
        weights = {
            stack + "gate_up_proj": torch.randn(2, 16, 8).to(torch.float8_e4m3fn),
            stack + "gate_up_proj_scale": torch.rand(2, rows, 16 // rows),
            stack + "down_proj": torch.randn(2, 4, 16).to(torch.float8_e4m3fn),
            stack + "down_proj_scale": torch.rand(2, 4, 1),
        }
        save_file(weights, tmp_path / "model.safetensors")
        with pytest.raises(PlanError, match=r"experts\.gate_up_proj .*: stored turned"):
            plan(tmp_path, "per_expert")
