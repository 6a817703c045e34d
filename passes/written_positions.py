"""Writes at positions along one dimension are spelled as index_copy_.

Before: index_put_(cache, [None, None, positions], k)                  cache[:, :, positions] = k
        scatter_(cache, 2, expand(view(positions, [T, 1]), [B, H, T, D]), k)
After:  index_copy_(cache, 2, where(positions < 0, positions + length, positions), k)
        index_copy_(cache, 2, positions, k)

index_put_ counts negative positions from the end, index_copy_ and our kernels take none.
"""

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.linear_spellings import value_of
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes
from fxfuse.patterns import ops
from fxfuse.patterns.readings import BROADCASTS


def spell_written_positions(program: Program) -> None:
    """Rewrite in place; writes that broadcast, add up or go by several indices stay."""
    aten, changed = torch.ops.aten, False
    writes = StorageWrites(program.graph)
    known: dict[tuple[Any, ...], Node] = {}
    for node in program.calls(ops.INDEX_PUT_):
        found = _along_one_dimension(node)
        if found is None:
            continue
        cache, dim, positions, values = found
        length: Any = cache.meta["val"].shape[dim]
        size = length.node.expr if isinstance(length, torch.SymInt) else length
        key = positions, writes.version(positions, node), size
        if key not in known:
            with program.graph.inserting_before(node):
                if isinstance(length, torch.SymInt):
                    length = call(program, node, aten.sym_size.int, cache, dim)
                negative = call(program, node, aten.lt.Scalar, positions, 0)
                from_end = call(program, node, aten.add.Tensor, positions, length)
                known[key] = call(program, node, aten.where.self, negative, from_end, positions)
        missing = cache.meta["val"].dim() - values.meta["val"].dim()
        with program.graph.inserting_before(node):
            for _ in range(missing):
                values = call(program, node, aten.unsqueeze.default, values, 0)
        node.target, node.args = aten.index_copy_.default, (cache, dim, known[key], values)
        changed = True
    if _scattered(program, writes) or changed:
        program.refresh()


def _along_one_dimension(node: Node) -> tuple[Node, int, Node, Node] | None:
    """What is written, the dimension, the positions [T] along it, and values of its shape but for that."""
    cache, indices, values, *accumulates = node.args
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]  # type: ignore[arg-type, union-attr]
    if len(given) != 1 or any(accumulates) or node.kwargs:
        return None
    dim, positions = given[0]
    whole, part, places = (value_of(n) for n in (cache, values, positions))
    if whole is None or part is None or places is None or places.dim() != 1 or places.dtype != torch.int64:
        return None
    wanted = [*whole.shape[:dim], places.shape[0], *whole.shape[dim + 1 :]]
    # x[:, :, p] = v leaves out the first dimensions of one element.
    single = wanted[: len(wanted) - part.dim()]
    if part.dtype != whole.dtype or not equal_sizes([*single, *part.shape], wanted):
        return None
    if any(not statically_known_true(size == 1) for size in single):
        return None
    return cache, dim, positions, values  # type: ignore[return-value]


def _scattered(program: Program, writes: StorageWrites) -> bool:
    """scatter_(cache, d, expand(view(p, …)), k) -> index_copy_(cache, d, p, k): neither takes negatives."""
    changed = False
    for node in program.calls(ops.SCATTER_):
        given: tuple[Any, ...] = node.args
        cache, dim, places, values = given
        whole, index, part, position = (value_of(n) for n in (cache, places, values, _of_one(places)))
        if whole is None or index is None or part is None or position is None or node.kwargs:
            continue
        dim, source = dim % whole.dim(), _of_one(places)
        wanted = [*whole.shape[:dim], position.shape[0], *whole.shape[dim + 1 :]]
        steps = [stride for i, stride in enumerate(index.stride()) if i != dim and index.shape[i] != 1]
        alike = equal_sizes(part.shape, wanted) and equal_sizes(index.shape, wanted)
        if part.dtype != whole.dtype or not alike or any(steps) or index.dtype != torch.int64:
            continue
        if writes.is_written(places) or writes.is_written(source):  # type: ignore[arg-type]
            continue
        node.target, node.args = torch.ops.aten.index_copy_.default, (cache, dim, source, values)
        changed = True
    return changed


def _of_one(places: Any) -> Any:
    """The positions [T] that are repeated along other dimensions, all of them."""
    while isinstance(places, Node) and places.meta["val"].dim() > 1 and str(places.target) in BROADCASTS:
        source: Any = places.args[0]
        sizes = [n.meta["val"].shape for n in (places, source)]
        if str(places.target) == "aten.slice.Tensor" and not equal_sizes(*sizes):
            return None
        places = source
    value = value_of(places)
    return places if value is not None and value.dim() == 1 else None
