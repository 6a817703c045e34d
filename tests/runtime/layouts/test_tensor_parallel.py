"""What each rank holds, against chunks written by hand, and all ranks together against the whole."""

from typing import Any

import pytest
import torch

from fxfuse.errors import PlanError
from fxfuse.passes.weights import Draft, WeightPlan, all_ranks
from fxfuse.runtime.layouts.tensor_parallel import shards

GDN, ATTENTION = "model.layers.0.linear_attn.", "model.layers.3.self_attn."
SPARSE = "model.layers.3.mlp."


def rank_plan(weights: dict[str, torch.Tensor], c: Any, make: Any, rank: int, world: int) -> WeightPlan:
    return Draft(make.specs(weights)).then(*shards(make.decoder(weights, c), rank, world)).plan()


def held(weights: dict[str, torch.Tensor], c: Any, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Every tensor's part, one expression each."""
    keys, values = c.linear_num_key_heads * 3, c.linear_num_value_heads * 5

    def segments(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.chunk(world)[rank] for part in t.split([keys, keys, values])])

    nkv = c.num_key_value_heads
    result = dict(weights)
    for name in ("in_proj_qkv.weight", "conv1d.weight"):
        result[GDN + name] = segments(weights[GDN + name])
    for name in ("in_proj_z.weight", "in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"):
        result[GDN + name] = weights[GDN + name].chunk(world)[rank]
    for name in ("k", "v"):
        heads = weights[f"{ATTENTION}{name}_proj.weight"].view(nkv, 6, -1)
        own = heads.chunk(world)[rank] if world <= nkv else heads[rank // (world // nkv)][None]
        result[f"{ATTENTION}{name}_proj.weight"] = own.flatten(0, 1)
    by_head = weights[ATTENTION + "q_proj.weight"].view(c.num_attention_heads, 12, -1)
    result[ATTENTION + "q_proj.weight"] = by_head.chunk(world)[rank].flatten(0, 1)
    columns = [GDN + "out_proj.weight", ATTENTION + "o_proj.weight", SPARSE + "experts.down_proj"]
    columns += [f"model.layers.0.mlp.{n}_proj.weight" for n in ("down",)]
    columns += [SPARSE + "shared_expert.down_proj.weight"]
    for name in columns:
        result[name] = weights[name].chunk(world, dim=-1)[rank]
    for path in ("model.layers.0.mlp.", SPARSE + "shared_expert."):
        for name in ("gate", "up"):
            result[f"{path}{name}_proj.weight"] = weights[f"{path}{name}_proj.weight"].chunk(world)[rank]
    gate, up = weights[SPARSE + "experts.gate_up_proj"].chunk(2, dim=1)
    halves = [half.chunk(world, dim=1)[rank] for half in (gate, up)]
    result[SPARSE + "experts.gate_up_proj"] = torch.cat(halves, dim=1)
    return result


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("r", [1, 2, 3, 4, 8])
def test_each_rank_holds_its_part_and_all_put_back_the_whole(
    r: int, world: int, make: Any, equal_and_back: Any
) -> None:
    """Two key-value heads: with four ranks, each is held twice."""
    c = make.config(r)
    weights = make.weights(c)
    plans = [rank_plan(weights, c, make, rank, world) for rank in range(world)]
    for rank, plan in enumerate(plans):
        equal_and_back(plan, weights, held(weights, c, rank, world), back=world == 1)
    if world == 1:
        assert plans == [WeightPlan()]
        return
    together = all_ranks(plans)
    everything = together.apply(weights)
    back = together.inverse().apply(everything)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_a_rank_of_in_proj_qkv_is_no_contiguous_part(make: Any) -> None:
    c = make.config(2)
    weights = make.weights(c)
    (transform,) = [
        t
        for t in rank_plan(weights, c, make, 0, 2).transforms
        if t.target.name.endswith("in_proj_qkv.weight")
    ]
    assert [(s.start, s.stop) for s in transform.rows.segments] == [(0, 6), (12, 18), (24, 44)]


def test_turned_experts_and_single_ones_are_sliced_alike(make: Any) -> None:
    c = make.config()
    straight = {n: t for n, t in make.weights(c).items() if ".experts." in n}
    turned = {n: t.transpose(1, 2).contiguous() for n, t in straight.items()}
    single = {}
    for e in range(3):
        gate, up = straight[SPARSE + "experts.gate_up_proj"][e].chunk(2)
        single[f"{SPARSE}experts.{e}.gate_proj.weight"] = gate.contiguous()
        single[f"{SPARSE}experts.{e}.up_proj.weight"] = up.contiguous()
        single[f"{SPARSE}experts.{e}.down_proj.weight"] = straight[SPARSE + "experts.down_proj"][e]
    for rank in range(2):
        own = rank_plan(straight, c, make, rank, 2).apply(straight)
        also = rank_plan(turned, c, make, rank, 2).apply(turned)
        assert all(torch.equal(also[n], own[n].transpose(1, 2)) for n in own)
        one = rank_plan(single, c, make, rank, 2).apply(single)
        for e in range(3):
            parts = [one[f"{SPARSE}experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")]
            assert torch.equal(torch.cat(parts[:2]), own[SPARSE + "experts.gate_up_proj"][e])
            assert torch.equal(parts[2], own[SPARSE + "experts.down_proj"][e])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 9, "kv_heads": 3}, "9 attention heads do not divide over 2 ranks"),
        ({"key_heads": 3}, "3 linear-attention key heads do not divide over 2 ranks"),
        ({"heads": 6, "kv_heads": 3}, "3 key-value heads neither divide over 2 ranks nor repeat evenly"),
    ],
)
def test_heads_that_do_not_divide_are_refused(sizes: dict[str, int], message: str, make: Any) -> None:
    c = make.config(**sizes)
    weights = make.weights(c)
    with pytest.raises(PlanError, match=message):
        rank_plan(weights, c, make, 0, 2)


def test_rows_and_columns_that_do_not_divide_are_refused(make: Any) -> None:
    c = make.config()
    weights = make.weights(c)
    for shape, what in (((7, 10), "7 rows"), ((10, 7), "7 columns")):
        name = "model.layers.0.mlp." + ("gate" if shape[0] == 7 else "down") + "_proj.weight"
        with pytest.raises(PlanError, match=rf"{name} .*: {what} do not divide over 2 ranks"):
            rank_plan(weights | {name: torch.zeros(shape)}, c, make, 0, 2)


def test_ranks_of_different_sources_or_not_all_are_refused(make: Any) -> None:
    c = make.config()
    weights = make.weights(c)
    first = rank_plan(weights, c, make, 0, 2)
    with pytest.raises(PlanError, match="are used by no transform"):
        all_ranks([first])
    other = rank_plan({n: t.float() for n, t in weights.items()}, c, make, 1, 2)
    with pytest.raises(PlanError, match="made from the same tensors"):
        all_ranks([first, other])
