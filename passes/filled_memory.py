"""Memory that is filled part by part, before anybody reads it, is one cat of the parts.

Before: y = clone(x); copy_(slice(y, -1, 0, 4), v)
        z = empty_like(x); copy_(slice(z, -1, 0, 4), v); copy_(slice(z, -1, 4, 8), w)
After:  y = cat([v, slice(x, -1, 4, 8)], -1); z = cat([v, w], -1)
"""

from typing import Any

import torch
from torch.fx import Node

from fxfuse.passes.linear_spellings import value_of
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.storage_writes import (
    StorageWrites,
    equal_sizes,
    is_contiguous,
    layout_shows,
    same_layout,
    storage_of,
    written_by,
)
from fxfuse.patterns import ops

_EMPTY = ("aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default")
# Refuse what lies in another order.
_OF_STRIDES = ("aten.view.default", ops.VIEW_AS, "aten.view.dtype", "aten.view_as_complex.default")


def spell_filled_memory(program: Program) -> None:
    """Rewrite in place; what overlaps, leaves gaps, is read in between or written to later stays."""
    if program.needs_gradients:
        return
    writes, changed = StorageWrites(program.graph), False
    fixed = layout_shows(program.graph) | {storage_of(n) for n in program.calls(*_OF_STRIDES)}
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    for made in program.calls(ops.CLONE, *_EMPTY):
        if not writes.is_written(made) or (storage_of(made) in fixed and not is_contiguous(made.meta["val"])):
            continue
        fills = _fills(made, position)
        if fills is None:
            continue
        dim, places = fills
        last = max(places, key=position.__getitem__)
        parts = _parts(writes, made, dim, places, last)
        if parts is None:
            continue
        with program.graph.inserting_before(last):
            aten = torch.ops.aten
            read = [
                call(program, made, aten.slice.Tensor, made.args[0], dim, *p) if isinstance(p, tuple) else p
                for p in parts
            ]
            whole = call(program, made, aten.cat.default, read, dim)
        program.refresh()
        if storage_of(made) in fixed and not same_layout(whole.meta["val"], made.meta["val"]):
            for node in (whole, *(n for n in read if n not in parts)):
                program.graph.erase_node(node)  # channels lie last in a cat of parts where they do
            continue
        made.replace_all_uses_with(whole, lambda user, own=places: user not in own.values())  # type: ignore[misc]
        for copy, place in places.items():
            program.graph.erase_node(copy)
            program.graph.erase_node(place)
        program.graph.erase_node(made)
        changed = True
    if changed:
        program.refresh()


def _fills(made: Node, position: dict[Node, int]) -> tuple[int, dict[Node, Node]] | None:
    """The dimension, and the copies that fill parts along it with the place of each; none is read before."""
    places: dict[Node, Node] = {}
    dims = set()
    for place in made.users:
        (write,) = place.users if len(place.users) == 1 else (None,)
        found = None if write is None or written_by(write) != [place] else interval_of(place)
        if found is None or not all(type(n) is int for n in (found[2], value_of(made).shape[found[0]])):  # type: ignore[union-attr]
            continue
        if str(write.target) != "aten.copy_.default" or len(write.args) != 2 or write.kwargs or write.users:  # type: ignore[union-attr]
            return None
        places[write] = place  # type: ignore[index]
        dims.add(found[0])
    if len(dims) != 1:
        return None
    filled, storage = max(map(position.__getitem__, places)), storage_of(made)
    own = {made, *places, *places.values()}
    for node, at in position.items():
        if node in own or storage not in map(storage_of, node.all_input_nodes):
            continue
        if at < filled or storage in map(storage_of, written_by(node)):
            return None
    return dims.pop(), places


def interval_of(place: Node) -> tuple[int, int, Any] | None:
    """Dimension, start and length of a place that is a part of its memory along one dimension."""
    given: tuple[Any, ...] = place.args
    whole, value = value_of(given[0]), value_of(place)
    if whole is None or value is None or place.kwargs or not whole.dim():
        return None
    if str(place.target) == "aten.slice.Tensor":
        dim, start, _, step = given[1:] + (0, None, None, 1)[len(given) - 1 :]
    elif str(place.target) == "aten.narrow.default":
        dim, start, step = given[1], given[2], 1
    else:
        return None
    dim %= whole.dim()
    size, start = whole.shape[dim], 0 if start is None else start
    if step != 1 or type(start) is not int or (type(size) is not int and start < 0):
        return None
    if type(size) is int:
        start = max(start + size, 0) if start < 0 else min(start, size)
    return dim, start, value.shape[dim]


def _parts(
    writes: StorageWrites, made: Node, dim: int, places: dict[Node, Node], last: Node
) -> list[Node | tuple[int, int]] | None:
    """What fills the memory from its start to its end, None if that is unknown; a pair stays as it was."""
    value, at = made.meta["val"], 0
    parts: list[Node | tuple[int, int]] = []
    for (_, start, length), write in sorted((interval_of(place), write) for write, place in places.items()):  # type: ignore[type-var, misc]
        new = write.args[1]
        known = value_of(new)
        if known is None or (known.dtype, known.device) != (value.dtype, value.device) or start < at:
            return None
        if not equal_sizes(known.shape, places[write].meta["val"].shape):
            return None
        if writes.version(new, write) != writes.version(new, last):  # type: ignore[arg-type]
            return None
        parts += [(at, start)] if at < start else []
        parts.append(new)  # type: ignore[arg-type]
        at = start + length
    parts += [(at, value.shape[dim])] if at < value.shape[dim] else []
    before = made.args[0] if str(made.target) == ops.CLONE else None
    gaps = any(isinstance(part, tuple) for part in parts)
    if gaps and (before is None or writes.version(before, made) != writes.version(before, last)):  # type: ignore[arg-type]
        return None
    return parts
