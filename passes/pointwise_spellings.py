"""Sums and products by another name are spelled as those of two tensors, without signs that cancel.

Before: y = einsum("btd,bt->btd", x, r);  z = glu(cat([a, b], -1));  v = neg(mul(neg(a), b))
After:  y = mul(x, unsqueeze(r, -1));     z = mul(a, sigmoid(b));    v = mul(a, b)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from fxfuse.passes.backward import Backward
from fxfuse.passes.linear_spellings import equation_of, value_of
from fxfuse.passes.modes import modes, switches_autocast
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes, layout_shows, lies_in_rows, storage_of
from fxfuse.patterns import ops

_aten = torch.ops.aten
_DOTS = "ABCDEFGH"  # letters for the dimensions that an ellipsis stands for


@dataclass(frozen=True)
class _Reading:
    """A call, and those before it that it makes needless, as a call of the operands.

    `write` takes a function that writes a call, and returns the target and the arguments of the last one.
    """

    needless: tuple[Node, ...]
    operands: tuple[Node, ...]
    write: Callable[[Any], tuple[Any, tuple[Any, ...]]]


def spell_pointwise(program: Program) -> None:
    """Rewrite in place; what is written stays, and what is read before a write to what it was made of."""
    found = [
        (node, reading)
        for node in program.calls(*_READINGS)
        if (reading := _READINGS[str(node.target)](node))
    ]
    if not found:
        return
    writes, shown = StorageWrites(program.graph), layout_shows(program.graph)
    mode, changed = modes(program.graph, program.grad_enabled), []
    backward = Backward(program)
    for node, reading in found:
        calls, operands = (node, *reading.needless), reading.operands
        if any(writes.is_written(n) or mode[n] != mode[node] for n in calls) or switches_autocast(mode[node]):
            continue
        if any(writes.version(x, n) != writes.version(x, node) for x in operands for n in calls):
            continue
        if any(backward.misses_copy(x, writes) for x in operands):
            continue
        ordered = storage_of(node) in shown and not all(lies_in_rows(x.meta["val"]) for x in operands)
        if storage_of(node) in shown and not lies_in_rows(node.meta["val"]):
            continue
        with program.graph.inserting_before(node):
            new = partial(call, program, node)
            target, args = reading.write(new)
            node.kwargs = {}
            if ordered:
                target, args = _aten.clone.default, (new(target, *args),)
                node.kwargs = {"memory_format": torch.contiguous_format}
            node.target, node.args = target, args
        changed.append(node)
    program.refresh(changed)  # not before: the next may read their sizes


def _einsum(node: Node) -> _Reading | None:
    """Nothing is summed: a product of two tensors. One letter is: a matrix product for each of a batch."""
    parsed = equation_of(node)
    if parsed is None or len(parsed[0]) != 2 or any(c.isupper() for c in str(node.args[0])):
        return None
    operands: Any = node.args[1]
    pairs = zip(parsed[0], operands, strict=True)
    dots = [n.meta["val"].dim() - len(name.replace("...", "")) for name, n in pairs]
    if max(dots) > len(_DOTS):
        return None
    counted = zip((*parsed[0], parsed[1]), (*dots, max(dots)), strict=True)
    a, b, result = (name.replace("...", _DOTS[len(_DOTS) - count :]) for name, count in counted)
    if any(len(set(name)) != len(name) for name in (a, b, result)):
        return None
    summed = (set(a) | set(b)) - set(result)
    if not summed:
        return _elementwise(operands, (a, b), result)
    batch, rows, columns = set(a) & set(b) & set(result), set(a) - set(b), set(b) - set(a)
    if summed <= set(a) & set(b) and batch and len(summed) == len(rows) == len(columns) == 1:
        return _batched(operands, (a, b), result, [*rows, *columns, *summed])
    return None


def _elementwise(operands: Any, names: tuple[str, str], result: str) -> _Reading | None:
    """einsum("…d,…->…d", x, r) = x · r[…, None]"""
    if any(sorted(name, key=result.index) != list(name) for name in names):
        return None

    def write(new: Any) -> tuple[Any, tuple[Any, ...]]:
        aligned = []
        for name, operand in zip(names, operands, strict=True):
            first = result.index(name[0]) if name else len(result)
            for i, letter in enumerate(result):
                if letter not in name and i > first:
                    operand = new(_aten.unsqueeze.default, operand, i - first)
            aligned.append(operand)
        return _aten.mul.Tensor, tuple(aligned)

    return _Reading((), tuple(operands), write)


def _batched(operands: Any, names: tuple[str, str], result: str, own: list[str]) -> _Reading | None:
    """einsum("bhqd,bhkd->bhqk", q, k) = q @ kᵀ"""
    row, column, summed = own
    batch = [letter for letter in result if letter not in own]
    sizes = [
        dict(zip(name, n.meta["val"].shape, strict=True)) for name, n in zip(names, operands, strict=True)
    ]
    if not equal_sizes(*([each[letter] for letter in (*batch, summed)] for each in sizes)):
        return None  # a dimension of size 1 is repeated

    def write(new: Any) -> tuple[Any, tuple[Any, ...]]:
        turned = []
        for name, operand, last in zip(names, operands, (row, column), strict=True):
            order = [name.index(letter) for letter in (*batch, last, summed)]
            straight = order == sorted(order)
            turned.append(operand if straight else new(_aten.permute.default, operand, order))
        right = operands[1] if names[1] == "".join([*batch, summed, column]) else None
        right = new(_aten.transpose.int, turned[1], -2, -1) if right is None else right
        made = [*batch, row, column]
        if list(result) == made:
            return _aten.matmul.default, (turned[0], right)
        y = new(_aten.matmul.default, turned[0], right)
        return _aten.permute.default, (y, [made.index(letter) for letter in result])

    return _Reading((), tuple(operands), write)


def _gated_halves(node: Node) -> _Reading | None:
    """glu(cat([a, b])) = a · sigmoid(b), rounded once."""
    joined, dim = (*node.args, -1)[:2]
    found = _doubled(joined) or _cat(joined)
    if found is None:
        return None
    needless, parts, along = found
    values, dims = [value_of(part) for part in parts], node.meta["val"].dim()
    if len(values) != 2 or dim % dims != along % dims or not equal_sizes(values[0].shape, values[1].shape):  # type: ignore[operator, union-attr]
        return None
    dtype = node.meta["val"].dtype
    if any(value.dtype != dtype for value in values):  # type: ignore[union-attr]
        return None
    a, b = parts

    def write(new: Any) -> tuple[Any, tuple[Any, ...]]:
        if a is b:
            return _aten.silu.default, (a,)
        if dtype in (torch.float32, torch.float64):
            return _aten.mul.Tensor, (a, new(_aten.sigmoid.default, b))
        wide = [new(_aten.to.dtype, x, torch.float32) for x in (a, b)]
        return _aten.to.dtype, (new(_aten.mul.Tensor, wide[0], new(_aten.sigmoid.default, wide[1])), dtype)

    return _Reading(needless, (a, b), write)


def _cat(node: Any) -> tuple[tuple[Node, ...], Any, int] | None:
    """The call, the tensors that it joins, and along which dimension."""
    if not isinstance(node, Node) or str(node.target) != ops.CAT or node.kwargs:
        return None
    given: tuple[Any, ...] = (*node.args, 0)
    return (node,), given[0], given[1]


def _doubled(node: Any) -> tuple[tuple[Node, ...], Any, int] | None:
    """flatten(expand(unsqueeze(x, -2), [-1, …, 2, -1]), -2) = cat([x, x], -1)"""
    calls, x = [], node
    for targets in (ops.RESHAPES | {ops.FLATTEN}, {ops.EXPAND}, {ops.UNSQUEEZE}):
        if not isinstance(x, Node) or str(x.target) not in targets or x.kwargs:
            return None
        calls.append(x)
        x = x.args[0]
    shapes = [value_of(n).shape for n in (*calls, x)]  # type: ignore[union-attr]
    *rows, size = shapes[-1]
    wanted = [*rows, 2 * size], [*rows, 2, size], [*rows, 1, size]
    if not all(map(equal_sizes, shapes, wanted)):
        return None
    return tuple(calls), (x, x), -1


def _unsigned(x: Any) -> Node | None:
    """The y of −y."""
    return x.args[0] if isinstance(x, Node) and str(x.target) == ops.NEG else None  # type: ignore[return-value]


def _signs_of_product(node: Node) -> _Reading | None:
    """−(−a · b · c) = a · b · c, and so for quotients: a sign rounds nothing, but of bytes."""
    way = _way_to_sign(node.args[0])
    if way is None:
        return None
    products, signed = [product for product, _ in way], way[-1][0].args[way[-1][1]]
    x: Any = _unsigned(signed)
    read = dict.fromkeys(n for product in products for n in product.all_input_nodes)
    operands = (x, *(n for n in read if n is not signed and n not in products))

    def write(new: Any) -> tuple[Any, tuple[Any, ...]]:
        y = x
        for product, i in reversed(way[1:]):
            y = new(product.target, *_with(product, i, y))
        return products[0].target, _with(products[0], way[0][1], y)

    return _Reading((*products, signed), operands, write)  # type: ignore[arg-type]


def _with(call: Node, i: int, argument: Any) -> tuple[Any, ...]:
    return (*call.args[:i], argument, *call.args[i + 1 :])


def _way_to_sign(product: Any) -> list[tuple[Node, int]] | None:
    """From a product, by which factors of factors, to one with a sign; nobody else reads the products."""
    if not isinstance(product, Node) or str(product.target) not in _SIGNED or len(product.users) > 1:
        return None
    if product.kwargs or not product.meta["val"].is_floating_point():
        return None
    for i, factor in enumerate(product.args[: _SIGNED[str(product.target)]]):
        x = value_of(_unsigned(factor))
        signed = x is not None and x.is_floating_point()
        if signed and equal_sizes(x.stride(), value_of(factor).stride()):  # type: ignore[union-attr]
            return [(product, i)]
        below = _way_to_sign(factor)
        if below is not None:
            return [(product, i), *below]
    return None


def _sum_of_two(node: Node) -> _Reading | None:
    """sum(stack([a, b], d), [d]) = a + b."""
    own: tuple[Any, ...] = (*node.args, None)
    stack, dims = own[:2]
    if not isinstance(stack, Node) or str(stack.target) != ops.STACK or node.kwargs or len(node.args) != 2:
        return None
    given: tuple[Any, ...] = (*stack.args, 0)
    parts, along = given[:2]
    value = stack.meta["val"]
    if (
        len(parts) != 2
        or not value.is_floating_point()
        or [d % value.dim() for d in dims] != [along % value.dim()]
    ):
        return None
    if any(part.meta["val"].dtype != value.dtype for part in parts):
        return None
    return _Reading((stack,), tuple(parts), lambda new: (_aten.add.Tensor, tuple(parts)))


# Calls that hand on the signs of so many of their first arguments.
_SIGNED = {ops.MUL: 2, ops.DIV: 2, "aten.to.dtype": 1}
_READINGS = {
    ops.EINSUM: _einsum,
    "aten.glu.default": _gated_halves,
    ops.NEG: _signs_of_product,
    "aten.sum.dim_IntList": _sum_of_two,
}
