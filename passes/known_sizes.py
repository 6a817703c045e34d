"""Sizes are asked of the graph's inputs, and what tracing knows is not asked again.

Before: y = linear(x, w); n = sym_size(y, 0); _assert_tensor_metadata(y, dtype=torch.float32)
After:  n = sym_size(x, 0); y = linear(x, w)

Before: n = sym_size(w, 1); z = s * (1.0 / sym_float(n))
After:  z = s * 0.125, where the trace has found that n is 8

A guard is added for one size only, which no compiled graph leaves open.
"""

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.passes.linear_spellings import value_of
from fxfuse.passes.program import Program
from fxfuse.patterns import ops
from fxfuse.patterns.readings import CONV1D


def drop_known_metadata(program: Program) -> None:
    """_assert_tensor_metadata(x, dtype=…) -> nothing: torch.export's, and tracing has asked it already."""
    for node in program.calls(ops.ASSERT_METADATA):
        sizes = [*node.args[1:3], *(node.kwargs.get(key) for key in ("size", "stride"))]
        if all(each is None for each in sizes):
            program.graph.erase_node(node)


def spell_groups(program: Program) -> None:
    """conv1d(x, w, groups=n) -> conv1d(x, w, groups=24) where w has 24 rows: a guard, as Inductor adds.

    What rewrite() returns raises for another number of channels.
    """
    for node in program.calls(CONV1D):
        weight, groups = value_of(node.args[1]), (*node.args[6:], 1)[0]
        size = groups.meta.get("val") if isinstance(groups, Node) else None
        rows = None if weight is None else weight.shape[0]
        if isinstance(size, torch.SymInt) and isinstance(rows, int) and size.node.hint == rows:
            node.args = (*node.args[:6], int(size), *node.args[7:])


def spell_sizes(program: Program) -> None:
    """sym_size(y, 0) -> sym_size(x, 0), where x is an input, or a number: a size is no use of a value."""
    known, sources = _sizes_of_inputs(program)
    for node in program.calls(ops.SYM_SIZE):
        size = node.meta.get("val")
        expression = size.node.expr if isinstance(size, torch.SymInt) else None
        if expression is None:
            continue
        if expression.is_Integer:  # the trace has found what it has to be
            for user in list(node.users):
                _put_number(user, node, int(expression))
        else:
            asked = _asked(program, size, known, sources)
            if asked is None:
                continue
            node.replace_all_uses_with(asked)
        program.graph.erase_node(node)
    _fold_numbers(program)


def size_of_inputs(program: Program, size: Any) -> Any:
    """A number, or the node that is this size from the graph's start on; None where no input has it."""
    return size if type(size) is int else _asked(program, size, *_sizes_of_inputs(program))


def _asked(
    program: Program, size: Any, known: dict[Any, Node], sources: dict[Any, tuple[Node, int]]
) -> Node | None:
    expression = size.node.expr
    if expression not in known and expression in sources:
        with program.graph.inserting_after(program.placeholders()[-1]):
            asked = program.graph.call_function(torch.ops.aten.sym_size.int, sources[expression])
        asked.meta["val"] = size
        known[expression] = asked
    return known.get(expression)


def _fold_numbers(program: Program) -> None:
    """1 / sym_float(8) -> 0.125: Python's arithmetic on sizes, once they are known."""
    for node in list(program.graph.nodes):
        is_number = isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat))
        if node.op != "call_function" or not is_number or isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.args and not node.kwargs and all(type(n) in (int, float) for n in node.args):
            number = node.target(*node.args)  # type: ignore[operator]
            for user in list(node.users):
                _put_number(user, node, number)
            program.graph.erase_node(node)


def _sizes_of_inputs(program: Program) -> tuple[dict[Any, Node], dict[Any, tuple[Node, int]]]:
    """The inputs that are sizes, and the tensor and dimension of the first input that has a size."""
    known: dict[Any, Node] = {}
    sources: dict[Any, tuple[Node, int]] = {}
    for given in program.placeholders():
        value = given.meta.get("val")
        if isinstance(value, torch.SymInt):
            known.setdefault(value.node.expr, given)
        tensor = value_of(given)
        for dim, size in enumerate(() if tensor is None else tensor.shape):
            if isinstance(size, torch.SymInt):
                sources.setdefault(size.node.expr, (given, dim))
    return known, sources


def _put_number(user: Node, size: Node, number: float) -> None:
    user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: number if n is size else n)
