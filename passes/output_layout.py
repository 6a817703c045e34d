"""What leaves the graph is laid out as it was, also where a pass computes it in another order.

Before: return y                          # of other strides than in the graph that was given
After:  return permute(contiguous(permute(y, order)), back)
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.storage_writes import storage_of


def restore_output_layout(program: Program, given: Program) -> Outcome:
    """Copy each output whose strides have another order than in `given`, if its memory is its own."""
    outcome = Outcome()
    (output,), (before,) = (p.graph.find_nodes(op="output") for p in (program, given))
    results, wanted = ([n for n in tree_leaves(o.args) if isinstance(n, Node)] for o in (output, before))
    if len(results) != len(wanted):
        return outcome
    taken = [storage_of(n) for n in (*program.placeholders(), *dict.fromkeys(results))]
    copies: dict[Node, Node] = {}
    for node, old in dict(zip(results, wanted, strict=True)).items():
        value, order = node.meta.get("val"), _order(old.meta.get("val"))
        if order is None or not isinstance(value, Tensor) or value.dim() != len(order):
            continue
        if value.permute(order).is_contiguous() or taken.count(storage_of(node)) > 1:
            continue
        back = sorted(range(len(order)), key=order.__getitem__)
        with program.graph.inserting_before(output):
            made = call(program, node, torch.ops.aten.permute.default, node, order)
            made = call(program, node, torch.ops.aten.contiguous.default, made)
            copies[node] = call(program, node, torch.ops.aten.permute.default, made, back)
        outcome.matches.append(Match("output_layout", node.name, (), "strides as they were"))
    output.args = map_arg(output.args, lambda n: copies.get(n, n))
    return outcome


def _order(value: Any) -> list[int] | None:
    """The dimensions from the widest step to the narrowest, if in this order the memory is contiguous."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return None
    for order in _candidates(value):
        if value.permute(order).is_contiguous():
            return order
    return None


def _candidates(value: Tensor) -> list[list[int]]:
    """The order of the strides where all are numbers, and the order as it is."""
    own = list(range(value.dim()))
    if not all(isinstance(stride, int) for stride in value.stride()):
        return [own, *([*own[:i], own[i + 1], own[i], *own[i + 2 :]] for i in own[:-1])]
    single = [statically_known_true(size == 1) for size in value.shape]
    steps = [dim for dim in own if not single[dim]]
    steps.sort(key=lambda dim: value.stride()[dim], reverse=True)
    return [own, [*(dim for dim in own if single[dim]), *steps]]
