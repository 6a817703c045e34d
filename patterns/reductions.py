"""What a term is the mean or the sum of, over the last dimension."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.patterns.factors import factors_of, is_last, may_raise, merged
from fxfuse.patterns.ops import EINSUM, FILLED, LINEAR, MATMUL, SELECT, SQUEEZE, UNSQUEEZE, VIEWS
from fxfuse.patterns.terms import Term, Virtual, before_casts, uncast

_REDUCTIONS = {"aten.mean.dim": "mean", "aten.sum.dim_IntList": "sum"}


def reduced_arguments(function: str, term: Term) -> Iterator[Term]:
    """The x of mean(x, -1, keepdim=True), sum(x, -1, keepdim=True) / n and their like; or of its sum."""
    if isinstance(term, Virtual):
        if term.function == function:
            yield term.argument
        return
    number, power, part = 1.0, 1.0, before_casts(term)
    while True:
        summed = (_summed(part) or _summed(uncast(part))) if power == 1.0 else None
        if summed is not None:
            of, x, count = summed
            pulled = _without_number(x)
            if pulled is not None:
                number, x = number * pulled[0], pulled[1]
            share = (1 / number if number else 0.0) if function == "mean" else number
            whole, wanted = round(share) if abs(share) < 2**53 else 0, 1 if of == function else count
            if math.isclose(share, whole, rel_tol=1e-6) and statically_known_true(whole == wanted):
                yield x
            return
        factors = factors_of(uncast(part))
        if factors is None or len(factors[1]) != 1 or not (power == int(power) or factors[0] > 0):
            return
        number *= factors[0] ** power
        part, power = before_casts(factors[1][0][0]), power * factors[1][0][1]


def _without_number(term: Term) -> tuple[float, Term] | None:
    """A number and the power of one thing that it multiplies, for (x / √n)²."""
    number, items = 1.0, merged([(term, 1.0)])
    while len(items) == 1:
        factors = factors_of(uncast(items[0][0]))
        if factors is None or not may_raise(factors, items[0][1]):
            break
        power = items[0][1]
        number *= factors[0] ** power
        items = merged([(part, p * power) for part, p in factors[1]])
    if number == 1.0 or len(items) != 1:
        return None
    return number, Virtual("power", *items[0])


def _summed(term: Term) -> tuple[str, Term, Any] | None:
    """What a term is the sum or mean of over the last dimension, which it keeps, and how much there is."""
    x: Any = None
    if isinstance(term, Virtual):
        x = term.argument if term.function == "squares" else None
    elif str(term.target) == UNSQUEEZE and term.args[1] in (-1, term.meta["val"].dim() - 1):
        x = _squared_and_summed(term.args[0])
    elif str(term.target) in (SELECT, SQUEEZE):
        x = _row_times_itself(term.args[0], term.args[1])
    elif str(term.target) in (LINEAR, MATMUL):
        return _weighted_alike(term)
    elif str(term.target) in _REDUCTIONS and _over_last(term):
        given: Any = term.args[0]
        return _REDUCTIONS[str(term.target)], given, given.meta["val"].shape[-1]
    return None if x is None else ("sum", Virtual("power", x, 2.0), x.meta["val"].shape[-1])


def _weighted_alike(product: Node) -> tuple[str, Term, Any] | None:
    """The x of x @ full([n, 1], c): for c = 1 its sum, for 1 / n its mean."""
    x, weight, *bias = product.args
    while isinstance(weight, Node) and str(weight.target) in VIEWS:
        weight = weight.args[0]
    if bias or not isinstance(weight, Node) or str(weight.target) not in FILLED or product.kwargs:
        return None
    place, count = FILLED[str(weight.target)], x.meta["val"].shape[-1]  # type: ignore[union-attr]
    number: Any = 1.0 if place is None else weight.args[place]
    if product.meta["val"].shape[-1] != 1 or not statically_known_true(weight.meta["val"].numel() == count):
        return None
    if number == 1:
        return "sum", x, count  # type: ignore[return-value]
    whole = round(1 / number) if isinstance(number, float) and 2**-53 < number < 1 else 0
    alike = statically_known_true(count == whole) and math.isclose(number * whole, 1)
    return ("mean", x, count) if alike else None  # type: ignore[return-value]


def _row_times_itself(product: Any, dim: Any) -> Node | None:
    """The x of (x[…, None, :] @ x[…, None])[…, 0], of whose two single dimensions one is left."""
    if not isinstance(product, Node) or str(product.target) != MATMUL:
        return None
    dims, operands = product.meta["val"].dim(), []
    for operand, place in zip(product.args, (-2, -1), strict=True):
        if not isinstance(operand, Node) or str(operand.target) != UNSQUEEZE:
            return None
        if operand.args[1] not in (place, operand.meta["val"].dim() + place):
            return None
        operands.append(operand.args[0])
    row, column = operands
    return row if row is column and dim in (-1, -2, dims - 1, dims - 2) else None  # type: ignore[return-value]


def _squared_and_summed(node: Any) -> Node | None:
    """The x of vecdot(x, x), einsum("…h,…h->…", x, x) and (x[…, None, :] @ x[…, None])[…, 0, 0]."""
    if isinstance(node, Node) and str(node.target) in (SELECT, SQUEEZE) and isinstance(node.args[0], Node):
        inner = node.args[0]
        last = node.args[1] in (-1, node.meta["val"].dim())
        return _row_times_itself(*inner.args[:2]) if last and str(inner.target) in (SELECT, SQUEEZE) else None
    if isinstance(node, Node) and str(node.target) == "aten.linalg_vecdot.default":
        operands: Any = node.args
        return operands[0] if len(operands) == 2 and operands[0] is operands[1] and not node.kwargs else None
    if not isinstance(node, Node) or str(node.target) != EINSUM or len(node.args) != 2:
        return None
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    given, _, result = equation.partition("->")
    names = given.split(",")
    same = len(operands) == len(names) == 2 and operands[0] is operands[1] and names[0] == names[1]
    letters = names[0].replace(".", "")
    distinct = len(set(letters)) == len(letters) and not names[0].endswith(".")
    return operands[0] if same and distinct and result == names[0][:-1] else None


def _over_last(node: Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return is_last(node.args[0], dims, keeps)
