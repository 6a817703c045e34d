"""Every row of every parameter, by the index that the programs' formulas give it, through `fxfuse.plan`.

Nothing here knows of row maps, chunks or shards: a row is named by its head and its place in it.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3NextConfig

import fxfuse

KEY, VALUE, HEAD, HIDDEN, INNER = 3, 5, 6, 10, 16
KEYS, HEADS, KV = 8, 8, 2
GDN, ATTENTION, LAYER = "model.layers.0.linear_attn.", "model.layers.3.self_attn.", "model.layers.3."
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD,
    "linear_num_key_heads": KEYS,
    "linear_key_head_dim": KEY,
    "linear_value_head_dim": VALUE,
    "vocab_size": 12,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}

# every ratio on one rank and on two; more ranks than key-value heads at the ratio that is no power of two
CASES = [(r, world) for r in (1, 2, 3, 4, 8) for world in (1, 2)] + [(3, 4), (3, 8)]
EVERY_CASE = pytest.mark.parametrize(("r", "world"), CASES)


def numbered(config: Any) -> dict[str, torch.Tensor]:
    """A state dict in which every element is its own number."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    at, made = 0, {}
    for name, shape in shapes.items():
        made[name] = torch.arange(at, at + shape.numel(), dtype=torch.float64).view(shape)
        at += shape.numel()
    return made


