"""One spelling for what means the same, before any pattern looks.

Before: y = to(x, x.dtype); z = view(y, [2, 3]); z2 = reshape(y, [2, -1]); dead = x + 1
After:  z = reshape(x, [2, 3])
"""

import operator
from collections import defaultdict
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.backward import Backward
from fxfuse.passes.constants import spell_constants
from fxfuse.passes.filled_memory import spell_filled_memory
from fxfuse.passes.head_projections import join_heads_of_weights
from fxfuse.passes.idle_calls import fold_idle_calls
from fxfuse.passes.kept_dimensions import spell_kept_dimensions
from fxfuse.passes.known_sizes import drop_known_metadata, spell_groups, spell_sizes
from fxfuse.passes.linear_spellings import put_weights_second, spell_linears, value_of
from fxfuse.passes.modes import modes, sets_grad_mode, switches_autocast
from fxfuse.passes.moved_elements import spell_moved_elements
from fxfuse.passes.pointwise_convolutions import spell_pointwise_convolutions
from fxfuse.passes.pointwise_spellings import spell_pointwise
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import (
    StorageWrites,
    is_contiguous,
    layout_shows,
    same_memory,
    storage_of,
    written_by,
)
from fxfuse.passes.written_positions import spell_written_positions
from fxfuse.patterns import ops


def normalise(program: Program) -> None:
    """Rewrite the graph in place; values and writes stay what they were."""
    _drop_idle_switches(program)
    drop_known_metadata(program)
    fold_idle_dropout(program)
    _fold_identities(program)
    _writes_to_the_base(program)
    spell_constants(program)
    _one_name(program)
    fold_idle_calls(program)
    _drop_dead_nodes(program)  # which would count as readers below
    _one_reshape(program)
    spell_filled_memory(program)
    spell_written_positions(program)
    _one_convolution(program)
    spell_groups(program)
    spell_sizes(program)
    _without_empty_parts(program)
    _one_view_of_each(program)
    spell_moved_elements(program)
    spell_pointwise(program)
    spell_kept_dimensions(program)
    _one_view_of_each(program)
    put_weights_second(program)
    spell_pointwise_convolutions(program)
    join_heads_of_weights(program)
    for _ in range(2):  # a bias is seen once the rows of its linear are where they belong
        _one_view_of_each(program)
        _drop_dead_nodes(program)
        spell_linears(program)
    _one_view_of_each(program)
    _drop_dead_nodes(program)
    program.graph.lint()


def _drop_idle_switches(program: Program) -> None:
    """set_grad_enabled(False) where it is off already -> nothing."""
    grad = program.grad_enabled
    for node in list(program.graph.nodes):
        if not sets_grad_mode(node):
            continue
        if node.args[0] == grad:
            program.graph.erase_node(node)
        else:
            grad = bool(node.args[0])


def fold_idle_dropout(program: Program) -> None:
    """dropout(x, p, train=False) -> x, and so for p = 0: it hands back x, though its fake kernel copies."""
    folded = False
    for node in program.calls(ops.DROPOUT):
        source, p, train = node.args
        if (train is False or p == 0) and isinstance(source, Node):
            for user in node.users:
                user.meta.pop("val", None)
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)
            folded = True
    if folded:
        program.refresh()


