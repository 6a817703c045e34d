"""What a term is the softplus of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch.fx import Node

from fxfuse.patterns import readings
from fxfuse.patterns.addends import addends_of
from fxfuse.patterns.factors import negated
from fxfuse.patterns.positive_part import is_zero, positive_part_arguments
from fxfuse.patterns.sigmoid import one_plus_exp
from fxfuse.patterns.terms import Term, Virtual, argument_of, uncast


def softplus_arguments(term: Term) -> Iterator[Term]:
    """The x of softplus(x), in whatever spelling."""
    yield from (x for x in _candidates(term) if x is not None)


def _candidates(term: Term) -> Iterator[Any]:
    """softplus(x) = log(1 + eˣ) = −log σ(−x) = log(eˣ + e⁰) = x + softplus(−x) = relu(x) + softplus(−|x|)."""
    if isinstance(term, Virtual):
        yield negated(term.argument) if term.function == "softplus of minus" else None
        return
    name, arguments = str(term.target), cast("Any", term.args)
    if name == "aten.softplus.default":
        yield arguments[0] if arguments[1:] in ((), (1,), (1, 20)) and not term.kwargs else None
    elif name == "aten.log1p.default":
        yield argument_of("exp", uncast(arguments[0]))
    elif name == "aten.log.default":
        yield one_plus_exp(arguments[0])
    elif name == "aten.logaddexp.default":
        for x, zero in (arguments, arguments[::-1]):
            if isinstance(x, Node) and is_zero(zero):
                yield x
    elif name == "aten.where.self":
        yield from _where_small(*arguments)
    else:
        logarithm = negated(term)
        minus = None if logarithm is None else argument_of("log_sigmoid", uncast(logarithm))
        yield None if minus is None else negated(minus)
        yield from _plus_softplus_of_minus(term)


def _where_small(condition: Any, x: Any, small: Any) -> Iterator[Term]:
    """where(x > t, x, softplus(x)), or the other way round, for a t past which both round to the same."""
    if not all(isinstance(n, Node) for n in (condition, x, small)):
        return
    if str(condition.target) in readings.BELOW:
        x, small = small, x
    elif str(condition.target) not in readings.ABOVE:
        return
    compared, threshold = condition.args[:2]
    if not isinstance(threshold, (int, float)) or threshold < readings.SOFTPLUS_IS_LINEAR:
        return
    for argument in softplus_arguments(uncast(small)):
        if _unbounded(argument, threshold) is uncast(x) is uncast(compared):
            yield x


def _unbounded(term: Term, least: float) -> Term:
    """The x of min(x, c) for a c past which nobody looks."""
    given: Any = uncast(term)
    arguments = given.args if isinstance(given, Node) and not given.kwargs else ()
    if not arguments or readings.UPPER_BOUNDS.get(str(given.target)) != len(arguments):
        return given  # type: ignore[no-any-return]
    x, *lower, bound = arguments
    alone = lower in ([], [None]) and isinstance(bound, (int, float)) and bound >= least
    return uncast(x) if alone else given  # type: ignore[arg-type, no-any-return]


def _plus_softplus_of_minus(term: Term) -> Iterator[Term]:
    """x + softplus(−x), relu(x) + softplus(−|x|)."""
    addends = addends_of(term)
    if addends is None or addends[0] != 0.0 or len(addends[1]) != 2:
        return
    for (first, times), (rest, sign) in (addends[1], addends[1][::-1]):
        own = uncast(rest)
        minus = argument_of("log_sigmoid", own) if sign == -1.0 else None  # x − log σ(x)
        if minus is None:
            found = map(negated, softplus_arguments(own)) if sign == 1.0 else ()
            minus = next((y for y in found if y is not None), None)
        if times != 1.0 or minus is None:
            continue
        size = argument_of("abs", uncast(minus))
        for x in [first] if size is None else positive_part_arguments(uncast(first)):
            if uncast(x) is uncast(minus if size is None else size):
                yield x
