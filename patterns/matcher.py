"""Formulas found in a graph in normal form.

A node is read as a product, a sum or a function, one level at a time and only as far as the formula asks.
Casts are looked through everywhere; a variable is bound to the value before a cast that loses nothing.
Whether what a match leaves out (roundings, writes, other users) may be left out is for its caller to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxfuse.patterns.addends import addends_of, distributed
from fxfuse.patterns.factors import factors_of, may_raise, merged
from fxfuse.patterns.formula import Call, Formula, Product, Scalar, Sum, Var
from fxfuse.patterns.reductions import reduced_arguments
from fxfuse.patterns.sigmoid import doubled_sigmoid, sigmoid_arguments
from fxfuse.patterns.terms import (
    Items,
    Term,
    argument_of,
    before_broadcast,
    before_exact_casts,
    sole_sources,
    uncast,
)

Bound = Mapping[str, Any]  # variables to nodes, scalars to numbers


def matches(formula: Formula, node: Node) -> Iterator[Bound]:
    """Every way to read the node as the formula."""
    yield from _match(formula, node, {})


def _match(formula: Formula, term: Term, bound: Bound) -> Iterator[Bound]:
    if isinstance(formula, Var):
        yield from _bind(formula, term, bound)
    elif isinstance(formula, Product):
        yield from _product(_rigid_first(formula.factors), [(term, 1.0)], 1.0, formula.constant, bound)
    elif isinstance(formula, Sum):
        terms = _rigid_first([(part, 1.0) for part in formula.terms])
        yield from _sum(terms, [(term, 1.0)], 0.0, formula.constant, bound)
    elif isinstance(formula, Call):
        reduces = formula.function in ("mean", "sum")  # a dimension of one may be what is left of a sum
        for argument in _arguments(formula.function, term if reduces else uncast(term)):
            yield from _match(formula.argument, argument, bound)


def _arguments(function: str, term: Term) -> Iterator[Term]:
    """What the term is the function of."""
    if function in ("mean", "sum"):
        yield from reduced_arguments(function, term)
    elif function == "sigmoid":
        yield from sigmoid_arguments(term)
    elif function == "softplus":
        yield from sole_sources(term)  # in any spelling: whether it is one, its values say
    elif (argument := argument_of(function, term)) is not None:
        yield argument


def _bind(variable: Var, term: Term, bound: Bound) -> Iterator[Bound]:
    if not isinstance(term, Node):
        return
    node = before_exact_casts(term)
    if variable.dims is not None:
        node = before_broadcast(node, variable.dims)
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return
    if variable.dims is not None and value.dim() != variable.dims:
        return
    if bound.get(variable.name, node) is node:
        yield {**bound, variable.name: node}


def _rigid_first(parts: Sequence[tuple[Formula, float]]) -> list[tuple[Formula, float]]:
    """Functions and sums before variables: those say what the variables are."""
    return sorted(parts, key=lambda part: isinstance(part[0], Var))


def _product(
    wanted: Sequence[tuple[Formula, float]], items: Items, constant: float, result: float, bound: Bound
) -> Iterator[Bound]:
    if not wanted:
        if not items and math.isclose(constant, result, rel_tol=1e-6):
            yield bound
        return
    (formula, exponent), *rest = wanted
    for i, (term, power) in enumerate(items):
        others = items[:i] + items[i + 1 :]
        for reading in _readings(formula, exponent, power):
            for found in _match(reading, term, bound):
                yield from _product(rest, others, constant, result, found)
        if power == exponent:
            for number, found in _scaled_sums(formula, term, bound):
                yield from _product(rest, others, constant * number**power, result, found)
        factors = factors_of(uncast(term)) or distributed(uncast(term)) or doubled_sigmoid(uncast(term))
        if factors is not None and may_raise(factors, power):
            number, parts = factors
            more = merged(others + [(part, p * power) for part, p in parts])
            yield from _product(wanted, more, constant * number**power, result, bound)


def _readings(formula: Formula, exponent: float, power: float) -> Iterator[Formula]:
    """The formulas whose `power` is what is wanted to the `exponent`."""
    if power == exponent:
        yield formula
    elif power == -exponent and isinstance(formula, Call) and formula.function == "sigmoid":
        yield 1.0 + Call("exp", -formula.argument)


def _scaled_sums(formula: Formula, term: Term, bound: Bound) -> Iterator[tuple[float, Bound]]:
    """A number times the formula: sum(y) + n·ε = n·(mean(y) + ε), with mean and sum in either place."""
    if not isinstance(formula, Sum) or not isinstance(formula.constant, Scalar) or len(formula.terms) != 1:
        return
    (reduced,), name = formula.terms, formula.constant.name
    if not isinstance(reduced, Call) or reduced.function not in ("mean", "sum") or name in bound:
        return
    other = Call("sum" if reduced.function == "mean" else "mean", reduced.argument)
    for found in _match(Sum((other,), formula.constant), term, bound):
        new = [value for key, value in found.items() if isinstance(value, Node) and key in _variables(other)]
        count = new[0].meta["val"].shape[-1] if new else None
        if isinstance(count, int) and count > 1:
            number = float(count) if reduced.function == "mean" else 1 / count
            yield number, {**found, name: found[name] / number}


def _variables(formula: Formula) -> set[str]:
    if isinstance(formula, Var):
        return {formula.name}
    if isinstance(formula, Call):
        return _variables(formula.argument)
    parts: list[Formula] = [f for f, _ in formula.factors] if isinstance(formula, Product) else []
    return set().union(*map(_variables, parts + list(getattr(formula, "terms", ()))))


def _sum(
    wanted: Sequence[tuple[Formula, float]],
    items: Items,
    constant: float,
    result: float | Scalar,
    bound: Bound,
) -> Iterator[Bound]:
    if not wanted:
        if items:
            return
        if isinstance(result, Scalar):
            if bound.get(result.name, constant) == constant:
                yield {**bound, result.name: constant}
        elif math.isclose(constant, result, rel_tol=1e-6):
            yield bound
        return
    (formula, factor), *rest = wanted
    for i, (term, times) in enumerate(items):
        others = items[:i] + items[i + 1 :]
        if times == factor:
            for found in _match(formula, term, bound):
                yield from _sum(rest, others, constant, result, found)
        addends = addends_of(uncast(term))
        if addends is not None:
            number, parts = addends
            more = others + [(part, t * times) for part, t in parts]
            yield from _sum(wanted, more, constant + number * times, result, bound)