def _one_name(program: Program) -> None:
    """concat(xs, d) -> cat(xs, d), 0 - x, -1·x -> -x, x - (-y) -> x + y, type_as(x, y) -> to(x, y.dtype)."""
    for node in program.calls(*ops.SAME_AS):
        if not node.kwargs:
            name, overload = ops.SAME_AS[str(node.target)].removeprefix("aten.").split(".")
            node.target = getattr(getattr(torch.ops.aten, name), overload)
    for node in program.calls(*ops.SUBTRACTED_FROM):
        x, number = node.args[:2]
        is_zero = len(node.args) == 2 and not node.kwargs and type(number) in (int, float) and number == 0
        if is_zero and node.meta["val"].dtype == x.meta["val"].dtype:  # type: ignore[union-attr]
            node.target, node.args = torch.ops.aten.neg.default, (x,)
    for node in program.calls(ops.MUL, ops.DIV):
        pairs = (node.args, node.args[::-1]) if str(node.target) == ops.MUL else (node.args,)
        for x, number in (pair for pair in pairs if len(pair) == 2):
            negates = type(number) in (int, float) and number == -1 and isinstance(x, Node)
            if negates and not node.kwargs and x.meta["val"].is_floating_point():  # type: ignore[union-attr]
                node.target, node.args = torch.ops.aten.neg.default, (x,)
    writes, backward = StorageWrites(program.graph), Backward(program)
    for node in program.calls(ops.SUB):
        x, y = (*node.args, None)[:2]
        plain = len(node.args) == 2 and not node.kwargs and isinstance(y, Node) and str(y.target) == ops.NEG
        if not plain or backward.parts(node, y):  # type: ignore[arg-type]
            continue
        if not writes.is_written(y) and not writes.is_written(y.args[0]):  # type: ignore[arg-type, union-attr]
            node.target, node.args = torch.ops.aten.add.Tensor, (x, y.args[0])  # type: ignore[union-attr]
    for node in program.calls(*ops.CASTS_TO_DEVICE):
        given, got = (n.meta["val"] for n in (node.args[0], node))  # type: ignore[union-attr]
        options = {"dtype", "device", "layout"}
        plain = len(node.args) in (1, 3) and set(node.kwargs) <= options
        if plain and given.device == got.device and given.layout == got.layout:
            node.target, node.args, node.kwargs = torch.ops.aten.to.dtype, (node.args[0], got.dtype), {}
    for node in program.calls(*ops.CASTS_LIKE):
        x, y = node.args[:2]
        values = [n.meta["val"] for n in (x, y)]  # type: ignore[union-attr]
        if len(node.args) == 2 and not node.kwargs and values[0].device == values[1].device:
            node.target, node.args = torch.ops.aten.to.dtype, (x, values[1].dtype)


def _one_convolution(program: Program) -> None:
    """conv1d(…, padding="valid") and convolution(…) over [B, C, T] -> conv1d(…, padding=0).

    Not under autocast, which leaves the latter alone and casts what conv1d is given.
    """
    mode = modes(program.graph, program.grad_enabled)
    for node in program.calls(ops.CONV1D_BY_NAME):
        if not node.kwargs and (*node.args, *("valid",) * 5)[4] == "valid":
            node.target = torch.ops.aten.conv1d.default
            node.args = (*node.args[:4], [0], *node.args[5:])
    for node in program.calls(ops.CONVOLUTION):
        if len(node.args) < 9 or node.args[6] is not False or node.meta["val"].dim() != 3:
            continue
        if switches_autocast(mode[node]):
            continue
        if node.args[0].meta["val"].dim() == 3:  # type: ignore[union-attr]
            node.target = torch.ops.aten.conv1d.default
            node.args = (*node.args[:6], node.args[8])


def _without_empty_parts(program: Program) -> None:
    """cat([empty, x, y]) -> cat([x, y]); cat([empty, x]) -> clone(x), contiguous as eager's is.

    Inductor would keep x's strides. A key-value cache starts so; with other strides the first decoded token
    would be another graph than the next.
    """
    for node in program.calls(ops.CAT):
        parts = node.args[0]
        full: Any = [p for p in parts if not _is_legacy_empty(p)]  # type: ignore[union-attr]
        if len(full) == len(parts) or any(p.meta["val"].dtype != node.meta["val"].dtype for p in full):  # type: ignore[arg-type]
            continue
        if len(full) > 1:
            node.args = (full, *node.args[1:])
        elif full:
            node.target = torch.ops.aten.clone.default
            node.args = (full[0],)
            node.kwargs = {"memory_format": torch.contiguous_format}


def _is_legacy_empty(part: object) -> bool:
    """A tensor of shape [0], which cat skips whatever the others' shape is."""
    if not isinstance(part, Node) or part.meta["val"].dim() != 1:
        return False
    return statically_known_true(part.meta["val"].shape[0] == 0)


def _fold_identities(program: Program) -> None:
    """to(x, x.dtype) -> x, alias(x) -> x: where the result is the very memory of the input."""
    backward = Backward(program)
    for node in program.calls(*ops.MAYBE_IDENTITY):
        source = node.args[0]
        if backward.stops_at(node):
            continue
        if isinstance(source, Node) and _is_the_same(program, node, source):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)


