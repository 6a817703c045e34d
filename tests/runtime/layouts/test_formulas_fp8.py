"""FP8 in every layout and on every rank: each element times its own scale is what it was in the files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

import fxfuse
from fxfuse.errors import PlanError

B, R, KEYS, HEADS, KV = 8, 3, 4, 4, 2
GDN, ATTENTION, LAYER = "model.layers.0.linear_attn.", "model.layers.1.self_attn.", "model.layers.1."
CONFIG = Qwen3_5TextConfig(
    hidden_size=2 * B,
    intermediate_size=8 * B,
    num_hidden_layers=2,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=HEADS,
    num_key_value_heads=KV,
    head_dim=B,
    linear_num_key_heads=KEYS,
    linear_num_value_heads=KEYS * R,
    linear_key_head_dim=B,
    linear_value_head_dim=B,
    vocab_size=16,
)
LEAF = {"block": "weight_scale_inv", "channel": "weight_scale", "tensor": "weight_scale"}
CHANNEL = {"type": "float", "num_bits": 8, "strategy": "channel"}
FIELDS: dict[str, dict[str, Any]] = {
    "block": {"quant_method": "fp8", "weight_block_size": [B, B]},
    "channel": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": CHANNEL}}},
    "tensor": {"quant_method": "modelopt", "quant_algo": "FP8"},
}


def checkpoint(folder: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A state dict, also in `folder`, and what its quantised weights are worth."""
    torch.manual_seed(0)
    stored: dict[str, torch.Tensor] = {}
    worth: dict[str, torch.Tensor] = {}
    for name, tensor in AutoModelForCausalLM.from_config(CONFIG).state_dict().items():
        stored[name] = tensor.to(torch.bfloat16)
        if not name.endswith(("proj.weight", "in_proj_qkv.weight", "in_proj_z.weight")):
            continue
        rows, width = tensor.shape
        weight = torch.randn(rows, width).to(torch.float8_e4m3fn)
        shape = {"block": (rows // B, width // B), "channel": (rows, 1), "tensor": (1,)}[kind]
        scale = torch.rand(shape) + 0.5
        stored[name] = weight
        stored[name.removesuffix("weight") + LEAF[kind]] = scale
        worth[name] = torch.stack(
            [
                torch.stack([weight[i, j].float() * _scale(scale, kind, i, j) for j in range(width)])
                for i in range(rows)
            ]
        )
    fields = CONFIG.to_dict() | {"quantization_config": FIELDS[kind]}
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    save_file(stored, folder / "model.safetensors")
    return stored, worth


def _scale(scale: torch.Tensor, kind: str, i: int, j: int) -> torch.Tensor:
    return scale[i // B, j // B] if kind == "block" else scale[i, 0] if kind == "channel" else scale[0]


def value(got: dict[str, torch.Tensor], module: str, kind: str, shards: list[int]) -> torch.Tensor:
    """What a merged weight [out, H] is worth; `shards` are the rows of its logical shards."""
    weight, scale = got[f"{module}.weight"].float(), got[f"{module}.{LEAF[kind]}"]
    if kind == "block":
        assert scale.shape == (weight.shape[0] // B, weight.shape[1] // B)
        return weight * scale.repeat_interleave(B, 0).repeat_interleave(B, 1)
    if kind == "channel":
        assert scale.shape == (weight.shape[0], 1)
        return weight * scale
    assert scale.shape == (len(shards),)
    return weight * scale.repeat_interleave(torch.tensor(shards))[:, None]


def rows_of(heads: list[int], start: int = 0) -> list[int]:
    return [start + h * B + i for h in heads for i in range(B)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", FIELDS)
def test_a_rank_of_sglang(kind: str, world: int, tmp_path: Path) -> None:
    """Four ranks share two key-value heads."""
    stored, worth = checkpoint(tmp_path, kind)
    for rank in range(world):
        got = fxfuse.plan(tmp_path, "sglang", tp=(rank, world)).apply(stored)
        keys = range(rank * KEYS // world, (rank + 1) * KEYS // world)
        values = [g * R + j for g in keys for j in range(R)]
        qkv, z = worth[GDN + "in_proj_qkv.weight"], worth[GDN + "in_proj_z.weight"]
        q, k = rows_of([*keys]), rows_of([*keys], KEYS * B)
        v = rows_of(values, 2 * KEYS * B)
        expected = torch.cat([qkv[[*q, *k, *v]], z[rows_of(values)]])
        shards = [len(q), len(k), len(v), len(v)]
        assert torch.equal(value(got, GDN + "in_proj_qkvz", kind, shards), expected)
        out = worth[GDN + "out_proj.weight"][:, rows_of(values)]
        assert torch.equal(value(got, GDN + "out_proj", kind, [out.shape[0]]), out)
        queries = range(rank * HEADS // world, (rank + 1) * HEADS // world)
        kv = [*range(rank * KV // world, (rank + 1) * KV // world)] or [rank // (world // KV)]
        own = [row for h in queries for row in range(2 * B * h, 2 * B * (h + 1))]
        parts = [worth[f"{ATTENTION}{n}_proj.weight"] for n in "qkv"]
        expected = torch.cat([parts[0][own], parts[1][rows_of(kv)], parts[2][rows_of(kv)]])
        shards = [len(own), B * len(kv), B * len(kv)]
        assert torch.equal(value(got, LAYER + "qkv_proj", kind, shards), expected)
        inner = [*range(rank * 8 * B // world, (rank + 1) * 8 * B // world)]
        expected = torch.cat([worth[f"{LAYER}mlp.{n}_proj.weight"][inner] for n in ("gate", "up")])
        assert torch.equal(value(got, LAYER + "mlp.gate_up_proj", kind, [len(inner)] * 2), expected)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["block", "channel"])
def test_a_rank_of_fastdeploy(kind: str, world: int, tmp_path: Path) -> None:
    """The parameter is stored [H, out], and a table of blocks with it; channels stay a column."""
    stored, worth = checkpoint(tmp_path, kind)
    q, k, v = (worth[f"{ATTENTION}{n}_proj.weight"] for n in "qkv")
    for rank in range(world):
        got = fxfuse.plan(tmp_path, "fastdeploy", tp=(rank, world)).apply(stored)
        queries = range(rank * HEADS // world, (rank + 1) * HEADS // world)
        kv = rows_of([*range(rank * KV // world, (rank + 1) * KV // world)] or [rank // (world // KV)])
        query, gate = (
            [row for h in queries for row in range(2 * B * h + half * B, 2 * B * h + half * B + B)]
            for half in (0, 1)
        )
        expected = torch.cat([q[query], k[kv], v[kv], q[gate]])
        name = f"{ATTENTION}qkv_gate_proj"
        turned = {
            f"{name}.weight": got[f"{name}.weight"].t(),
            f"{name}.{LEAF[kind]}": got[f"{name}.{LEAF[kind]}"],
        }
        if kind == "block":
            turned[f"{name}.{LEAF[kind]}"] = turned[f"{name}.{LEAF[kind]}"].t()
        assert torch.equal(value(turned, name, kind, []), expected)


@pytest.mark.parametrize("kind", ["block", "channel"])
def test_groups_of_qwen3_next(kind: str, tmp_path: Path) -> None:
    stored, worth = checkpoint(tmp_path, kind)
    got = fxfuse.plan(tmp_path, "qwen3_next").apply(stored)
    qkv, z = worth[GDN + "in_proj_qkv.weight"], worth[GDN + "in_proj_z.weight"]
    expected = []
    for g in range(KEYS):
        values = [g * R + j for j in range(R)]
        expected += [qkv[rows_of([g])], qkv[rows_of([g], KEYS * B)], qkv[rows_of(values, 2 * KEYS * B)]]
        expected += [z[rows_of(values)]]
    assert torch.equal(value(got, GDN + "in_proj_qkvz", kind, []), torch.cat(expected))


def test_one_scale_for_two_tensors_that_are_interleaved_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "tensor")
    for layout in ("qwen3_next", "fastdeploy"):
        with pytest.raises(PlanError, match="its members have one scale each as a whole"):
            fxfuse.plan(tmp_path, layout)
