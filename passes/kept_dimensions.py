"""What a reduction leaves is given its dimension back where it is made.

Before: v = unsqueeze(rsqrt(mean(x * x, [-1]) + eps), -1)
After:  v = rsqrt(mean(x * x, [-1], keepdim=True) + eps)
"""

from typing import Any

import torch
from torch.fx import Node

from fxfuse.passes.backward import Backward
from fxfuse.passes.linear_spellings import value_of
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes, layout_matters, storage_of
from fxfuse.patterns import ops
from fxfuse.patterns.readings import CASTS


def spell_kept_dimensions(program: Program) -> None:
    """Rewrite in place; a value that leaves the graph, is written or has other readers stays."""
    _new_dimension_first(program)
    _kept_dimension(program)


def _new_dimension_first(program: Program) -> None:
    """unsqueeze(sqrt(sum(x, -1) + c), -1) -> sqrt(unsqueeze(sum(x, -1), -1) + c)."""
    writes, fixed, changed = StorageWrites(program.graph), layout_matters(program.graph), False
    backward = Backward(program)
    for node in program.calls(ops.UNSQUEEZE, *ops.RESHAPES):
        dim, chain, below = _new_dimension(node), [], node.args[0]
        while isinstance(below, Node) and _is_done_to_each(below) and len(below.users) == 1:
            chain.append(below)
            (below,) = below.all_input_nodes
        if dim is None or not chain or dim != _lost_dimension(below, value_of(node).dim()):  # type: ignore[union-attr]
            continue
        if backward.parts(node, *chain):
            continue
        if any(writes.is_written(n) or storage_of(n) in fixed for n in (node, *chain, below)):  # type: ignore[arg-type]
            continue
        with program.graph.inserting_before(chain[-1]):
            first = program.graph.call_function(torch.ops.aten.unsqueeze.default, (below, dim))
        chain[-1].replace_input_with(below, first)  # type: ignore[arg-type]
        for each in (*chain, *node.users):
            each.meta.pop("val", None)
        node.replace_all_uses_with(chain[0])
        program.graph.erase_node(node)
        changed = True
    if changed:
        program.refresh()


def _new_dimension(node: Node) -> int | None:
    """Where an unsqueeze, or a reshape, puts a dimension of one element."""
    source, value = value_of(node.args[0]), value_of(node)
    if source is None or value is None or value.dim() != source.dim() + 1:
        return None
    if str(node.target) == ops.UNSQUEEZE:
        dim: Any = node.args[1]
        return int(dim % value.dim())
    sizes = list(source.shape)
    places = reversed(range(value.dim()))
    return next((d for d in places if equal_sizes(value.shape, [*sizes[:d], 1, *sizes[d:]])), None)


def _lost_dimension(reduced: Any, before: int) -> int | None:
    """The one of so many dimensions that a reduction has left out; of products it is the last."""
    target, args = str(reduced.target), (*reduced.args, *(None,) * 4)
    dims: Any = args[ops.REDUCTIONS[target]] if target in ops.REDUCTIONS else [-1]
    one = target in ops.REDUCED and isinstance(dims, (list, tuple)) and len(dims) == 1
    return int(dims[0] % before) if one else None


def _is_done_to_each(node: Node) -> bool:
    """Whether a call does the same to every element of its one input."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return (pointwise or str(node.target) in CASTS) and len(node.all_input_nodes) == 1


def _kept_dimension(program: Program) -> None:
    """unsqueeze(mean(x, d), d) -> mean(x, d, keepdim=True), and so for sums and reshapes."""
    writes, fixed = StorageWrites(program.graph), layout_matters(program.graph)
    backward = Backward(program)
    for node in program.calls(ops.UNSQUEEZE, ops.RESHAPE):
        reduced = node.args[0]
        if not isinstance(reduced, Node) or str(reduced.target) not in ops.REDUCTIONS:
            continue
        if backward.parts(node, reduced):
            continue
        if len(reduced.users) > 1 and storage_of(node) in fixed:
            continue  # both leave the graph, in one memory
        place, arguments = ops.REDUCTIONS[str(reduced.target)], (*reduced.args, *(None,) * 4)[:4]
        dims = arguments[place]
        keeps = arguments[place + 1] or reduced.kwargs.get("keepdim", False)
        whole: Node = reduced.args[0]  # type: ignore[assignment]
        if writes.is_written(node) or writes.version(whole, reduced) != writes.version(whole, node):
            continue
        sizes = list(whole.meta["val"].shape)
        if keeps or not sizes or not isinstance(dims, (list, tuple)) or len(dims) != 1:
            continue
        sizes[dims[0]] = 1  # type: ignore[index, call-overload]
        if equal_sizes(node.meta["val"].shape, sizes):
            node.target = reduced.target
            node.args = (*arguments[:place], dims, True)
            node.kwargs = {k: v for k, v in reduced.kwargs.items() if k != "keepdim"}