def _is_the_same(program: Program, node: Node, other: Node) -> bool:
    """Whether one may stand for the other: the same memory, and for gradients the same history."""
    detached = program.grad_enabled and ops.DETACH in (str(node.target), str(other.target))
    return not detached and same_memory(node, other)


def _hands_on_memory(node: Node) -> bool:
    """Whether a call may return the memory of its first argument, by its schema, and writes to none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten" or not node.args:
        return False
    returned = [value.alias_info for value in target._schema.returns]
    return len(returned) == 1 and returned[0] is not None and not written_by(node)


def _one_view_of_each(program: Program) -> None:
    """view(x, s), reshape(x, s) -> one of them, and x itself where s is its shape.

    Also of memory that is written: at any time both show what is there. Not so their gradients.
    """
    mode = modes(program.graph, program.grad_enabled)
    writes, gradients = StorageWrites(program.graph), program.needs_gradients
    (output,) = program.graph.find_nodes(op="output")
    bases: dict[Node, Node] = {}
    views: dict[Node, list[Node]] = defaultdict(list)
    for node in list(program.graph.nodes):
        reads_memory = str(node.target) in ops.STRIDE_READERS  # whose input has to be in memory
        source = node.args[0] if _hands_on_memory(node) and not reads_memory else None
        if not isinstance(source, Node) or output in node.users:
            continue
        if gradients and writes.is_written(node):
            continue
        if gradients and not mode[node].gradients:  # made where gradients are off, it hands on none
            continue
        cut = program.grad_enabled and str(source.target) == ops.DETACH  # views of it have no gradient either
        base = bases[node] = source if cut else bases.get(source, source)
        same = next((other for other in (base, *views[base]) if _is_the_same(program, node, other)), None)
        if same is None:
            views[base].append(node)
        else:
            node.replace_all_uses_with(same)


def _writes_to_the_base(program: Program) -> None:
    """copy_(detach(x), v) -> copy_(x, v): the very same memory."""
    backward = Backward(program)
    for node in program.graph.nodes:
        for place in written_by(node):
            base = place.args[0] if _hands_on_memory(place) and not backward.stops_at(place) else None
            if isinstance(base, Node) and _is_the_same(program, place, base):
                node.replace_input_with(place, base)


def _one_reshape(program: Program) -> None:
    """unflatten(x, d, s) -> reshape(x, …), reshape(reshape(x, s), t) -> reshape(x, t).

    Unless that memory is written, when a copy would lose the write, and a view of what was copied show it.
    """
    writes, shown, changed = StorageWrites(program.graph), layout_shows(program.graph), False
    (output,), backward = program.graph.find_nodes(op="output"), Backward(program)
    for node in program.calls(ops.UNFLATTEN):
        sizes, source = list(node.meta["val"].shape), node.args[0]
        made = isinstance(source, Node) and str(source.target) in (ops.RESHAPE, ops.FLATTEN)
        if made and not writes.is_written(node) and all(type(size) is int for size in sizes):
            node.target, node.args, node.kwargs = torch.ops.aten.reshape.default, (source, sizes), {}
    for node in program.calls(ops.RESHAPE):
        source = node.args[0]
        if not isinstance(source, Node) or str(source.target) not in (ops.RESHAPE, ops.FLATTEN):
            continue
        if backward.parts(node, source):
            continue
        whole: Node = source.args[0]  # type: ignore[assignment]
        value = value_of(whole)
        alike = storage_of(node) not in shown or (value is not None and is_contiguous(value))
        if alike and not writes.is_written(node):
            if writes.version(whole, source) != writes.version(whole, output):
                continue
            if backward.misses_copy(whole, writes):
                continue
            node.args = (whole, *node.args[1:])
            node.meta.pop("val", None)
            changed = True
    if changed:
        program.refresh()


def _drop_dead_nodes(program: Program) -> None:
    """Remove what nobody reads and what has no effect: reversed, so that chains go at once."""
    for node in reversed(list(program.graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        pure = node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload)
            and not written_by(node)
            and torch.Tag.nondeterministic_seeded not in node.target.tags
            and node.target.namespace in ("aten", "fxfuse")
            and bool(node.target._schema.returns)
        )
        if pure:
            program.graph.erase_node(node)
