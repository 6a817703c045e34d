"""What a term is the sigmoid of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from fxfuse.patterns import readings
from fxfuse.patterns.addends import addends_of
from fxfuse.patterns.factors import as_multiple, factors_of, negated
from fxfuse.patterns.ops import CONSTANT_COPY, FILLED, SELECT, STACK
from fxfuse.patterns.terms import Items, Term, Virtual, argument_of, uncast


def sigmoid_arguments(term: Term) -> Iterator[Term]:
    """The x of sigmoid(x), in whatever spelling."""
    if isinstance(term, Virtual):
        if term.function == "sigmoid":
            yield term.argument
        elif term.function == "complement":
            yield from _one_minus_sigmoid(term)
    elif str(term.target) == "aten.sigmoid.default":
        yield term.args[0]  # type: ignore[misc]
    elif str(term.target) == "aten.exp.default":
        x = argument_of("log_sigmoid", uncast(term.args[0]))  # type: ignore[arg-type]
        if x is not None:
            yield x
    else:
        yield from _half_of_tanh(term)
        yield from _one_minus_sigmoid(term)
        yield from _first_of_two(term)
        yield from _exp_over_one_plus_exp(term)
        yield from _one_over_one_plus_exp(term)


def _half_of_tanh(term: Term) -> Iterator[Term]:
    """sigmoid(x) = ½·(1 + tanh(½·x)) = ½ + ½·tanh(½·x)."""
    outer = as_multiple(term)
    share, addends = (1.0, addends_of(uncast(outer[1]))) if outer is not None else (0.5, addends_of(term))
    if addends is None or addends[0] != share or len(addends[1]) != 1 or (outer or (0.5,))[0] != 0.5:
        return
    part, times = addends[1][0]
    scaled = as_multiple(part) or (1.0, part)
    x = _doubled_by_tanh(scaled[1]) if times * scaled[0] == share else None
    if x is not None:
        yield x


def _doubled_by_tanh(term: Term) -> Term | None:
    """The x of tanh(x / 2)."""
    half = argument_of("tanh", uncast(term))
    inner = None if half is None else as_multiple(half)
    return inner[1] if inner is not None and inner[0] == 0.5 else None


def doubled_sigmoid(term: Term) -> tuple[float, Items] | None:
    """1 + tanh(x / 2) = 2·sigmoid(x)."""
    addends = None if isinstance(term, Virtual) else addends_of(term)
    if addends is None or addends[0] != 1.0 or len(addends[1]) != 1 or addends[1][0][1] != 1.0:
        return None
    x = _doubled_by_tanh(addends[1][0][0])
    return None if x is None else (2.0, [(Virtual("sigmoid", x), 1.0)])


def _first_of_two(term: Node) -> Iterator[Term]:
    """sigmoid(x) = softmax([x, 0])[0]."""
    inner = term.args[0] if str(term.target) == SELECT else None
    shares: Any = uncast(inner) if isinstance(inner, Node) else None
    if not isinstance(shares, Node) or str(shares.target) != readings.SOFTMAX:
        return
    given: tuple[Any, ...] = (*term.args, *shares.args)
    _, dim, place, scores, along_scores = given[:5]
    stack, dims = uncast(scores), shares.meta["val"].dim()
    if not isinstance(stack, Node) or str(stack.target) != STACK:
        return
    stacked: tuple[Any, ...] = (*stack.args, 0)
    parts, along = stacked[:2]
    if len(parts) != 2 or len({d % dims for d in (dim, along_scores, along)}) != 1:
        return
    x, zero = parts if place in (0, -2) else parts[::-1]
    if _is_zero(zero):
        yield x


def _is_zero(x: Any) -> bool:
    """Whether an argument is 0 or a tensor of zeros."""
    if not isinstance(x, Node):
        return type(x) in (int, float) and x == 0
    made: Any = uncast(x)
    name, place = str(made.target), FILLED.get(str(made.target))
    if name == CONSTANT_COPY:
        kept = made.args[0]
        held = getattr(kept.graph.owning_module, str(kept.target), None) if kept.op == "get_attr" else None
        return type(held) is torch.Tensor and held.numel() == 1 and held.item() == 0
    return name in readings.ZEROS or (place is not None and _is_zero(made.args[place]))


def _exp_over_one_plus_exp(term: Term) -> Iterator[Term]:
    """sigmoid(x) = eˣ / (1 + eˣ)."""
    factors = factors_of(term)
    if factors is None or factors[0] != 1.0 or sorted(power for _, power in factors[1]) != [-1.0, 1.0]:
        return
    (above, _), (below, _) = sorted(factors[1], key=lambda part: -part[1])
    x, y = argument_of("exp", uncast(above)), _one_plus_exp(below)
    if x is not None and y is not None and uncast(x) is uncast(y):
        yield x


def _one_minus_sigmoid(term: Term) -> Iterator[Term]:
    """sigmoid(x) = 1 − sigmoid(−x)."""
    addends = addends_of(term)
    if addends is not None and addends[0] == 1.0 and [times for _, times in addends[1]] == [-1.0]:
        negatives = map(negated, sigmoid_arguments(uncast(addends[1][0][0])))
        yield from (x for x in negatives if x is not None)


def _one_over_one_plus_exp(term: Term) -> Iterator[Term]:
    """sigmoid(x) = 1 / (1 + e⁻ˣ)."""
    factors = factors_of(term)
    if factors is None or factors[0] != 1.0 or [power for _, power in factors[1]] != [-1.0]:
        return
    negative = _one_plus_exp(factors[1][0][0])
    x = None if negative is None else negated(negative)
    if x is not None:
        yield x


def _one_plus_exp(term: Term) -> Term | None:
    """The x of 1 + eˣ."""
    addends = addends_of(uncast(term))
    if addends is None or addends[0] != 1.0 or [times for _, times in addends[1]] != [1.0]:
        return None
    return argument_of("exp", uncast(addends[1][0][0]))
