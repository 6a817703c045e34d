"""A product of a few rows with an expert each reads those experts where they lie, as a reduction.

Before: y = grouped_mm(x, Wᵀ, offsets)        x: [S, K] sorted by expert, W: [E, N, K], offsets: [E]
        y = bmm(W[e], unsqueeze(x, -1))       e: [S], or another spelling (`chosen_weights`)
After:  y[s] = (W[e[s]].float() * x[s].float()).sum(-1), e[s] the number of offsets ≤ s, in x's dtype again

Inductor reads the chosen rows of W at the speed of memory; the grouped product goes through all experts. Rows
from the last offset on belong to nobody: they are zeros, as in transformers' own loop.
"""

from functools import partial
from math import prod

import torch
from torch.fx import Node

from fxfuse.passes import regions
from fxfuse.passes.chosen_weights import check, chosen_products
from fxfuse.passes.judge import Judge
from fxfuse.passes.modes import PLAIN, modes
from fxfuse.passes.one_row_linears import DTYPES, Stays, none_stays
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.storage_writes import StorageWrites, is_contiguous
from fxfuse.patterns import ops

RULE = "expert_rows"
GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
MOST_ROWS = 32  # more rows share experts, whose weights a product of matrices reads once


def _stored(weight: Node, writes: StorageWrites) -> Node:
    """What a copy of the weights was made of: chosen rows are read where they lie."""
    while str(weight.target) in (ops.CONTIGUOUS, ops.CLONE):
        source: Node = weight.args[0]  # type: ignore[assignment]
        if writes.is_written(weight) or writes.is_written(source):
            break
        weight = source
    return weight


def _suits(grouped: Node, weight: Node) -> bool:
    """Whether it is a product of few rows on a CPU with weights that lie row by row."""
    x, _, offsets, *rest = grouped.args
    if grouped.kwargs or any(more is not None for more in rest) or not isinstance(offsets, Node):
        return False
    rows, experts, y = x.meta["val"], weight.meta["val"], grouped.meta["val"]  # type: ignore[union-attr]
    if rows.dim() != 2 or experts.dim() != 3 or not isinstance(rows.shape[0], int):
        return False
    return (
        y.device.type == "cpu"
        and rows.shape[0] <= MOST_ROWS
        and rows.dtype == experts.dtype == y.dtype
        and y.dtype in DTYPES
        and is_contiguous(y)
        and is_contiguous(experts.mT)
    )


def _replace(program: Program, grouped: Node, weight: Node) -> None:
    aten, graph = torch.ops.aten, program.graph
    x, _, offsets = grouped.args
    dtype, (rows, width) = grouped.meta["val"].dtype, x.meta["val"].shape  # type: ignore[union-attr]
    experts = weight.meta["val"].shape[0]

    call = partial(regions.call, program, grouped)

    def cast(node: Node, wanted: torch.dtype) -> Node:
        return node if dtype == torch.float32 else call(aten.to.dtype, node, wanted)

    with graph.inserting_before(grouped):
        number = call(aten.arange.default, rows)
        ended = call(aten.le.Tensor, offsets, call(aten.unsqueeze.default, number, 1))
        expert = call(aten.clamp.default, call(aten.sum.dim_IntList, ended, [1]), None, experts - 1)
        row = call(aten.contiguous.default, call(aten.to.dtype, x, torch.float32, False, True))
        row = regions.written_out(call, row, rows, 1, width)  # once, as in `one_row_linears`
        chosen = call(aten.index.Tensor, call(aten.transpose.int, weight, 1, 2), [expert])
        y = call(aten.sum.dim_IntList, call(aten.mul.Tensor, cast(chosen, torch.float32), row), [-1])
        somebodys = call(aten.lt.Tensor, number, call(aten.select.int, offsets, 0, -1))
        y = call(aten.where.ScalarOther, call(aten.unsqueeze.default, somebodys, 1), y, 0.0)
        y = cast(y, dtype)
    y.meta["val"] = grouped.meta["val"]  # for a product that reads this one
    grouped.replace_all_uses_with(y)
    graph.erase_node(grouped)


def run(program: Program, stays: Stays = none_stays) -> Outcome:
    """Rewrite every product of a few rows with experts on a CPU; those of more rows are no candidates.

    `stays` says of the experts' weights why their product stays one; by default none does.
    """
    outcome = Outcome()
    _products_of_chosen(program, stays, outcome)
    mode, writes = modes(program.graph, program.grad_enabled), StorageWrites(program.graph)
    for grouped in program.calls(*GROUPED):
        weight = _stored(grouped.args[1], writes)  # type: ignore[arg-type]
        if mode[grouped] != PLAIN or not _suits(grouped, weight):
            continue
        where = module_path(grouped) or grouped.name
        if _stays(stays, weight, grouped, outcome):
            continue
        rows, experts = (n.meta["val"].shape[0] for n in (grouped.args[0], weight))  # type: ignore[union-attr]
        _replace(program, grouped, weight)
        outcome.matches.append(Match(RULE, where, (), f"{rows} rows of {experts} experts → reduction"))
    return outcome


def _stays(stays: Stays, weight: Node, node: Node, outcome: Outcome) -> bool:
    why = stays(weight.meta["val"])
    if why is not None:
        outcome.misses.append(Miss(RULE, module_path(node) or node.name, node.name, why, chosen=True))
    return why is not None


def _products_of_chosen(program: Program, stays: Stays, outcome: Outcome) -> None:
    products = chosen_products(program, MOST_ROWS)
    if not products:
        return
    guards, judge, found = regions.Guards(program), Judge(), []
    for product in products:
        node, where = product.node, module_path(product.node) or product.node.name
        if guards.modes[node] != PLAIN or node.meta["val"].dtype not in DTYPES:
            continue
        try:
            check(guards, judge, product)
        except regions.Refused as refusal:
            outcome.misses.append(Miss(RULE, where, refusal.node.name, refusal.reason))
            continue
        if _stays(stays, product.stored, node, outcome):
            continue
        found.append((product, product.region()))
        rows, experts = prod(product.lead), product.stored.meta["val"].shape[0]
        outcome.matches.append(Match(RULE, where, (), f"{rows} rows of {experts} experts → reduction"))
    replaced: dict[Node, Node] = {}
    for product, region in found:
        node = product.node
        with program.graph.inserting_before(node):
            call, vector = partial(regions.call, program, node), replaced.get(product.vector, product.vector)
            y = product.compute(call, product.chosen, vector, node.meta["val"].dtype, torch.float32)
        y.meta["val"] = node.meta["val"]
        replaced[node] = y
        node.replace_all_uses_with(y)
        regions.erase(program, region)
