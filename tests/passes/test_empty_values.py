"""A tensor without elements beside a block, or in it: no pass divides by its size."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from fxfuse import Rewritten
from fxfuse.passes import gdn_decode
from fxfuse.passes.regions import Refused


class Block(nn.Module):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *inputs: Tensor) -> Any:
        return self.compute(*inputs)


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """One token of the gated delta rule."""
    moved = state * g.exp()[..., None, None]
    delta = (v - (moved * k[..., None]).sum(-2)) * beta[..., None]
    moved = moved + k[..., None] * delta[..., None, :]
    state.copy_(moved)
    return (moved * (q * 8**-0.5)[..., None]).sum(-2)


def beside(*given: Tensor) -> list[Tensor]:
    out = step(*given)
    return [out, out.narrow(1, 0, 0) * 2]


def empty_batch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
    """Queries and keys come with the batch in the place of the heads."""
    turned = [x.permute(2, 0, 1, 3) for x in (q, k)]
    return torch.ops.fxfuse.chunk_gated_delta_rule(*turned, v, g, beta, None, True)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v) * 2


def of_an_empty_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attended(q, k.reshape(0, 4, 9, 8), v.reshape(0, 4, 9, 8))


def ones(*shapes: Sequence[int]) -> list[Tensor]:
    return [torch.ones(*shape) for shape in shapes]


PARTS: dict[str, tuple[str, Callable[..., Any], list[Tensor]]] = {
    "a part of the step's result": (
        "recurrent_gated_delta_rule",
        beside,
        ones((2, 4, 8), (2, 4, 8), (2, 4, 6), (2, 4), (2, 4), (2, 4, 8, 6)),
    ),
    "keys without features": (
        "recurrent_gated_delta_rule",
        step,
        ones((2, 4, 0), (2, 4, 0), (2, 4, 6), (2, 4), (2, 4), (2, 4, 0, 6)),
    ),
    "no sequence": (
        "grouped_delta_rule",
        empty_batch,
        ones((5, 2, 0, 4), (5, 2, 0, 4), (0, 5, 2, 3), (0, 5, 2), (0, 5, 2)),
    ),
    "no query": ("grouped_query_attention", of_an_empty_batch, ones((0, 4, 1, 8), *[(4, 0, 9, 8)] * 2)),
    "one query without features": (
        "one_query_attention",
        attended,
        ones((2, 4, 1, 0), (2, 4, 9, 0), (2, 4, 9, 8)),
    ),
    "one query, and keys of no sequence": (
        "one_query_attention",
        attended,
        ones((3, 4, 1, 8), (0, 4, 9, 8), (0, 4, 9, 8)),
    ),
    "one query without heads": ("one_query_attention", attended, ones((2, 0, 1, 8), *[(2, 0, 9, 8)] * 2)),
}


@pytest.mark.parametrize("part", PARTS)
def test_nothing_undoes_a_pass(rewrite_equal: Callable[..., Rewritten], part: str) -> None:
    rule, compute, inputs = PARTS[part]
    rewrite_equal(Block(compute), inputs, fill=False, passes=rule, dynamic=False)


def test_a_step_is_found_beside_a_part_of_its_result(rewrite_equal: Callable[..., Rewritten]) -> None:
    rule, compute, inputs = PARTS["a part of the step's result"]
    (graph,) = rewrite_equal(Block(compute), inputs, fill=False, passes=rule, dynamic=False).report.graphs
    assert len(graph.outcomes[rule].matches) == 1


def test_a_decoded_token_without_features_of_keys_is_refused() -> None:
    graph = Graph()
    columns, state = (graph.placeholder(name) for name in ("columns", "state"))
    columns.meta["val"], state.meta["val"] = torch.empty(2, 12, 4), torch.empty(2, 4, 0, 3)
    with pytest.raises(Refused, match="12 channels are not"):
        gdn_decode.Sizes.of(columns, state)