class Rank:
    """What one rank's heads are, and the rows of a tensor of heads that are theirs."""

    def __init__(self, rank: int, world: int, r: int) -> None:
        def share(heads: int) -> list[int]:
            return [h for h in range(heads) if h * world // heads == rank]

        self.keys, self.values, self.queries = share(KEYS), share(KEYS * r), share(HEADS)
        self.kv = share(KV) if world <= KV else [rank // (world // KV)]
        self.inner = share(INNER)
        self.r = r

    def qkv(self) -> list[int]:
        """Rows of in_proj_qkv and of the convolution: all q, all k, all v."""
        key_rows = [h * KEY + i for h in self.keys for i in range(KEY)]
        value_rows = [h * VALUE + i for h in self.values for i in range(VALUE)]
        return [
            *key_rows,
            *(KEYS * KEY + row for row in key_rows),
            *(2 * KEYS * KEY + row for row in value_rows),
        ]

    def z(self) -> list[int]:
        return [h * VALUE + i for h in self.values for i in range(VALUE)]

    def query(self, gate: bool | None = None) -> list[int]:
        """Rows of q_proj: of each head the query and then the gate; one of the two if asked."""
        halves = (False, True) if gate is None else (gate,)
        return [h * 2 * HEAD + half * HEAD + i for h in self.queries for half in halves for i in range(HEAD)]

    def key_value(self) -> list[int]:
        return [h * HEAD + i for h in self.kv for i in range(HEAD)]


def rows(*parts: tuple[torch.Tensor, Iterable[int]]) -> torch.Tensor:
    return torch.stack([tensor[row] for tensor, indices in parts for row in indices])


def columns(tensor: torch.Tensor, indices: Iterable[int]) -> torch.Tensor:
    return torch.stack([tensor[:, column] for column in indices], dim=1)


Formula = Callable[[dict[str, torch.Tensor], Rank], dict[str, torch.Tensor]]


def of_every_layout(s: dict[str, torch.Tensor], own: Rank) -> dict[str, torch.Tensor]:
    """What a rank holds of tensors that no layout merges."""
    return {
        GDN + "conv1d.weight": rows((s[GDN + "conv1d.weight"], own.qkv())),
        GDN + "A_log": s[GDN + "A_log"][own.values],
        GDN + "dt_bias": s[GDN + "dt_bias"][own.values],
        GDN + "norm.weight": s[GDN + "norm.weight"],
        GDN + "out_proj.weight": columns(s[GDN + "out_proj.weight"], own.z()),
        LAYER + "mlp.down_proj.weight": columns(s[LAYER + "mlp.down_proj.weight"], own.inner),
        "lm_head.weight": s["lm_head.weight"],
    }


def sglang(s: dict[str, torch.Tensor], own: Rank) -> dict[str, torch.Tensor]:
    q, k, v, o = (s[f"{ATTENTION}{n}_proj.weight"] for n in "qkvo")
    gate, up = (s[f"{LAYER}mlp.{n}_proj.weight"] for n in ("gate", "up"))
    heads = [h * HEAD + i for h in own.queries for i in range(HEAD)]
    return {
        GDN + "in_proj_qkvz.weight": rows(
            (s[GDN + "in_proj_qkv.weight"], own.qkv()), (s[GDN + "in_proj_z.weight"], own.z())
        ),
        GDN + "in_proj_ba.weight": rows(
            (s[GDN + "in_proj_b.weight"], own.values), (s[GDN + "in_proj_a.weight"], own.values)
        ),
        LAYER + "qkv_proj.weight": rows((q, own.query()), (k, own.key_value()), (v, own.key_value())),
        LAYER + "o_proj.weight": columns(o, heads),
        LAYER + "q_norm.weight": s[ATTENTION + "q_norm.weight"],
        LAYER + "mlp.gate_up_proj.weight": rows((gate, own.inner), (up, own.inner)),
    }


def fastdeploy(s: dict[str, torch.Tensor], own: Rank) -> dict[str, torch.Tensor]:
    q, k, v = (s[f"{ATTENTION}{n}_proj.weight"] for n in "qkv")
    parts = (q, own.query(gate=False)), (k, own.key_value()), (v, own.key_value()), (q, own.query(gate=True))
    return {ATTENTION + "qkv_gate_proj.weight": rows(*parts).t()}


def qwen3_next(s: dict[str, torch.Tensor], own: Rank) -> dict[str, torch.Tensor]:
    qkv, z, b, a = (s[f"{GDN}in_proj_{n}.weight"] for n in ("qkv", "z", "b", "a"))
    qkvz, ba = [], []
    for g in own.keys:
        values = [(g * own.r + j) * VALUE + i for j in range(own.r) for i in range(VALUE)]
        qkvz += [qkv[g * KEY + i] for i in range(KEY)]
        qkvz += [qkv[KEYS * KEY + g * KEY + i] for i in range(KEY)]
        qkvz += [qkv[2 * KEYS * KEY + row] for row in values]
        qkvz += [z[row] for row in values]
        ba += [b[g * own.r + j] for j in range(own.r)]
        ba += [a[g * own.r + j] for j in range(own.r)]
    return {GDN + "in_proj_qkvz.weight": torch.stack(qkvz), GDN + "in_proj_ba.weight": torch.stack(ba)}


def fused(s: dict[str, torch.Tensor], own: Rank) -> dict[str, torch.Tensor]:
    merged = sglang(s, own)
    qkvz, ba = (merged[f"{GDN}in_proj_{n}.weight"] for n in ("qkvz", "ba"))
    return {
        GDN + "in_proj_qkv_z_b_a.weight": torch.cat([qkvz, ba]),
        ATTENTION + "q_k_v_proj.weight": merged[LAYER + "qkv_proj.weight"],
        LAYER + "mlp.gate_up_proj.weight": merged[LAYER + "mlp.gate_up_proj.weight"],
    }


@EVERY_CASE
@pytest.mark.parametrize("layout", [sglang, fastdeploy, qwen3_next, fused], ids=lambda f: f.__name__)
def test_every_row_is_where_the_formula_puts_it(layout: Formula, r: int, world: int) -> None:
    config = Qwen3_5TextConfig(**SIZES, linear_num_value_heads=KEYS * r)
    weights = numbered(config)
    for rank in range(world):
        tp = None if world == 1 else (rank, world)
        got = fxfuse.plan(config, layout.__name__, tp=tp).apply(weights)
        own = Rank(rank, world, r)
        for name, expected in (of_every_layout(weights, own) | layout(weights, own)).items():
            assert torch.equal(got[name], expected), (name, rank)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_biases_stand_in_the_order_of_their_rows(world: int) -> None:
    config = Qwen3_5TextConfig(**SIZES, linear_num_value_heads=KEYS, attention_bias=True)
    weights = numbered(config)
    q, k, v = (weights[f"{ATTENTION}{n}_proj.bias"] for n in "qkv")
    for rank in range(world):
        own = Rank(rank, world, 1)
        tp = (rank, world)
        keys = k[own.key_value()], v[own.key_value()]
        got = {
            layout: fxfuse.plan(config, layout, tp=tp).apply(weights) for layout in ("sglang", "fastdeploy")
        }
        expected = torch.cat([q[own.query()], *keys])
        assert torch.equal(got["sglang"][LAYER + "qkv_proj.bias"], expected)
        expected = torch.cat([q[own.query(gate=False)], *keys, q[own.query(gate=True)]])
        assert torch.equal(got["fastdeploy"][ATTENTION + "qkv_gate_proj.bias"], expected)
        # the sum over ranks adds it once, so every rank has it whole
        assert torch.equal(got["sglang"][LAYER + "o_proj.bias"], weights[ATTENTION + "o_proj.bias"])
        assert not [name for name in got["fastdeploy"] if name.endswith(("q_proj.bias", "v_proj.bias"))]


@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_the_rows_of_qwen3_next_are_parted_again(r: int) -> None:
    config = Qwen3NextConfig(**SIZES, **EXPERTS, linear_num_value_heads=KEYS * r)
    weights = numbered(config)
    got = fxfuse.plan(config, "qwen3_5").apply(weights)
    own = Rank(0, 1, r)
    flat = {f"{GDN}in_proj_{n}.weight": got[f"{GDN}in_proj_{n}.weight"] for n in ("qkv", "z", "b", "a")}
    for name, expected in qwen3_next(flat, own).items():
        assert torch.equal(weights[name], expected)
    assert not {f"{GDN}in_proj_qkvz.weight", f"{GDN}in_proj_ba.weight"} & got.keys()


def test_what_has_one_element_is_treated_by_what_it_is(tmp_path: Path) -> None:
    """A single head: A_log, dt_bias and block tables of one element each, none of them a per-tensor scale."""
    sizes = {"linear_num_key_heads": 1, "linear_key_head_dim": 32, "linear_value_head_dim": 64}
    config = Qwen3_5TextConfig(**SIZES | sizes, linear_num_value_heads=1)
    given = {}
    for name, tensor in numbered(config).items():
        if name.startswith(GDN):
            given[name] = tensor.float()
            if name.endswith(("in_proj_qkv.weight", "in_proj_z.weight", "out_proj.weight")):
                given[name] = tensor.remainder(7).to(torch.float8_e4m3fn)
                given[name + "_scale_inv"] = torch.full((1, 1), 1.0 + len(given))
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    fields = config.to_dict() | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(fields, default=str))
    save_file(given, tmp_path / "model.safetensors")
    got = fxfuse.plan(tmp_path, "sglang").apply(given)
    for name in ("A_log", "dt_bias", "out_proj.weight_scale_inv"):
        assert torch.equal(got[GDN + name], given[GDN + name])
    assert given[GDN + "A_log"].shape == given[GDN + "dt_bias"].shape == (1,)
    parts = [given[f"{GDN}in_proj_{n}.weight"] for n in ("b", "a")]
    assert torch.equal(got[GDN + "in_proj_ba.weight"], torch.cat(parts))
    # 128 rows of q, k and v are one block, those of z another
    tables = [given[f"{GDN}in_proj_{n}.weight_scale_inv"] for n in ("qkv", "z")]
    assert torch.equal(got[GDN + "in_proj_qkvz.weight_scale_inv"], torch.cat(tables))
