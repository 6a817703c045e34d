"""Formulas found in a graph in normal form.

A node is read as a product, a sum or a function by tables over operator names, one level at a time and only
as far as the formula asks: `div(x, sqrt(y))` is x·y^-½, `silu(x)` is x·sigmoid(x), `mean(x)` is sum(x)·(1/n).
Casts are looked through everywhere; a variable is bound to the value before a cast that loses nothing.
Whether what a match leaves out (roundings, writes, other users) may be left out is for its caller to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.patterns import readings
from fxfuse.patterns.formula import Call, Formula, Product, Scalar, Sum, Var
from fxfuse.patterns.ops import EINSUM, FILLED, LINEAR, MATMUL, SELECT, SQUEEZE, STACK, UNSQUEEZE, VIEWS


@dataclass(frozen=True)
class Virtual:
    """A part of an operator that is no node of the graph: the sigmoid inside a silu, say."""

    function: str
    argument: Term
    constant: float = 0.0


Term = Node | Virtual
Bound = Mapping[str, Any]  # variables to nodes, scalars to numbers
Items = list[tuple[Term, float]]  # factors with exponents, or terms with coefficients


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
        for argument in _arguments(formula.function, term if reduces else _uncast(term)):
            yield from _match(formula.argument, argument, bound)


def _bind(variable: Var, term: Term, bound: Bound) -> Iterator[Bound]:
    if not isinstance(term, Node):
        return
    node = _before_exact_casts(term)
    if variable.dims is not None:
        node = _before_broadcast(node, variable.dims)
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
        factors = _factors(_uncast(term)) or _distributed(_uncast(term)) or _doubled_sigmoid(_uncast(term))
        if factors is not None and _may_raise(factors, power):
            number, parts = factors
            merged = _merged(others + [(part, p * power) for part, p in parts])
            yield from _product(wanted, merged, constant * number**power, result, bound)


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


def _may_raise(factors: tuple[float, Items], power: float) -> bool:
    """(x^a)^b = x^(a·b) for every real x: whole b, or one factor that is no even power."""
    number, parts = factors
    return power == int(power) or (len(parts) == 1 and parts[0][1] in (1.0, -1.0) and number > 0)


def _merged(items: Items) -> Items:
    powers: dict[Term, float] = {}
    terms: dict[Term, Term] = {}
    for term, power in items:
        key = _uncast(term)
        powers[key] = powers.get(key, 0.0) + power
        terms.setdefault(key, term)
    return [(_unsigned(terms[key], power), power) for key, power in powers.items() if power]


def _unsigned(term: Term, power: float) -> Term:
    """|x|² = x²."""
    size = _uncast(term)
    return size.args[0] if power == 2.0 and _is_call(size, "abs") else term  # type: ignore[return-value, union-attr]


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
        addends = _addends(_uncast(term))
        if addends is not None:
            number, parts = addends
            more = others + [(part, t * times) for part, t in parts]
            yield from _sum(wanted, more, constant + number * times, result, bound)


# The tables: how operators read as products, sums and functions.


def _factors(term: Term) -> tuple[float, Items] | None:
    if isinstance(term, Virtual):
        return (1.0, [(term.argument, term.constant)]) if term.function == "power" else None
    reading = _FACTORS.get(str(term.target))
    return reading(*term.args) if reading is not None and _plain(term) else None


def _distributed(term: Term) -> tuple[float, Items] | None:
    """x + x·w and addcmul(x, x, w) as x·(1 + w), x − x·w as x·(1 − w)."""
    if isinstance(term, Virtual):
        return None
    if str(term.target) == "aten.addcmul.default" and not term.kwargs and len(term.args) == 3:
        operands: tuple[Any, ...] = term.args
        added, *product = operands
        rests = [w for y, w in (product, product[::-1]) if _uncast(y) is _uncast(added)]
        return (1.0, [(added, 1.0), (Virtual("shifted", rests[0], 1.0), 1.0)]) if rests else None
    addends = _addends(term)
    if addends is None or addends[0] != 0.0 or len(addends[1]) != 2:
        return None
    for (x, one), (product_of, sign) in (addends[1], addends[1][::-1]):
        found = _factors(_uncast(product_of))
        if one != 1.0 or abs(sign) != 1.0 or found is None:
            continue
        if found[0] != 1.0 or [power for _, power in found[1]] != [1.0, 1.0]:
            continue
        (y, _), (z, _) = found[1]
        rest = z if _uncast(y) is _uncast(x) else y if _uncast(z) is _uncast(x) else None
        if rest is not None:
            return 1.0, [(x, 1.0), (Virtual("shifted" if sign > 0 else "complement", rest, 1.0), 1.0)]
    return None


def _doubled_sigmoid(term: Term) -> tuple[float, Items] | None:
    """1 + tanh(x / 2) = 2·sigmoid(x)."""
    addends = None if isinstance(term, Virtual) else _addends(term)
    if addends is None or addends[0] != 1.0 or len(addends[1]) != 1 or addends[1][0][1] != 1.0:
        return None
    x = _doubled_by_tanh(addends[1][0][0])
    return None if x is None else (2.0, [(Virtual("sigmoid", x), 1.0)])


def _addends(term: Term) -> tuple[float, Items] | None:
    if isinstance(term, Virtual):
        sign = {"shifted": 1.0, "complement": -1.0}.get(term.function)
        return None if sign is None else (term.constant, [(term.argument, sign)])
    scaled = _factors(term)
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
    if order not in (2, None) or not isinstance(x, Node) or not _is_last(x, *rest[:2]) or rest[2:]:
        return None
    return 1.0, [(Virtual("squares", x), 0.5)]


def _rms_norm_factors(x: Any, shape: Any, weight: Any = None, eps: Any = None) -> tuple[float, Items] | None:
    if len(shape) != 1 or eps is None:
        return None
    inverse = Virtual("shifted", Virtual("mean", Virtual("power", x, 2.0)), float(eps))
    return 1.0, [(x, 1.0), (inverse, -0.5), *([] if weight is None else [(weight, 1.0)])]


def _exp_of_logarithm(x: Any) -> tuple[float, Items] | None:
    """exp(c·log(x)) = x^c; of a negative x neither is a number unless c is whole."""
    scaled = _scaled(x) if isinstance(x, Node) else None
    logarithm = None if scaled is None else _uncast(scaled[1])
    if scaled is None or not _is_call(logarithm, "log") or scaled[0] == int(scaled[0]):  # type: ignore[arg-type]
        return None
    return 1.0, [(logarithm.args[0], scaled[0])]  # type: ignore[union-attr, list-item]


_FACTORS: dict[str, Callable[..., tuple[float, Items] | None]] = {
    "aten.mul.Tensor": lambda a, b: _operands((a, 1.0), (b, 1.0)),
    "aten.mul.Scalar": lambda a, b: _operands((a, 1.0), (b, 1.0)),
    "aten.multiply.Tensor": lambda a, b: _operands((a, 1.0), (b, 1.0)),
    "aten.div.Tensor": lambda a, b: _operands((a, 1.0), (b, -1.0)),
    "aten.div.Scalar": lambda a, b: _operands((a, 1.0), (b, -1.0)),
    "aten.true_divide.Tensor": lambda a, b: _operands((a, 1.0), (b, -1.0)),
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
    "aten.log_sigmoid.default": lambda a: (-1.0, [(Virtual("softplus of minus", a), 1.0)]),
    "aten.silu.default": lambda a: (1.0, [(a, 1.0), (Virtual("sigmoid", a), 1.0)]),
    "aten.rms_norm.default": _rms_norm_factors,
}


def _arguments(function: str, term: Term) -> Iterator[Term]:
    """What the term is the function of."""
    if isinstance(term, Virtual):
        if term.function == function:
            yield term.argument
        elif function == "softplus" and term.function == "softplus of minus":
            negative = _negated(term.argument)
            if negative is not None:
                yield negative
        elif function == "sigmoid" and term.function == "complement":
            yield from _one_minus_sigmoid(term)
        return
    name = str(term.target)
    if function in ("mean", "sum"):
        yield from _reduced(function, term)
    elif function == "softplus":
        yield from _softplus_of(term)
    elif name == f"aten.{function}.default":
        yield term.args[0]  # type: ignore[misc]
    elif function == "sigmoid" and name == "aten.exp.default":
        inner = _uncast(term.args[0])  # type: ignore[arg-type]
        if _is_call(inner, "log_sigmoid"):
            yield inner.args[0]  # type: ignore[misc, union-attr]
    elif function == "sigmoid":
        yield from _half_of_tanh(term)
        yield from _one_minus_sigmoid(term)
        yield from _first_of_two(term)
        yield from _exp_over_one_plus_exp(term)
        for power, inner in _inverses(term):
            if power == -1.0:
                for negative in _one_plus_exp(inner):
                    factors = _factors(_uncast(negative))
                    if factors is not None and factors[0] == -1.0 and len(factors[1]) == 1:
                        yield factors[1][0][0]


def _is_call(term: Term, name: str) -> bool:
    return isinstance(term, Node) and str(term.target) == f"aten.{name}.default" and not term.kwargs


def _scaled(term: Term) -> tuple[float, Term] | None:
    """A number and the one thing that it multiplies."""
    factors = _factors(_uncast(term))
    if factors is None or len(factors[1]) != 1 or factors[1][0][1] != 1.0:
        return None
    return factors[0], factors[1][0][0]


def _negated(term: Term) -> Term | None:
    scaled = _scaled(term)
    return scaled[1] if scaled is not None and scaled[0] == -1.0 else None


def _half_of_tanh(term: Term) -> Iterator[Term]:
    """sigmoid(x) = ½·(1 + tanh(½·x)) = ½ + ½·tanh(½·x)."""
    outer = _scaled(term)
    share, addends = (1.0, _addends(_uncast(outer[1]))) if outer is not None else (0.5, _addends(term))
    if addends is None or addends[0] != share or len(addends[1]) != 1 or (outer or (0.5,))[0] != 0.5:
        return
    part, times = addends[1][0]
    scaled = _scaled(part) or (1.0, part)
    x = _doubled_by_tanh(scaled[1]) if times * scaled[0] == share else None
    if x is not None:
        yield x


def _doubled_by_tanh(term: Term) -> Term | None:
    """The x of tanh(x / 2)."""
    tanh = _uncast(term)
    inner = _scaled(tanh.args[0]) if _is_call(tanh, "tanh") else None  # type: ignore[arg-type, union-attr]
    return inner[1] if inner is not None and inner[0] == 0.5 else None


def _first_of_two(term: Node) -> Iterator[Term]:
    """sigmoid(x) = softmax([x, 0])[0]."""
    inner = term.args[0] if str(term.target) == SELECT else None
    shares: Any = _uncast(inner) if isinstance(inner, Node) else None
    if not isinstance(shares, Node) or str(shares.target) != readings.SOFTMAX:
        return
    given: tuple[Any, ...] = (*term.args, *shares.args)
    _, dim, place, scores, along_scores = given[:5]
    stack, dims = _uncast(scores), shares.meta["val"].dim()
    if not isinstance(stack, Node) or str(stack.target) != STACK:
        return
    stacked: tuple[Any, ...] = (*stack.args, 0)
    parts, along = stacked[:2]
    if len(parts) != 2 or len({d % dims for d in (dim, along_scores, along)}) != 1:
        return
    x, zero = parts if place in (0, -2) else parts[::-1]
    if str(zero.target) in readings.ZEROS:
        yield x


def _exp_over_one_plus_exp(term: Term) -> Iterator[Term]:
    """sigmoid(x) = eˣ / (1 + eˣ)."""
    factors = _factors(term)
    if factors is None or factors[0] != 1.0 or sorted(power for _, power in factors[1]) != [-1.0, 1.0]:
        return
    (above, _), (below, _) = sorted(factors[1], key=lambda part: -part[1])
    for x in _arguments("exp", _uncast(above)):
        yield from (x for y in _one_plus_exp(below) if _uncast(y) is _uncast(x))


def _one_minus_sigmoid(term: Term) -> Iterator[Term]:
    """sigmoid(x) = 1 − sigmoid(−x)."""
    addends = _addends(term)
    if addends is not None and addends[0] == 1.0 and [times for _, times in addends[1]] == [-1.0]:
        negatives = map(_negated, _arguments("sigmoid", _uncast(addends[1][0][0])))
        yield from (x for x in negatives if x is not None)


def _softplus_of(term: Node) -> Iterator[Term]:
    """softplus(x) = log(1 + eˣ) = −log σ(−x) = log(eˣ + e⁰) = x + softplus(−x) = relu(x) + softplus(−|x|)."""
    name = str(term.target)
    if name == "aten.softplus.default":
        if term.args[1:] in ((), (1,), (1, 20)) and not term.kwargs:
            yield term.args[0]  # type: ignore[misc]
    elif name == "aten.log1p.default":
        yield from _arguments("exp", _uncast(term.args[0]))  # type: ignore[arg-type]
    elif name == "aten.log.default":
        yield from _one_plus_exp(term.args[0])  # type: ignore[arg-type]
    elif name == "aten.logaddexp.default":
        for x, zero in (term.args, term.args[::-1]):
            if isinstance(x, Node) and isinstance(zero, Node) and str(zero.target) in readings.ZEROS:
                yield x
    elif name == "aten.where.self":
        yield from _where_small(*term.args)
    else:
        logarithm = _negated(term)
        if logarithm is not None and _is_call(_uncast(logarithm), "log_sigmoid"):
            inner = _negated(_uncast(logarithm).args[0])  # type: ignore[union-attr, arg-type]
            if inner is not None:
                yield inner
        yield from _relu_and_rest(term)
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
    for argument in _arguments("softplus", _uncast(small)):
        if _uncast(argument) is _uncast(x) is _uncast(compared):
            yield argument


def _relu_and_rest(term: Term) -> Iterator[Term]:
    addends = _addends(term)
    if addends is None or addends[0] != 0.0 or [times for _, times in addends[1]] != [1.0, 1.0]:
        return
    parts = [_uncast(part) for part, _ in addends[1]]
    for relu, rest in (parts, parts[::-1]):
        positive = relu.args[0] if _is_call(relu, "relu") else None  # type: ignore[union-attr]
        if isinstance(relu, Node) and str(relu.target) in readings.LOWER_BOUNDS and relu.args[1:] == (0,):
            positive = relu.args[0] if not relu.kwargs else None
        if positive is None or not _is_call(rest, "log1p"):
            continue
        for decaying in _arguments("exp", _uncast(rest.args[0])):  # type: ignore[union-attr, arg-type]
            size = _negated(decaying)
            size = None if size is None else _uncast(size)
            if size is not None and _is_call(size, "abs") and _uncast(size.args[0]) is _uncast(positive):  # type: ignore[union-attr, arg-type]
                yield positive  # type: ignore[misc]


def _plus_softplus_of_minus(term: Term) -> Iterator[Term]:
    addends = _addends(term)
    if addends is None or addends[0] != 0.0 or len(addends[1]) != 2:
        return
    for (x, times), (rest, sign) in (addends[1], addends[1][::-1]):
        own = _uncast(rest)
        if sign == -1.0 and _is_call(own, "log_sigmoid"):  # x − log σ(x)
            minus: Any = own.args[0]  # type: ignore[union-attr]
        else:
            found = map(_negated, _arguments("softplus", own)) if sign == 1.0 else ()
            minus = next((y for y in found if y is not None), None)
        if times == 1.0 and minus is not None and _uncast(minus) is _uncast(x):
            yield x


def _inverses(term: Term) -> Iterator[tuple[float, Term]]:
    factors = _factors(term)
    if factors is not None and factors[0] == 1.0 and len(factors[1]) == 1:
        part, power = factors[1][0]
        yield power, part


def _one_plus_exp(term: Term) -> Iterator[Term]:
    addends = _addends(_uncast(term))
    if addends is not None and addends[0] == 1.0 and len(addends[1]) == 1 and addends[1][0][1] == 1.0:
        yield from _arguments("exp", _uncast(addends[1][0][0]))


def _reduced(function: str, term: Node) -> Iterator[Term]:
    """The x of mean(x, -1, keepdim=True), sum(x, -1, keepdim=True) / n and their like; or of its sum."""
    number, power, part = 1.0, 1.0, _before_casts(term)
    while True:
        summed = (_summed(part) or _summed(_uncast(part))) if power == 1.0 else None
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
        factors = _factors(_uncast(part))
        if factors is None or len(factors[1]) != 1 or not (power == int(power) or factors[0] > 0):
            return
        number *= factors[0] ** power
        part, power = _before_casts(factors[1][0][0]), power * factors[1][0][1]


def _without_number(term: Term) -> tuple[float, Term] | None:
    """A number and the power of one thing that it multiplies, for (x / √n)²."""
    number, items = 1.0, _merged([(term, 1.0)])
    while len(items) == 1:
        factors = _factors(_uncast(items[0][0]))
        if factors is None or not _may_raise(factors, items[0][1]):
            break
        power = items[0][1]
        number *= factors[0] ** power
        items = _merged([(part, p * power) for part, p in factors[1]])
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
    if product.meta["val"].shape[-1] != 1 or weight.meta["val"].numel() != count:
        return None
    if number == 1:
        return "sum", x, count  # type: ignore[return-value]
    alike = isinstance(number, float) and isinstance(count, int) and math.isclose(number * count, 1)
    return ("mean", x, count) if alike else None  # type: ignore[return-value]


_REDUCTIONS = {"aten.mean.dim": "mean", "aten.sum.dim_IntList": "sum"}


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
    return _is_last(node.args[0], dims, keeps)


def _is_last(x: Any, dims: Any = None, keeps: Any = False) -> bool:
    last = x.meta["val"].dim() - 1
    return keeps is True and isinstance(dims, (list, tuple)) and [d % (last + 1) for d in dims] == [last]


# What is looked through.


def is_cast(node: Node) -> bool:
    """Whether a call changes nothing but dtype or strides; a cast to integers does more."""
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and str(node.target) in readings.CASTS
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and isinstance(node.args[0], Node)
        and node.args[0].meta["val"].is_floating_point()
    )


def _before_casts(term: Term) -> Term:
    while isinstance(term, Node) and is_cast(term):
        term = term.args[0]  # type: ignore[assignment]
    return term


def _uncast(term: Term) -> Term:
    """The term before casts and before it was given leading dimensions."""
    while isinstance(term, Node) and (is_cast(term) or _is_broadcast(term)):
        term = term.args[0]  # type: ignore[assignment]
    return term


def _is_broadcast(node: Node) -> bool:
    """Whether a call repeats its input along new or single leading dimensions, or adds those."""
    source = node.args[0] if str(node.target) in readings.BROADCASTS else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    value, before = node.meta["val"], source.meta["val"]
    if before.dim() > value.dim():
        return False
    ends = zip(before.shape[::-1], value.shape[::-1], value.stride()[::-1], strict=False)
    if not all(statically_known_true(a == b) or (a == 1 and stride == 0) for a, b, stride in ends):
        return False
    lead = zip(value.shape[: value.dim() - before.dim()], value.stride(), strict=False)
    return all(statically_known_true(size == 1) or stride == 0 for size, stride in lead)


def _before_exact_casts(node: Node) -> Node:
    while is_cast(node):
        source: Node = node.args[0]  # type: ignore[assignment]
        given, got = source.meta["val"].dtype, node.meta["val"].dtype
        if torch.promote_types(given, got) != got:
            return node
        node = source
    return node


def _before_broadcast(node: Node, dims: int) -> Node:
    """The tensor of so many dimensions whose elements stand in the last ones of the node."""
    while _is_broadcast(node) and node.args[0].meta["val"].dim() >= dims:  # type: ignore[union-attr]
        node = _before_exact_casts(node.args[0])  # type: ignore[arg-type]
    return node
