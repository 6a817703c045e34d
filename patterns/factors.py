"""Which factors a term is a product of: `div(x, sqrt(y))` is x·y^-½, `silu(x)` is x·sigmoid(x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from fxfuse.patterns.terms import Items, Term, Virtual, argument_of, uncast


def factors_of(term: Term) -> tuple[float, Items] | None:
    """A number and what it multiplies, with exponents."""
    if isinstance(term, Virtual):
        return (1.0, [(term.argument, term.constant)]) if term.function == "power" else None
    reading = _FACTORS.get(str(term.target))
    return reading(*term.args) if reading is not None and _plain(term) else None


def as_multiple(term: Term) -> tuple[float, Term] | None:
    """A number and the one thing that it multiplies."""
    factors = factors_of(uncast(term))
    if factors is None or len(factors[1]) != 1 or factors[1][0][1] != 1.0:
        return None
    return factors[0], factors[1][0][0]


def negated(term: Term) -> Term | None:
    scaled = as_multiple(term)
    return scaled[1] if scaled is not None and scaled[0] == -1.0 else None


def may_raise(factors: tuple[float, Items], power: float) -> bool:
    """(x^a)^b = x^(a·b) for every real x: whole b, or one factor that is no even power."""
    number, parts = factors
    return power == int(power) or (len(parts) == 1 and parts[0][1] in (1.0, -1.0) and number > 0)


def merged(items: Items) -> Items:
    """Each factor once, with the sum of its exponents."""
    powers: dict[Term, float] = {}
    terms: dict[Term, Term] = {}
    for term, power in items:
        key = uncast(term)
        powers[key] = powers.get(key, 0.0) + power
        terms.setdefault(key, term)
    return [(_unsigned(terms[key], power), power) for key, power in powers.items() if power]


def _unsigned(term: Term, power: float) -> Term:
    """|x|² = x²."""
    size = argument_of("abs", uncast(term)) if power == 2.0 else None
    return term if size is None else size


def _plain(node: Node) -> bool:
    return node.op == "call_function" and not (set(node.kwargs) - {"dtype", "keepdim"})


def _operands(*operands: tuple[Any, float]) -> tuple[float, Items] | None:
    number, parts = 1.0, []
    for operand, power in operands:
        if isinstance(operand, Node):
            parts.append((operand, power))
        elif isinstance(operand, (int, float)) and not isinstance(operand, bool) and operand != 0:
            number *= float(operand) ** power
        else:
            return None
    return number, parts  # type: ignore[return-value]


def _einsum_factors(equation: Any, operands: Any, *path: Any) -> tuple[float, Items] | None:
    """einsum("…d,d->…d", x, w) = x·w: nothing is summed, and w is repeated as in a product."""
    given, _, result = str(equation).replace(" ", "").partition("->")
    names, letters = given.split(","), result.removeprefix("...")
    if path or len(names) != 2 or len(operands) != 2 or result not in names or "." in letters:
        return None
    broadcast = all(name == result or (letters.endswith(name) and name) for name in names)
    if not broadcast or len(set(letters)) != len(letters):
        return None
    return _operands(*((operand, 1.0) for operand in operands))


def _root_of_squares(x: Any, order: Any = 2, *rest: Any) -> tuple[float, Items] | None:
    if order not in (2, None) or not isinstance(x, Node) or not is_last(x, *rest[:2]) or rest[2:]:
        return None
    return 1.0, [(Virtual("squares", x), 0.5)]


def is_last(x: Any, dims: Any = None, keeps: Any = False) -> bool:
    """Whether a reduction of x is along the last dimension only, and keeps it."""
    last = x.meta["val"].dim() - 1
    return keeps is True and isinstance(dims, (list, tuple)) and [d % (last + 1) for d in dims] == [last]


def _rms_norm_factors(x: Any, shape: Any, weight: Any = None, eps: Any = None) -> tuple[float, Items] | None:
    if len(shape) != 1 or eps is None:
        return None
    inverse = Virtual("shifted", Virtual("mean", Virtual("power", x, 2.0)), float(eps))
    return 1.0, [(x, 1.0), (inverse, -0.5), *([] if weight is None else [(weight, 1.0)])]


def _exp_of_logarithm(x: Any) -> tuple[float, Items] | None:
    """exp(c·log(x)) = x^c; of a negative x neither is a number unless c is whole."""
    scaled = as_multiple(x) if isinstance(x, Node) else None
    base = None if scaled is None else argument_of("log", uncast(scaled[1]))
    if scaled is None or base is None or scaled[0] == int(scaled[0]):
        return None
    return 1.0, [(base, scaled[0])]


_FACTORS: dict[str, Callable[..., tuple[float, Items] | None]] = {
    "aten.mul.Tensor": lambda a, b: _operands((a, 1.0), (b, 1.0)),
    "aten.mul.Scalar": lambda a, b: _operands((a, 1.0), (b, 1.0)),
    "aten.div.Tensor": lambda a, b: _operands((a, 1.0), (b, -1.0)),
    "aten.div.Scalar": lambda a, b: _operands((a, 1.0), (b, -1.0)),
    "aten.neg.default": lambda a: (-1.0, [(a, 1.0)]),
    "aten.square.default": lambda a: (1.0, [(a, 2.0)]),
    "aten.sqrt.default": lambda a: (1.0, [(a, 0.5)]),
    "aten.rsqrt.default": lambda a: (1.0, [(a, -0.5)]),
    "aten.reciprocal.default": lambda a: (1.0, [(a, -1.0)]),
    "aten.pow.Tensor_Scalar": lambda a, b: (
        (1.0, [(a, float(b))]) if isinstance(b, (int, float)) and b != 0 else None
    ),
    "aten.einsum.default": _einsum_factors,
    "aten.exp.default": _exp_of_logarithm,
    "aten.linalg_norm.default": _root_of_squares,
    "aten.linalg_vector_norm.default": _root_of_squares,
    "aten.silu.default": lambda a: (1.0, [(a, 1.0), (Virtual("sigmoid", a), 1.0)]),
    "aten.rms_norm.default": _rms_norm_factors,
}
