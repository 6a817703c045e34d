"""One change to a graph that matches: rewriting it still changes no bit, or does not take place."""

import contextlib
import random

import pytest
import torch
import torch.nn.functional as F
import traced_mutants
from equality import difference
from near_misses import ALL, LEFT_ALONE, MUTANTS_EACH, road_of, run
from spelled_blocks import SHIPPED, spelled
from torch.fx import GraphModule, symbolic_trace

from fxfuse import rewrite
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.mutants import CHANGES, near_miss


def test_without_passes_no_mutant_is_matched() -> None:
    assert run(range(1, 9), passes=()).still_matched == 0
    assert run(range(1, 9), passes=ALL).still_matched > 0


def test_every_block_has_near_misses() -> None:
    tally = run(range(3, 3 + len(SHIPPED) * MUTANTS_EACH, MUTANTS_EACH))
    assert tally.wrong == [] == tally.undone, "\n".join([*tally.wrong, *tally.undone])
    assert set(tally.blocks) == set(SHIPPED)
    assert (
        tally.still_matched > tally.graphs // 4
    )  # most changes are beside the point: the pass has to see that


@pytest.mark.parametrize("kind", CHANGES)
def test_every_change_can_be_drawn(kind: str) -> None:
    """Of a graph as written and of one that was traced."""
    blocks, drawn = list(BLOCKS.values()), set()
    for seed in range(100):
        rng = random.Random(seed)
        module, inputs, _, _ = spelled(blocks[seed % len(blocks)], seed)
        with contextlib.suppress(ValueError):
            drawn.add(near_miss(module, inputs, rng, [kind]).kind)
            traced = traced_mutants.of(module, inputs)
            drawn.add("traced " + traced_mutants.mutant_of(traced, rng, [kind], copy_weights=False).kind)
            break
    assert drawn == {kind, f"traced {kind}"}


def test_a_mutant_leaves_the_original_alone() -> None:
    module, inputs, _, _ = spelled(BLOCKS["projections"], 3)
    before, code = [y.clone() for y in module(*inputs)], module.code
    for seed in range(20):
        near_miss(module, inputs, random.Random(seed))
    assert module.code == code
    assert all(map(torch.equal, before, module(*inputs)))


def test_attention_with_more_values_than_keys_is_no_graph_to_judge_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def longer(module: GraphModule, values: object, rng: random.Random) -> str:
        (attention,) = module.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention)
        with module.graph.inserting_before(attention):
            twice = module.graph.call_function(torch.cat, ([attention.args[2]] * 2, 2))
        attention.args = (*attention.args[:2], twice)
        return "twice the values"

    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(CHANGES, "longer", longer)
    with pytest.raises(ValueError, match="no change was found"):
        near_miss(symbolic_trace(Attention()), list(torch.randn(3, 1, 2, 5, 4)), random.Random(0), ["longer"])


def test_a_mutant_that_does_not_run_leaves_no_autocast_behind() -> None:
    """Half of the draws of this kind mix dtypes, and raise before they leave it."""
    for seed in range(20):
        module, inputs, _, _ = spelled(BLOCKS["decoded_token"], seed)
        with contextlib.suppress(ValueError):
            near_miss(module, inputs, random.Random(seed), ["an autocast region"])
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_graph_whose_tensors_are_turned_in_place_is_left_alone(name: str) -> None:
    for seed in range(2):
        module, inputs, _, _ = spelled(BLOCKS[name], seed)
        mutant = near_miss(module, inputs, random.Random(seed), [LEFT_ALONE])
        rewritten = rewrite(mutant.module, inputs, passes=ALL, dynamic=False)
        assert rewritten.report.matched == 0
        assert difference(mutant.module, rewritten.graph_module, inputs, exact=True) is None


# With those through Dynamo, which have a file of their own, two thousand: all blocks, inputs laid out in
# every way.
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(10_000, 12_000, 250))
def test_two_thousand_near_misses_stay_right(first: int) -> None:
    tally = run([seed for seed in range(first, first + 250) if road_of(seed) != "dynamo"])
    assert tally.wrong == [] == tally.undone, "\n".join([*tally.wrong, *tally.undone])
    assert tally.graphs == 225, tally.undrawn
    assert tally.still_matched > tally.graphs // 4
