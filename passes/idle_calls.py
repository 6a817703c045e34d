"""Calls that hand on what they were given are dropped, and writes to fresh memory are spelled as values.

Before: a = x + 0; b = 1 * a; c = clone(b); add_(c, y)
After:  c = add(x, y)
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from fxfuse.passes.backward import Backward
from fxfuse.passes.modes import modes, switches_autocast
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import (
    StorageWrites,
    equal_sizes,
    layout_matters,
    layout_shows,
    lies_in_rows,
    storage_of,
    written_by,
)
from fxfuse.patterns import ops


def fold_idle_calls(program: Program) -> None:
    """Rewrite in place.

    A result that is written, returned or read by its strides stays a copy. So does one whose source is
    written afterwards.
    """
    writes_to_values(program)
    results_to_values(program)
    writes, fixed = StorageWrites(program.graph), layout_matters(program.graph)
    _views_to_reshapes(program, writes)
    shown = layout_shows(program.graph)
    stale, viewed = set[Node](), _behind_views(program)
    (output,), backward = program.graph.find_nodes(op="output"), Backward(program)
    for node in program.calls(*ops.ARITHMETIC, *_OTHERS):
        source = _handed_on(node)
        if source is None or not _same_elements(node, source) or backward.stops_at(node):
            continue
        strides = [n.meta["val"].stride() for n in (node, source)]
        anew = not equal_sizes(*strides) and (storage_of(node) in shown or node in viewed)
        twice = str(node.target) == ops.NEG  # the first of two has read the source
        read: Node = node.args[0] if twice else node  # type: ignore[assignment]
        if writes.is_written(node) or (twice and (writes.is_written(read) or backward.stops_at(read))):
            continue
        if anew and not twice and lies_in_rows(node.meta["val"]):
            node.target, node.args = torch.ops.aten.clone.default, (source,)
            node.kwargs = {"memory_format": torch.contiguous_format}
        later = writes.version(source, read) != writes.version(source, output)
        if later or backward.misses_copy(source, writes) or anew or storage_of(node) in fixed:
            continue
        stale |= set(node.users)
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)
        stale.discard(node)
    program.refresh(stale)


def _views_to_reshapes(program: Program, writes: StorageWrites) -> None:
    """view(x, s) -> reshape(x, s), which needs no strides of x: those of a copy may go with it."""
    for node in program.calls(*(ops.RESHAPES - {ops.RESHAPE})):
        if not writes.is_written(node):
            node.target = torch.ops.aten.reshape.default
    for node in program.calls(ops.VIEW_AS):
        sizes = list(node.meta["val"].shape)
        if not writes.is_written(node) and all(type(size) is int for size in sizes):
            node.target, node.args = torch.ops.aten.reshape.default, (node.args[0], sizes)


def _behind_views(program: Program) -> set[Node]:
    """What is behind the views that stay views, since they are written: its strides count."""
    waiting, found = program.calls(*(ops.RESHAPES - {ops.RESHAPE}), ops.VIEW_AS), set[Node]()
    while waiting:
        read = set(waiting.pop().all_input_nodes) - found
        found |= read
        waiting += read
    return found


def _handed_on(node: Node) -> Node | None:
    """The operand that a call hands on unchanged: of x + 0, 0 + x, x - 0, x · 1, 1 · x, x / 1 and copies."""
    if str(node.target) in _OTHERS:
        source = _OTHERS[str(node.target)](*node.args) if not node.kwargs else None
        return source if isinstance(source, Node) else None
    neutral, commutes = ops.ARITHMETIC[str(node.target)]
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if _is_number(second, neutral):
        return first if isinstance(first, Node) else None
    if commutes and _is_number(first, neutral):
        return second if isinstance(second, Node) else None
    return None


def _of_one(parts: Any, dim: int = 0) -> Any:
    return parts[0] if len(parts) == 1 else None


def _negated(x: Any) -> Any:
    return x.args[0] if isinstance(x, Node) and str(x.target) == ops.NEG else None


# clone(x), cat([x]), −(−x), x¹, repeat(x, 1, 1)
_OTHERS: dict[str, Callable[..., Any]] = {
    ops.CLONE: lambda x: x,
    ops.CAT: _of_one,
    ops.NEG: _negated,
    ops.POWER: lambda x, power: x if _is_number(power, 1) else None,
    ops.REPEAT_INTERLEAVE: lambda x, count, dim=None: x if dim is not None and count == 1 else None,
    ops.REPEAT: lambda x, counts: x if all(n == 1 for n in counts) else None,
}


def _is_number(value: Any, wanted: int) -> bool:
    return type(value) in (int, float) and value == wanted


def _same_elements(node: Node, source: Node) -> bool:
    a, b = node.meta.get("val"), source.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    if a.dtype != b.dtype or a.requires_grad != b.requires_grad or a.dim() != b.dim():
        return False
    return all(statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def writes_to_values(program: Program) -> None:
    """add_(x, y) on memory that nobody else sees -> add(x, y), for those who read x after it."""
    writes, shown = StorageWrites(program.graph), layout_shows(program.graph)
    sharing: dict[int | None, list[Node]] = {}
    for node in program.graph.nodes:
        sharing.setdefault(storage_of(node), []).append(node)
    changed: list[Node] = []
    known, mode = _known(program), modes(program.graph, program.grad_enabled)
    backward = Backward(program)
    for storage, nodes in sharing.items():
        if storage is None or len(nodes) == 1 or any(switches_autocast(mode[node]) for node in nodes):
            continue
        position = {node: i for i, node in enumerate(program.graph.nodes)}
        values = _values_of_writes(nodes, position, _Fits(program, known, storage in shown))
        if not values:
            continue
        written = nodes[: len(values) + 1]
        if backward.parts(*written):
            continue
        for node, value in zip(written[1:], values, strict=True):
            node.target, node.args = value
        for node in written:
            for user in list(node.users):
                latest = [n for n in written if position[n] < position[user]][-1]
                user.replace_input_with(node, latest)
        changed += nodes[1:]
        if not backward.stops_at(nodes[0]):
            _drop_copy(program, writes, nodes[0])
    program.refresh(changed)


def results_to_values(program: Program) -> None:
    """silu_(x[:2]) -> silu(x[:2]) where nobody reads x afterwards, and add(x, y, out=empty) -> add(x, y)."""
    fixed, shown = layout_matters(program.graph), layout_shows(program.graph)
    changed: list[Node] = []
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    known, mode = _known(program), modes(program.graph, program.grad_enabled)
    backward = Backward(program)
    sharing: dict[int | None, list[Node]] = {}
    for node in program.graph.nodes:
        sharing.setdefault(storage_of(node), []).append(node)
    for storage, nodes in sharing.items():
        writes = [node for node in nodes if written_by(node)]
        made = nodes[0].op == "call_function" and not written_by(nodes[0])
        if storage is None or len(writes) != 1 or not made:
            continue
        (write,) = writes
        if storage in fixed and "out" not in write.kwargs:
            continue
        if switches_autocast(mode[write]):
            continue
        before = nodes[: nodes.index(write)]
        if backward.parts(write, *before):
            continue
        if any(position[user] > position[write] for node in before for user in node.users):
            continue
        if any(not isinstance(user.meta.get("val"), Tensor) for node in before for user in node.users):
            continue
        fits = _Fits(program, known, storage in shown)
        value = _without_out(write, fits) if "out" in write.kwargs else None
        value = value or _as_value(write, fits)
        if value is not None:
            write.target, write.args = value
            write.kwargs = {key: value for key, value in write.kwargs.items() if key != "out"}
            changed += nodes[nodes.index(write) :]
    program.refresh(changed)


Known = dict[Node, Any]
# What a call becomes: its target and arguments.
_Value = tuple[Any, tuple[Any, ...]]


def _known(program: Program) -> Known:
    """What is known of every node, also of those that are changed before they are computed anew."""
    return {node: node.meta.get("val") for node in program.graph.nodes}


@dataclass(frozen=True)
class _Fits:
    """Whether an overload gives, of a call's arguments, the dtype and sizes of the memory written to.

    Where its layout shows, the strides as well.
    """

    program: Program
    known: Known
    layout_shows: bool = False

    def __call__(self, node: Node, value: _Value) -> bool:
        function, args = value
        kwargs = {key: value for key, value in node.kwargs.items() if key != "out"}
        given, options = map_arg((args, kwargs), self.known.__getitem__)
        with self.program.fake_mode or nullcontext(), enable_python_dispatcher(), torch.no_grad():
            try:
                made = function(*given, **options)
            except (RuntimeError, TypeError):
                return False
        own = self.known[node]
        if (made.dtype, made.device) != (own.dtype, own.device) or not equal_sizes(made.shape, own.shape):
            return False
        return not self.layout_shows or equal_sizes(made.stride(), own.stride())


_MADE_TO_BE_WRITTEN = ("aten.empty", "aten.new_empty", "aten.zeros", "aten.new_zeros")


def _without_out(node: Node, fits: _Fits) -> _Value | None:
    """The call that returns what this one writes to memory made for it, all of one dtype."""
    out, target = node.kwargs["out"], node.target
    is_aten = isinstance(target, torch._ops.OpOverload) and target.namespace == "aten"
    if not is_aten or not isinstance(out, Node) or written_by(node) != [out]:
        return None
    empty, values = (
        str(out.target).startswith(_MADE_TO_BE_WRITTEN),
        [n.meta["val"] for n in node.all_input_nodes],
    )
    if not empty or len({v.dtype for v in values}) > 1 or node.meta["val"].shape != out.meta["val"].shape:
        return None
    packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::"))  # type: ignore[union-attr]
    wanted = _types(target)[:-1]  # type: ignore[arg-type]
    overloads = [getattr(packet, each) for each in packet.overloads()]
    overload = next((overload for overload in overloads if _types(overload) == wanted), None)
    value = overload, node.args
    return value if overload is not None and fits(node, value) else None


def _drop_copy(program: Program, writes: StorageWrites, root: Node) -> None:
    """A copy that was there to be written: those who read it now read what it was made of."""
    source = root.args[0] if root.args else None
    plain = str(root.target) == ops.CLONE and len(root.args) == 1 and not root.kwargs
    if plain and isinstance(source, Node) and not writes.is_written(source) and _same_elements(root, source):
        root.replace_all_uses_with(source)
        program.graph.erase_node(root)


def _values_of_writes(nodes: list[Node], position: dict[Node, int], fits: _Fits) -> list[_Value]:
    """What the writes compute, for memory that one node makes and others then write as a whole.

    Views of it may follow the last write; nothing for any other memory.
    """
    root, *later = nodes
    if root.op != "call_function" or written_by(root):
        return []
    writes = [node for node in later if written_by(node)]
    if later[: len(writes)] != writes or not writes:
        return []
    for node in writes:
        if node.args[0] not in nodes or any(n in nodes for n in node.all_input_nodes[1:]):
            return []
    for user in (user for node in nodes for user in node.users):
        is_list = not isinstance(user.meta.get("val"), Tensor) and position[user] < position[writes[-1]]
        if user not in writes and (is_list or any(n in nodes for n in written_by(user))):
            return []
    values = [_as_value(node, fits) for node in writes]
    return [value for value in values if value is not None] if all(values) else []


def _as_value(node: Node, fits: _Fits) -> _Value | None:
    """The call that returns what this one writes to its first argument, None where there is none."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    name = node.target._schema.name.removeprefix("aten::")
    written = written_by(node)
    if not name.endswith("_") or name.endswith("__") or written != [node.args[0]] or node.kwargs.get("out"):
        return None
    if {torch.Tag.inplace_view, torch.Tag.nondeterministic_seeded} & set(node.target.tags):
        return None
    if str(node.target) in ops.WRITES_OF_A_PART:
        return None  # the value would be a copy of the rest, of a whole cache say
    if str(node.target) == ops.COPY_:
        value = _copied(node, fits)
    else:
        value = _overload_like(node.target, name[:-1]), node.args
    return value if value[0] is not None and fits(node, value) else None


def _copied(node: Node, fits: _Fits) -> _Value:
    """What copy_(x, y) stores; not as copy(x, y), through which no gradient passes."""
    source: Any = node.args[1]
    dtype = fits.known[node].dtype
    cast = fits.known[source].dtype != dtype
    return (torch.ops.aten.to.dtype, (source, dtype)) if cast else (torch.ops.aten.clone.default, (source,))


def _overload_like(target: torch._ops.OpOverload, name: str) -> Any:
    """The overload of that operator whose arguments have the types that the target's have."""
    packet, wanted = getattr(torch.ops.aten, name, None), _types(target)
    overloads = [] if packet is None else [getattr(packet, each) for each in packet.overloads()]
    return next((overload for overload in overloads if _types(overload) == wanted), None)


def _types(target: torch._ops.OpOverload) -> list[str]:
    return [str(argument.type) for argument in target._schema.arguments]
