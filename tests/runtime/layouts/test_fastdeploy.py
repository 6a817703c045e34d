"""FastDeploy's attention parameter, against its loader's formula, shard by shard into an empty parameter."""

import itertools
from typing import Any

import pytest
import torch

from fxfuse.errors import PlanError
from fxfuse.passes.weights import Draft, TensorSpec, WeightPlan
from fxfuse.runtime.layouts.fastdeploy import PARAMETER, SHARDS, merged, to_fastdeploy
from fxfuse.runtime.layouts.geometry import geometry_of

D = 6


def pieces(weights: dict[str, torch.Tensor], c: Any) -> dict[str, torch.Tensor]:
    """Every shard that the layer's loader knows, as [out, H]."""
    own = {n: weights[f"model.layers.3.self_attn.{n}_proj.weight"] for n in "qkv"}
    by_head = own["q"].view(c.num_attention_heads, 2, D, -1)
    q, gate = by_head[:, 0].flatten(0, 1), by_head[:, 1].flatten(0, 1)
    return {
        "split_q_gate": own["q"],
        "q": q,
        "k": own["k"],
        "v": own["v"],
        "gate": gate,
        "qkv": torch.cat([q, own["k"], own["v"]]),
    }


def parameter(weights: dict[str, torch.Tensor], c: Any, rank: int, world: int) -> torch.Tensor:
    """[q nh_t·D | k | v | gate nh_t·D] as [out, H]; key-value heads from rank // replicas."""
    shard = pieces(weights, c)
    nkv = c.num_key_value_heads
    q, gate = (shard[n].chunk(world)[rank] for n in ("q", "gate"))
    if world > nkv:
        k, v = (shard[n].view(nkv, D, -1)[rank // (world // nkv)] for n in "kv")
    else:
        k, v = (shard[n].chunk(world)[rank] for n in "kv")
    return torch.cat([q, k, v, gate])


WAYS = [("split_q_gate", "k", "v"), ("q", "gate", "k", "v"), ("qkv", "gate")]
ORDERS = [order for way in WAYS for order in itertools.permutations(way)]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_order_of_shards_gives_the_parameter_of_each_rank(world: int, make: Any) -> None:
    """Two key-value heads: from four ranks on they are replicated."""
    c = make.config(key_heads=8)
    weights = make.weights(c)
    shards = pieces(weights, c)
    for rank, order, stored_transposed in itertools.product(range(world), ORDERS, (True, False)):
        specs = {s: TensorSpec(s, tuple(shards[s].shape)) for s in order}
        transform = merged("p", specs, geometry_of(c), tp=(rank, world), stored_transposed=stored_transposed)
        expected = parameter(weights, c, rank, world)
        got = _applied(transform, {s: shards[s] for s in order})
        assert torch.equal(got, expected.t() if stored_transposed else expected)
        assert got.is_contiguous()


@pytest.mark.parametrize("turned", [(), ("k",), ("split_q_gate", "v"), ("split_q_gate", "k", "v")])
@pytest.mark.parametrize("stored_transposed", [True, False])
def test_each_shard_is_turned_by_its_own_layout_alone(
    turned: tuple[str, ...], stored_transposed: bool, make: Any
) -> None:
    c = make.config()
    weights = make.weights(c)
    for order in itertools.permutations(("split_q_gate", "k", "v")):
        shards = {s: t.t().contiguous() if s in turned else t for s, t in pieces(weights, c).items()}
        specs = {s: TensorSpec(s, tuple(shards[s].shape)) for s in order}
        transform = merged(
            "p",
            specs,
            geometry_of(c),
            tp=(1, 2),
            stored_transposed=stored_transposed,
            shards_transposed=turned,
        )
        expected = parameter(weights, c, 1, 2)
        got = _applied(transform, {s: shards[s] for s in order})
        assert torch.equal(got, expected.t() if stored_transposed else expected)


def _applied(transform: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    from fxfuse.passes.weights.transform import filled_target

    return filled_target(transform, tensors)


def test_the_layout_of_a_layer_goes_there_and_back(make: Any, equal_and_back: Any) -> None:
    c = make.config(3)
    weights = make.weights(c)
    plan: WeightPlan = Draft(make.specs(weights)).then(to_fastdeploy(make.decoder(weights, c))).plan()
    gone = [f"model.layers.3.self_attn.{n}_proj.weight" for n in "qkv"]
    expected = {name: t for name, t in weights.items() if name not in gone}
    expected["model.layers.3." + PARAMETER] = parameter(weights, c, 0, 1).t()
    equal_and_back(plan, weights, expected)


def test_an_unknown_shard_lists_the_six(make: Any) -> None:
    geometry = geometry_of(make.config())
    with pytest.raises(PlanError, match="shard 'o' is not known; known are: " + ", ".join(SHARDS)):
        merged("p", {"o": TensorSpec("o", (8, 8))}, geometry)
    assert len(SHARDS) == 6


def test_missing_and_doubled_parts_and_wrong_sizes_are_refused(make: Any) -> None:
    c = make.config()
    geometry = geometry_of(c)
    specs = {s: TensorSpec(s, tuple(t.shape)) for s, t in pieces(make.weights(c), c).items()}
    with pytest.raises(PlanError, match="no shard gives v, gate"):
        merged("p", {s: specs[s] for s in "qk"}, geometry)
    with pytest.raises(PlanError, match="q comes twice, the second time with shard 'split_q_gate'"):
        merged("p", {s: specs[s] for s in ("q", "split_q_gate", "k", "v")}, geometry)
    with pytest.raises(PlanError, match="shard 'k' has 12 rows by the config, not 13"):
        merged("p", {s: specs[s] for s in ("split_q_gate", "v")} | {"k": TensorSpec("k", (13, 10))}, geometry)
    with pytest.raises(PlanError, match=r"inputs of different sizes, \[10, 11\]"):
        merged("p", {s: specs[s] for s in ("split_q_gate", "v")} | {"k": TensorSpec("k", (12, 11))}, geometry)
    with pytest.raises(PlanError, match="8 attention heads do not divide over 3 ranks"):
        merged("p", specs, geometry, tp=(0, 3))
