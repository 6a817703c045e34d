"""Elements that are copied in order are spelled as views, or as one cat.

Before: a = index_select(x, 1, arange(2, 5)); b = stack([x, x], 2);       c = flatten(stack([x, y], 1), 1, 2)
After:  a = slice(x, 1, 2, 5);                b = expand(unsqueeze(x, 2)); c = cat([x, y], 1)
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.backward import Backward
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.rejoined_parts import rejoined
from fxfuse.passes.storage_writes import (
    StorageWrites,
    equal_sizes,
    is_contiguous,
    layout_matters,
    layout_shows,
    storage_of,
)
from fxfuse.patterns import ops


def spell_moved_elements(program: Program) -> None:
    """Rewrite in place; what is written later, returned or read by its strides stays a copy."""
    writes, fixed = StorageWrites(program.graph), layout_matters(program.graph)
    shown, backward = layout_shows(program.graph), Backward(program)
    (end,) = program.graph.find_nodes(op="output")
    changed: set[Node] = set()
    for node in program.calls(*_VIEWS, ops.CAT, *ops.RESHAPES, ops.FLATTEN):
        if writes.is_written(node) or storage_of(node) in fixed:
            continue
        whole = rejoined(program, node) if str(node.target) in (ops.CAT, ops.STACK) else None
        read = _tensors(node) if whole is None else [whole[1][0]]
        strided = any(n in changed or not is_contiguous(n.meta["val"]) for n in read)
        if strided and storage_of(node) in shown:
            continue
        if any(writes.version(n, node) != writes.version(n, end) for n in node.all_input_nodes):
            continue
        if any(backward.misses_copy(n, writes) for n in node.all_input_nodes):
            continue
        if any(str(n.target) in ops.ARANGE and writes.is_written(n) for n in node.all_input_nodes):
            continue
        spelled = whole
        if spelled is None and str(node.target) in _VIEWS:
            spelled = _VIEWS[str(node.target)](program, node)
        elif spelled is None and str(node.target) != ops.CAT and not backward.parts(node, *_tensors(node)):
            spelled = _joined(program, writes, node)
        if spelled is None:
            continue
        node.target, node.args = spelled
        node.kwargs = {}
        changed.add(node)
    program.refresh(changed)  # not before: the next may read their sizes


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _range(node: Any) -> tuple[int, int] | None:
    """Start and end of consecutive whole numbers that a node counts up."""
    if not isinstance(node, Node) or str(node.target) not in ops.ARANGE:
        return None
    numbers = node.args if len(node.args) > 1 else (0, *node.args)
    if any(type(n) is not int for n in numbers) or numbers[2:] not in ((), (1,)):
        return None
    start, end = numbers[:2]
    return (start, end) if 0 <= start <= end else None  # type: ignore[operator, return-value]


def _selected(program: Program, node: Node) -> Any:
    source, dim, places = node.args
    found = _range(places)
    if found is None or not isinstance(source, Node):
        return None
    return torch.ops.aten.slice.Tensor, (source, dim, *found)


def _indexed(program: Program, node: Node) -> Any:
    source, places = node.args
    given = [i for i, place in enumerate(places) if place is not None]  # type: ignore[arg-type, union-attr]
    if len(given) != 1 or not isinstance(source, Node):
        return None
    found = _range(places[given[0]])  # type: ignore[index]
    return None if found is None else (torch.ops.aten.slice.Tensor, (source, given[0], *found))


def _stacked(program: Program, node: Node) -> Any:
    """A stack of one tensor, once or several times."""
    parts, dim = (*node.args, 0)[:2]
    if len(set(parts)) != 1:  # type: ignore[arg-type]
        return None
    with program.graph.inserting_before(node):
        one = program.graph.call_function(torch.ops.aten.unsqueeze.default, (parts[0], dim))  # type: ignore[index]
    one.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    sizes = [-1] * node.meta["val"].dim()
    sizes[dim] = len(parts)  # type: ignore[arg-type, index]
    return torch.ops.aten.expand.default, (one, sizes)


def _repeated(program: Program, node: Node) -> Any:
    """Repeats along dimensions of size 1."""
    source, counts = node.args
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    if len(shape) != len(counts):  # type: ignore[arg-type]
        return None
    pairs = list(zip(shape, counts, strict=True))  # type: ignore[arg-type]
    if not all(type(n) is int and (n == 1 or statically_known_true(size == 1)) for size, n in pairs):
        return None
    return torch.ops.aten.expand.default, (source, [-1 if n == 1 else n for n in counts])  # type: ignore[union-attr]


def _unfolded(program: Program, node: Node) -> Any:
    """Windows side by side along the last dimension, which they fill."""
    source, dim, size, step = node.args
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    if dim not in (-1, len(shape) - 1) or size != step or type(shape[-1]) is not int or shape[-1] % size:  # type: ignore[operator]
        return None
    return torch.ops.aten.unflatten.int, (source, -1, [shape[-1] // size, size])  # type: ignore[operator]


_VIEWS = {
    ops.INDEX_SELECT: _selected,
    ops.INDEX: _indexed,
    ops.STACK: _stacked,
    ops.REPEAT: _repeated,
    ops.TILE: _repeated,
    ops.UNFOLD: _unfolded,
}


def _joined(program: Program, writes: StorageWrites, node: Node) -> Any:
    """A stack whose new dimension is joined with the next one: the parts side by side, reshaped perhaps."""
    stack: Any = node.args[0]
    if str(stack.target) != ops.STACK:
        return None
    if any(writes.version(n, stack) != writes.version(n, node) for n in stack.all_input_nodes):
        return None
    parts, dim = (*stack.args, 0)[:2]
    value, part = node.meta["val"], parts[0].meta["val"]
    dim %= part.dim() + 1
    if not isinstance(value, Tensor) or dim == part.dim():
        return None
    shape = list(part.shape)
    shape[dim] = shape[dim] * len(parts)
    joined = torch.ops.aten.cat.default, (list(parts), dim)
    if equal_sizes(value.shape, shape):
        return joined
    rows = dim == part.dim() - 1 and equal_sizes(value.shape[-1:], shape[-1:])
    if str(node.target) not in ops.RESHAPES or not rows:
        return None
    with program.graph.inserting_before(node):
        cat = call(program, node, joined[0], *joined[1])
    return torch.ops.aten.reshape.default, (cat, node.args[1])
