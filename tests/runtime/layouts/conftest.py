"""Tensors of one Gated DeltaNet layer and one attention layer, dense or with experts, at any head ratio."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxfuse.passes.weights import TensorSpec, WeightPlan
from fxfuse.runtime.families import family_of
from fxfuse.runtime.layouts.decoder import Decoder
from fxfuse.runtime.layouts.geometry import geometry_of

HIDDEN, INNER, EXPERTS = 10, 8, 3
GDN, ATTENTION = "model.layers.0.linear_attn.", "model.layers.3.self_attn."


def config(r: int = 2, key_heads: int = 4, heads: int = 8, kv_heads: int = 2) -> SimpleNamespace:
    """As config.json has it; head widths are small and all different."""
    return SimpleNamespace(
        model_type="qwen3_5_text",
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=6,
        linear_num_key_heads=key_heads,
        linear_num_value_heads=key_heads * r,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        hidden_size=HIDDEN,
    )


def weights(c: SimpleNamespace) -> dict[str, torch.Tensor]:
    """Every element is its own number, so that no two rows are equal."""
    keys, values = c.linear_num_key_heads * 3, c.linear_num_value_heads * 5
    shapes = {
        GDN + "in_proj_qkv.weight": (2 * keys + values, HIDDEN),
        GDN + "in_proj_z.weight": (values, HIDDEN),
        GDN + "in_proj_b.weight": (c.linear_num_value_heads, HIDDEN),
        GDN + "in_proj_a.weight": (c.linear_num_value_heads, HIDDEN),
        GDN + "conv1d.weight": (2 * keys + values, 1, 4),
        GDN + "A_log": (c.linear_num_value_heads,),
        GDN + "dt_bias": (c.linear_num_value_heads,),
        GDN + "norm.weight": (5,),
        GDN + "out_proj.weight": (HIDDEN, values),
        "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
        "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
        ATTENTION + "q_proj.weight": (2 * c.num_attention_heads * 6, HIDDEN),
        ATTENTION + "k_proj.weight": (c.num_key_value_heads * 6, HIDDEN),
        ATTENTION + "v_proj.weight": (c.num_key_value_heads * 6, HIDDEN),
        ATTENTION + "o_proj.weight": (HIDDEN, c.num_attention_heads * 6),
        ATTENTION + "q_norm.weight": (6,),
        ATTENTION + "k_norm.weight": (6,),
        "model.layers.3.mlp.gate.weight": (EXPERTS, HIDDEN),
        "model.layers.3.mlp.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
        "model.layers.3.mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
        "model.layers.3.mlp.shared_expert.gate_proj.weight": (INNER, HIDDEN),
        "model.layers.3.mlp.shared_expert.up_proj.weight": (INNER, HIDDEN),
        "model.layers.3.mlp.shared_expert.down_proj.weight": (HIDDEN, INNER),
        "model.layers.3.mlp.shared_expert_gate.weight": (1, HIDDEN),
        "mtp.layers.0.self_attn.k_proj.weight": (c.num_key_value_heads * 6, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    at, made = 0, {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        made[name] = torch.arange(at, at + size, dtype=torch.float64).view(shape)
        at += size
    return made


def _specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()}


def _decoder(tensors: dict[str, torch.Tensor], c: SimpleNamespace, world: int = 1) -> Decoder:
    return Decoder(family_of(c.model_type), geometry_of(c).per_rank(world), _specs(tensors))


@pytest.fixture
def make() -> SimpleNamespace:
    return SimpleNamespace(config=config, weights=weights, specs=_specs, decoder=_decoder)


@pytest.fixture
def equal_and_back() -> Callable[..., Any]:
    """Applies a plan, compares the whole state dict with the expected one, and comes back by the inverse."""

    def check(
        plan: WeightPlan, given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], back: bool = True
    ) -> dict[str, torch.Tensor]:
        got = plan.apply(given)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor), name
        if back:
            returned = WeightPlan.from_json(plan.inverse().to_json()).apply(got)
            assert returned.keys() == given.keys()
            assert all(torch.equal(returned[name], tensor) for name, tensor in given.items())
        return got

    return check
