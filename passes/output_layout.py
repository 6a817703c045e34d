"""What leaves the graph is laid out as it was, also where a pass computes it in another order.

Before: return y                          # of other strides than in the graph that was given
After:  return permute(contiguous(permute(y, order)), back)

Outputs that share memory go on sharing it: there the first node of that memory is copied, for all of them.
"""

from collections import Counter
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program
from fxfuse.passes.regions import laid_out
from fxfuse.passes.storage_writes import StorageWrites, dense_order, equal_sizes, is_contiguous, storage_of

RULE = "output_layout"


def restore_output_layout(program: Program, given: Program) -> Outcome:
    """Copy each output whose strides have another order than in `given`; a miss for one that cannot be."""
    outcome, wanted = Outcome(), _results(given)
    if len(_results(program)) != len(wanted):
        return outcome
    taken = _taken(program)
    for place, old in enumerate(wanted):
        node = _results(program)[place]  # anew: for an earlier one its memory may have been copied
        value, order = node.meta.get("val"), dense_order(old.meta.get("val"))
        if not isinstance(value, Tensor):
            continue
        if taken[storage_of(node)] > 1:
            if _strides_differ(value, old.meta.get("val")):
                _restore_shared(program, given, node, old, outcome)
                taken = _taken(program)
        elif order is not None and value.dim() == len(order) and not is_contiguous(value.permute(order)):
            (output,) = program.graph.find_nodes(op="output")
            with program.graph.inserting_before(output):
                output.replace_input_with(node, laid_out(program, node, node, order))
            outcome.matches.append(Match(RULE, node.name, (), "strides as they were"))
    return outcome


def _results(program: Program) -> list[Node]:
    (output,) = program.graph.find_nodes(op="output")
    return [node for node in tree_leaves(output.args) if isinstance(node, Node)]


def _taken(program: Program) -> Counter[int | None]:
    """How many inputs and outputs lie in each memory."""
    return Counter(storage_of(n) for n in (*program.placeholders(), *dict.fromkeys(_results(program))))


def _restore_shared(program: Program, given: Program, node: Node, old: Node, outcome: Outcome) -> None:
    """Copy the memory of an output of other strides where it is made: other outputs are views of it."""
    root, old_root = (_made_by(p, n) for p, n in ((program, node), (given, old)))
    order, shapes = dense_order(old_root.meta["val"]), [n.meta["val"].shape for n in (root, old_root)]
    fixed = root.op == "placeholder" or StorageWrites(program.graph).is_written(root)
    if order is None or fixed or not equal_sizes(*shapes):
        reason = "it shares memory with another input or output, and would be laid out otherwise"
        outcome.misses.append(Miss(RULE, node.name, node.name, reason))
        return
    users = list(root.users)
    with program.graph.inserting_before(root.next):
        copied = laid_out(program, root, root, order)
    for user in users:
        user.replace_input_with(root, copied)
    program.refresh(users)
    outcome.matches.append(Match(RULE, node.name, (), "strides as they were"))


def _made_by(program: Program, node: Node) -> Node:
    storage = storage_of(node)
    return next(n for n in program.graph.nodes if storage_of(n) == storage)


def _strides_differ(value: Any, old: Any) -> bool:
    """Whether that is known of two tensors of one shape; nobody steps along a dimension of one element."""
    if not isinstance(value, Tensor) or not isinstance(old, Tensor) or value.dim() != old.dim():
        return False
    steps = zip(old.shape, value.stride(), old.stride(), strict=True)
    return any(statically_known_true(size > 1) and statically_known_true(a != b) for size, a, b in steps)
