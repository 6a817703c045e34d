"""What a term is the positive part of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.fx import Node

from fxfuse.patterns import readings
from fxfuse.patterns.factors import factors_of
from fxfuse.patterns.ops import CONSTANT_COPY, FILLED
from fxfuse.patterns.terms import Term, uncast


def positive_part_arguments(term: Term) -> Iterator[Term]:
    """The x of relu(x) = max(x, 0) = x·(x > 0), in whatever spelling."""
    if not isinstance(term, Node) or term.kwargs:
        return
    name, arguments = str(term.target), cast("Any", term.args)
    bounds = name in readings.LOWER_BOUNDS and arguments[2:] in ((), (None,)) and is_zero(arguments[1])
    if bounds or name == "aten.relu.default":
        yield arguments[0]
    elif name in readings.LARGER:
        yield from (x for x, zero in (arguments, arguments[::-1]) if is_zero(zero))
    elif name in readings.CHOICES:
        condition, x, zero = arguments
        yield from [x] if is_zero(zero) and _shows_positive(condition, x) else []
    else:
        yield from _times_its_sign(term)


def is_zero(x: Any) -> bool:
    """Whether an argument is 0 or a tensor of zeros."""
    if not isinstance(x, Node):
        return type(x) in (int, float) and x == 0
    made: Any = uncast(x)
    name, place = str(made.target), FILLED.get(str(made.target))
    if name == CONSTANT_COPY:
        kept = made.args[0]
        held = getattr(kept.graph.owning_module, str(kept.target), None) if kept.op == "get_attr" else None
        return type(held) is torch.Tensor and held.numel() == 1 and held.item() == 0
    return name in readings.ZEROS or (place is not None and is_zero(made.args[place]))


def _times_its_sign(term: Node) -> Iterator[Term]:
    factors = factors_of(term)
    if factors is None or factors[0] != 1.0 or [power for _, power in factors[1]] != [1.0, 1.0]:
        return
    (first, _), (second, _) = factors[1]
    yield from (x for x, sign in ((first, second), (second, first)) if _shows_positive(sign, x))


def _shows_positive(condition: Any, x: Term) -> bool:
    """Whether a term is x > 0, as a number or not."""
    while isinstance(condition, Node) and str(condition.target) in readings.CASTS:
        condition = condition.args[0]
    if not isinstance(condition, Node) or str(condition.target) not in readings.ABOVE:
        return False
    compared, threshold = condition.args[:2]
    return is_zero(threshold) and uncast(compared) is uncast(x)  # type: ignore[arg-type]
