"""A weight whose rows or columns stand by heads in an einsum is a matrix.

Before: q = einsum("bti,hki->bthk", x, view(w, [h, k, i]))
        y = einsum("bthk,ohk->bto", z, view(w, [o, h, k]))
After:  q = unflatten(einsum("bti,oi->bto", x, w), -1, [h, k])
        y = einsum("btj,oj->bto", flatten(z, -2), w)
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.backward import Backward
from fxfuse.passes.linear_spellings import equation_of, is_input
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes, is_contiguous, layout_shows, storage_of
from fxfuse.patterns import ops


def join_heads_of_weights(program: Program) -> None:
    """Rewrite in place where the weight is a view of an input of the graph."""
    writes, shown, changed = StorageWrites(program.graph), layout_shows(program.graph), []
    backward = Backward(program)
    for node in program.calls(ops.EINSUM):
        parsed = equation_of(node)
        if parsed is None or len(parsed[0]) != 2 or any("." in name for name in parsed[0]):
            continue
        operands: Any = node.args[1]
        pairs = list(zip(operands, parsed[0], strict=True))
        for (x, rows), (weight, letters) in (pairs, pairs[::-1]):
            matrix = _matrix(weight)
            if (
                matrix is None
                or backward.parts(node, weight)
                or any(writes.is_written(n) for n in (node, x, weight))
            ):
                continue
            if not equal_sizes(_sizes(x, rows, letters), _sizes(weight, letters, rows)):
                continue  # a dimension of size 1 is repeated
            if storage_of(node) in shown and not is_contiguous(node.meta["val"]):
                continue
            if _rewrite(program, node, x, rows, matrix, letters, parsed[1]):
                changed.append(node)
                break
    program.refresh(changed)  # not before: the next may read their sizes


def _sizes(operand: Node, own: str, other: str) -> list[Any]:
    """Of the dimensions that both operands have, by the order of their letters."""
    named = dict(zip(own, operand.meta["val"].shape, strict=True))
    return [named[letter] for letter in sorted(set(own) & set(other))]


def _matrix(weight: Node) -> tuple[Node, int] | None:
    """The input [O, I] that a weight [h, k, I] or [O, h, k] shows, and which of its dimensions is in two."""
    made = isinstance(weight, Node) and str(weight.target) in ops.RESHAPES | {ops.UNFLATTEN}
    source: Any = weight.args[0] if made else None
    if source is None or not is_input(source) or storage_of(source) != storage_of(weight):
        return None
    value, own = weight.meta["val"], source.meta["val"]
    if value.dim() != 3 or not isinstance(own, Tensor) or own.dim() != 2 or not is_contiguous(own):
        return None
    a, b, c = value.shape
    if not all(type(size) is int for size in (a, b, c)):
        return None
    if equal_sizes(own.shape, (a * b, c)):
        return source, 0
    return (source, 1) if equal_sizes(own.shape, (a, b * c)) else None


def _rewrite(
    program: Program, node: Node, x: Node, rows: str, matrix: tuple[Node, int], letters: str, result: str
) -> bool:
    """Whether each letter stands where a linear has it."""
    (source, split), aten = matrix, torch.ops.aten
    spare = next(letter for letter in "abcdefghijkl" if letter not in rows + letters)
    if len(set(letters)) != 3 or len(set(rows)) != len(rows):
        return False
    own, other = (letters[:2], letters[2]) if split == 0 else (letters[1:], letters[0])
    if split == 0 and rows.endswith(other) and result == rows[:-1] + own and not set(own) & set(rows):
        with program.graph.inserting_before(node):
            equation = f"{rows},{spare}{other}->{rows[:-1]}{spare}"
            whole = call(program, node, aten.einsum.default, equation, [x, source])
        sizes = [node.meta["val"].shape[-2], node.meta["val"].shape[-1]]
        node.target, node.args, node.kwargs = aten.unflatten.int, (whole, -1, sizes), {}
    elif split == 1 and rows.endswith(own) and result == rows[:-2] + other and other not in rows:
        with program.graph.inserting_before(node):
            flat = call(program, node, aten.flatten.using_ints, x, -2, -1)
        node.args = (f"{rows[:-2]}{spare},{other}{spare}->{result}", [flat, source])
    else:
        return False
    return True
