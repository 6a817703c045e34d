"""Which addends a term is a sum of, and which sums are products."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxfuse.patterns import readings
from fxfuse.patterns.factors import factors_of
from fxfuse.patterns.terms import Items, Term, Virtual, uncast


def addends_of(term: Term) -> tuple[float, Items] | None:
    """A number and what is added to it, with coefficients."""
    if isinstance(term, Virtual):
        sign = {"shifted": 1.0, "complement": -1.0}.get(term.function)
        return None if sign is None else (term.constant, [(term.argument, sign)])
    scaled = factors_of(term)
    if scaled is not None:  # -x and 2·x, as a term
        number, parts = scaled
        return (0.0, [(parts[0][0], number)]) if len(parts) == 1 and parts[0][1] == 1.0 else None
    if str(term.target) not in readings.SUMS or len(term.args) < 2:
        return None
    a, b, *rest = term.args
    alpha = rest[0] if rest else term.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or set(term.kwargs) - {"alpha"}:
        return None
    first, second = readings.SUMS[str(term.target)]
    weights = (first * (alpha if first < 0 else 1), second * (1 if first < 0 else alpha))
    number, parts = 0.0, []
    for operand, weight in zip((a, b), weights, strict=True):
        if isinstance(operand, Node):
            parts.append((operand, float(weight)))
        elif isinstance(operand, (int, float)):
            number += operand * weight
        else:
            return None
    return number, parts  # type: ignore[return-value]


def distributed(term: Term) -> tuple[float, Items] | None:
    """x + x·w and addcmul(x, x, w) as x·(1 + w), x − x·w as x·(1 − w)."""
    if isinstance(term, Virtual):
        return None
    if str(term.target) == "aten.addcmul.default" and not term.kwargs and len(term.args) == 3:
        operands: tuple[Any, ...] = term.args
        added, *product = operands
        rests = [w for y, w in (product, product[::-1]) if uncast(y) is uncast(added)]
        return (1.0, [(added, 1.0), (Virtual("shifted", rests[0], 1.0), 1.0)]) if rests else None
    addends = addends_of(term)
    if addends is None or addends[0] != 0.0 or len(addends[1]) != 2:
        return None
    for (x, one), (product_of, sign) in (addends[1], addends[1][::-1]):
        found = factors_of(uncast(product_of))
        if one != 1.0 or abs(sign) != 1.0 or found is None:
            continue
        if found[0] != 1.0 or [power for _, power in found[1]] != [1.0, 1.0]:
            continue
        (y, _), (z, _) = found[1]
        rest = z if uncast(y) is uncast(x) else y if uncast(z) is uncast(x) else None
        if rest is not None:
            return 1.0, [(x, 1.0), (Virtual("shifted" if sign > 0 else "complement", rest, 1.0), 1.0)]
    return None
