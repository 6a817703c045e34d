"""Caches of keys and values in front of attention are spelled as [B, H, L, D], written at positions.

Before: copy_(slice(cache, 2, 3, 7), k); attention(q, cache, …)
        index_copy_(cache, 1, positions, k); attention(q, transpose(cache, 1, 2), …)
        transpose(cat([past, k], 1), 1, 2)
After:  attention(q, index_copy_(cache, 2, arange(3, 7), k), …)
        index_copy_(transpose(cache, 1, 2), 2, positions, transpose(k, 1, 2))
        transpose(cat([past, transpose(transpose(k, 1, 2), 1, 2)], 1), 1, 2)
"""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from fxfuse.passes.filled_memory import interval_of
from fxfuse.passes.known_sizes import size_of_inputs
from fxfuse.passes.linear_spellings import value_of
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call, writers_of
from fxfuse.passes.storage_writes import equal_sizes, is_idle_view, same_layout, storage_of
from fxfuse.patterns import ops
from fxfuse.patterns import readings as readings_of

INDEX_COPY = "aten.index_copy_.default"


def origin_of(node: Node) -> tuple[Node, bool]:
    """The write, input or new tokens behind a key or value; and whether that is [B, L, H, D].

    Between them lie cuts, repeats, turns, and a cat with older ones.
    """
    turned, passed = False, [(node, False)]
    while True:
        source: Any = None
        if str(node.target) in readings_of.REPEATS or is_idle_view(node):
            source = node.args[0]
        elif _is_turn(node):
            source, turned = node.args[0], not turned
        elif str(node.target) == ops.CAT and node.args[1:] in (((1,), (-3,)) if turned else ((2,), (-2,))):
            source, passed = node.args[0][-1], []  # type: ignore[index]
        if value_of(source) is None or value_of(source).dim() < 4:  # type: ignore[union-attr]
            break
        node = source
        passed.append((node, turned and not _has_one_order(node)))
    if node.op == "placeholder" or str(node.target) == INDEX_COPY:
        return node, turned
    seen = (each for each in reversed(passed) if not each[1] and value_of(each[0]).dim() == 4)  # type: ignore[union-attr]
    return next(seen, passed[0] if passed else (node, turned))


def _has_one_order(node: Node) -> bool:
    """Whether heads and tokens are one each, so that to turn them changes nothing."""
    return equal_sizes(node.meta["val"].shape[1:3], (1, 1))


def _is_turn(node: Node) -> bool:
    """Whether a view has the second and the third of its input's four dimensions in each other's place."""
    source = node.args[0] if str(node.target) in ops.VIEWS else None
    value = value_of(source)
    if value is None or value.dim() != 4 or storage_of(node) != storage_of(source):  # type: ignore[arg-type]
        return False
    return same_layout(node.meta["val"], value.transpose(1, 2))


def spell_caches(program: Program, read: Iterable[Node]) -> None:
    """Rewrite in place the caches from which `read` come, keys and values of attention."""
    positions: dict[tuple[Any, ...], Node] = {}
    for node in read:
        origin, turned = origin_of(node)
        if origin.op == "placeholder" and _by_positions(program, origin, 1 if turned else 2, positions):
            program.refresh()
            origin, turned = origin_of(node)
        if turned:
            if str(origin.target) == INDEX_COPY and origin.args[1] in (1, -3):
                _turned_write(program, origin)
            else:
                _turned_tokens(program, origin)
            program.refresh()


def _by_positions(program: Program, cache: Node, dim: int, known: dict[tuple[Any, ...], Node]) -> bool:
    """The one copy into consecutive places of an input, as a write at positions, read from then on."""
    writers = writers_of(program.graph).get(storage_of(cache), [])
    write = writers[0] if len(writers) == 1 else None
    if write is None or str(write.target) != "aten.copy_.default" or len(write.args) != 2 or write.users:
        return False
    place, values = write.args
    if value_of(values) is None or place.args[:1] != (cache,):  # type: ignore[union-attr]
        return False
    given, new, part = place.meta["val"], value_of(values), interval_of(place)  # type: ignore[arg-type, union-attr]
    if part is None or part[0] != dim or given.dim() != 4 or storage_of(values) == storage_of(cache):  # type: ignore[arg-type]
        return False
    alike = (new.dtype, new.device) == (given.dtype, given.device)  # type: ignore[union-attr]
    if not alike or not equal_sizes(new.shape, given.shape):  # type: ignore[union-attr]
        return False
    aten, (start, size) = torch.ops.aten, part[1:]
    first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    span = (start, str(size), given.device)
    if span not in known:
        length = size_of_inputs(program, size)
        if length is None:
            return False
        with program.graph.inserting_before(first):
            end = start + size
            if isinstance(length, Node):
                end = program.graph.call_function(operator.add, (start, length))
                end.meta["val"] = start + size
            known[span] = program.graph.call_function(
                aten.arange.start, (start, end), {"dtype": torch.int64, "device": given.device}
            )
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    with program.graph.inserting_before(write):
        written = call(program, write, aten.index_copy_.default, cache, dim, known[span], values)
    cache.replace_all_uses_with(written, lambda user: position.get(user, -1) > position[write])
    program.graph.erase_node(write)
    if not place.users:  # type: ignore[union-attr]
        program.graph.erase_node(place)  # type: ignore[arg-type]
    return True


def _turned_write(program: Program, write: Node) -> None:
    aten = torch.ops.aten
    given: Any = write.args[0]
    positions, values = write.args[2:]
    first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with program.graph.inserting_before(first if given.op == "placeholder" else write):
        cache = call(program, write, aten.transpose.int, given, 1, 2)
    with program.graph.inserting_before(write):
        values = call(program, write, aten.transpose.int, values, 1, 2)
        new = call(program, write, aten.index_copy_.default, cache, 2, positions, values)
        back = call(program, write, aten.transpose.int, new, 1, 2)
    write.replace_all_uses_with(given, lambda user: user.op == "output")
    write.replace_all_uses_with(back)
    program.graph.erase_node(write)


def _turned_tokens(program: Program, tokens: Node) -> None:
    aten, users = torch.ops.aten, [user for user in tokens.users if user.op != "output"]
    with program.graph.inserting_after(tokens):
        turned = call(program, tokens, aten.transpose.int, tokens, 1, 2)
    for user in users:
        with program.graph.inserting_before(user):
            back = call(program, tokens, aten.transpose.int, turned, 1, 2)
        user.replace_input_with(tokens, back)
