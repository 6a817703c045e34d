"""SGLang's parameters, against its loader's rules written out: shards by id, in order."""

from typing import Any

import pytest
import torch

from fxfuse.errors import PlanError
from fxfuse.passes.weights import Draft
from fxfuse.runtime.layouts.sglang import to_sglang
from fxfuse.runtime.layouts.tensor_parallel import shards

RULES = [  # where a checkpoint's name goes, and as which shard
    ("q_proj", "qkv_proj", "q"),
    ("k_proj", "qkv_proj", "k"),
    ("v_proj", "qkv_proj", "v"),
    ("gate_proj", "gate_up_proj", 0),
    ("up_proj", "gate_up_proj", 1),
    ("in_proj_qkv.", "in_proj_qkvz.", (0, 1, 2)),
    ("in_proj_z.", "in_proj_qkvz.", 3),
    ("in_proj_b.", "in_proj_ba.", 0),
    ("in_proj_a.", "in_proj_ba.", 1),
]


def loaded(
    weights: dict[str, torch.Tensor], c: Any, rank: int = 0, world: int = 1
) -> dict[str, torch.Tensor]:
    """What one rank's parameters hold after loading the checkpoint tensor by tensor, experts left out."""
    keys, values = c.linear_num_key_heads * 3, c.linear_num_value_heads * 5
    sizes = {"in_proj_qkvz": [keys, keys, values, values], "in_proj_ba": [c.linear_num_value_heads] * 2}
    held: dict[str, dict[Any, torch.Tensor]] = {}
    for name, tensor in weights.items():
        if name.startswith("mtp"):
            held[name] = {0: tensor}
            continue
        name = name.replace(".self_attn", "")
        own = {0: tensor}
        for old, new, shard in RULES:
            if "mlp.experts" in name or old not in name:
                continue
            name = name.replace(old, new)
            own = {shard: tensor}
            if isinstance(shard, tuple):
                parts = tensor.split([sizes["in_proj_qkvz"][i] for i in shard])
                own = dict(zip(shard, parts, strict=True))
            break
        if name.endswith("conv1d.weight"):
            own = dict(enumerate(tensor.split([keys, keys, values])))
        held.setdefault(name, {}).update(own)
    result = {}
    for name, parts in held.items():
        order = sorted(parts, key=lambda shard: "qkv".find(shard) if isinstance(shard, str) else shard)
        result[name] = torch.cat([_slice(name, s, parts[s], c, rank, world) for s in order])
    return result


def _slice(name: str, shard: Any, tensor: torch.Tensor, c: Any, rank: int, world: int) -> torch.Tensor:
    if name.startswith("mtp") or "experts." in name or "norm" in name or "mlp.gate." in name:
        return tensor
    if "shared_expert_gate" in name:
        return tensor
    if "o_proj" in name or "out_proj" in name or "down_proj" in name:
        return tensor.chunk(world, dim=1)[rank]
    if shard in ("k", "v") and world > c.num_key_value_heads:
        return tensor.view(c.num_key_value_heads, 6, -1)[rank // (world // c.num_key_value_heads)]
    return tensor.chunk(world)[rank]


@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_the_parameters_are_what_the_loader_fills(r: int, make: Any, equal_and_back: Any) -> None:
    c = make.config(r)
    weights = make.weights(c)
    plan = Draft(make.specs(weights)).then(to_sglang(make.decoder(weights, c))).plan()
    equal_and_back(plan, weights, loaded(weights, c))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("r", [1, 3])
def test_each_rank_holds_what_its_loader_fills(r: int, world: int, make: Any, equal_and_back: Any) -> None:
    """Two key-value heads: at four ranks they are replicated."""
    c = make.config(r)
    weights = {name: t for name, t in make.weights(c).items() if ".experts." not in name}
    for rank in range(world):
        draft = Draft(make.specs(weights)).then(*shards(make.decoder(weights, c), rank, world))
        local = make.decoder(weights, c, world)
        local = type(local)(local.family, local.geometry, draft.tensors)
        plan = draft.then(to_sglang(local)).plan()
        equal_and_back(plan, weights, loaded(weights, c, rank, world), back=world == 1)


def test_what_is_fused_already_stays(make: Any) -> None:
    c = make.config()
    weights = make.weights(c)
    once = Draft(make.specs(weights)).then(to_sglang(make.decoder(weights, c))).plan().apply(weights)
    assert to_sglang(make.decoder(once, c)) == []


def test_a_missing_shard_is_named(make: Any) -> None:
    c = make.config()
    weights = make.weights(c)
    del weights["model.layers.0.linear_attn.in_proj_z.weight"]
    with pytest.raises(PlanError, match=r"in_proj_z\.weight: missing, while other shards of .*in_proj_qkvz"):
        to_sglang(make.decoder(weights, c))
