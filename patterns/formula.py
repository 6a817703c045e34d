"""Formulas as data: what a computation is, whatever its spelling.

`x * (mean(x * x) + eps) ** -0.5 * (1.0 + w)` is written with Python's operators over variables. Products are
kept as factors with exponents and sums as terms, so that order, association, division and squares are no
difference; casts are none either: `fxfuse.patterns.terms` looks through them.
"""

from __future__ import annotations

from dataclasses import dataclass, field


class Formula:
    """Base of all formulas, with the operators that build them."""

    def __mul__(self, other: Formula | float) -> Product:
        return _product(self, other)

    __rmul__ = __mul__

    def __pow__(self, exponent: float) -> Product:
        return Product(((self, float(exponent)),))

    def __add__(self, other: Formula | float) -> Sum:
        return _sum(self, other)

    __radd__ = __add__

    def __neg__(self) -> Product:
        return _product(self, -1.0)


@dataclass(frozen=True)
class Var(Formula):
    """Any tensor; the same one wherever the variable occurs.

    `dims` is how many dimensions it has before it is broadcast, None for any number.
    """

    name: str
    dims: int | None = None


@dataclass(frozen=True)
class Scalar(Formula):
    """A number of the graph, such as an epsilon; stands in sums."""

    name: str


@dataclass(frozen=True)
class Product(Formula):
    factors: tuple[tuple[Formula, float], ...]
    constant: float = 1.0


@dataclass(frozen=True)
class Sum(Formula):
    """Terms and a number: of the formula, or where it is a `Scalar` of the graph."""

    terms: tuple[Formula, ...]
    constant: float | Scalar = 0.0


@dataclass(frozen=True)
class Call(Formula):
    """A function of one argument: exp, sigmoid, softplus; mean, sum over the last dimension, kept."""

    function: str
    argument: Formula = field(hash=True)


def mean(x: Formula) -> Call:
    return Call("mean", x)


def total(x: Formula) -> Call:
    """The sum over the last dimension, which is kept."""
    return Call("sum", x)


def exp(x: Formula) -> Call:
    return Call("exp", x)


def sigmoid(x: Formula) -> Call:
    return Call("sigmoid", x)


def softplus(x: Formula) -> Call:
    return Call("softplus", x)


def silu(x: Formula) -> Product:
    return x * sigmoid(x)


def _product(*operands: Formula | float) -> Product:
    factors: dict[Formula, float] = {}
    constant = 1.0
    for operand in operands:
        if isinstance(operand, (int, float)):
            constant *= operand
            continue
        product = operand if isinstance(operand, Product) else Product(((operand, 1.0),))
        constant *= product.constant
        for factor, exponent in product.factors:
            factors[factor] = factors.get(factor, 0.0) + exponent
    return Product(tuple(factors.items()), constant)


def _sum(*operands: Formula | float) -> Sum:
    terms: list[Formula] = []
    constant: float | Scalar = 0.0
    for operand in operands:
        if isinstance(operand, Sum):
            terms += operand.terms
            constant = operand.constant
        elif isinstance(operand, (int, float, Scalar)):
            constant = operand
        else:
            terms.append(operand)
    return Sum(tuple(terms), constant)
