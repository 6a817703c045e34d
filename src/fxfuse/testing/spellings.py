"""Ways to write one operation, by name: functions, methods, operators, keywords, in place, and by detours.

Each entry takes the speller and the operands, writes calls and returns the result, or raises `DoesNotApply`
before it writes anything. All spellings of an operation have equal values: bit for bit where the operation
moves elements or works on small integers, to rounding elsewhere. The first of each is the plain one.

Nothing here knows of fxfuse's normal form, or shares code with it.
"""

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller

__all__ = ["TABLE", "DoesNotApply"]

Spelling = Callable[..., Any]


class DoesNotApply(Exception):
    """This operand cannot be spelled so."""


def _require(condition: bool) -> None:
    if not condition:
        raise DoesNotApply


def _letters(count: int) -> str:
    return "abcdefgh"[:count]


# Sizes


def _size_number(s: "Speller", x: Node, dim: int) -> int:
    _require(not s.dynamic)
    return s.shape(x)[dim]


SIZE: dict[str, Spelling] = {
    "number": _size_number,
    "x.size(i)": lambda s, x, dim: s.call("size", x, dim),
    "x.shape[i]": lambda s, x, dim: s.call(operator.getitem, s.call(getattr, x, "shape"), dim),
    "x.size()[i]": lambda s, x, dim: s.call(operator.getitem, s.call("size", x), dim),
}


# Nothing


def _own_dtype(s: "Speller", x: Node) -> torch.dtype:
    return s.value(x).dtype


IDENTITY: dict[str, Spelling] = {
    "contiguous": lambda s, x: s.call("contiguous", x),
    "x.to(own dtype)": lambda s, x: s.call("to", x, _own_dtype(s, x)),
    "x.to(dtype=own)": lambda s, x: s.call("to", x, dtype=_own_dtype(s, x)),
    "x.type_as(x)": lambda s, x: s.call("type_as", x, x),
    "x.type(own dtype)": lambda s, x: s.call("type", x, _own_dtype(s, x)),
    "F.dropout in eval": lambda s, x: s.call(F.dropout, x, 0.1, False),
    "nn.Dropout in eval": lambda s, x: s.call_module("dropout", nn.Dropout(0.1).eval(), x),
    "nn.Identity": lambda s, x: s.call_module("identity", nn.Identity(), x),
    "x + 0": lambda s, x: s.call(operator.add, x, 0),
    "0 + x": lambda s, x: s.call(operator.add, 0, x),
    "x - 0": lambda s, x: s.call(operator.sub, x, 0),
    "x * 1": lambda s, x: s.call(operator.mul, x, 1),
    "1.0 * x": lambda s, x: s.call(operator.mul, 1.0, x),
    "x / 1": lambda s, x: s.call(operator.truediv, x, 1),
    "view_as": lambda s, x: s.call("view_as", x, x),
    "x[...]": lambda s, x: s.call(operator.getitem, x, Ellipsis),
    "x[:]": lambda s, x: s.call(operator.getitem, x, slice(None)),
    "unsqueeze, squeeze": lambda s, x: s.call("squeeze", s.call("unsqueeze", x, 0), 0),
    "transpose twice": lambda s, x: s.call("transpose", s.call("transpose", x, 0, -1), 0, -1),
}


# Shapes


def _view(s: "Speller", x: Node, shape: list[Any], *packed: Any) -> Node:
    try:
        s.value(x).view([s.value(n) for n in shape])
    except RuntimeError:
        raise DoesNotApply from None
    return s.call("view", x, *(packed or shape))


def _with_minus_one(s: "Speller", x: Node, shape: list[Any]) -> Node:
    _require(s.value(x).numel() > 0 and -1 not in [s.value(n) for n in shape])
    place = s.rng.randrange(len(shape))
    return s.call("reshape", x, *(-1 if i == place else n for i, n in enumerate(shape)))


def _flatten(s: "Speller", x: Node, shape: list[Any], call: Callable[..., Node]) -> Node:
    old, new = s.shape(x), [s.value(n) for n in shape]
    last = len(new) - 1
    _require(len(old) > len(new) and list(old[:last]) == new[:last])
    return call(s, x, last)


def _unflatten(s: "Speller", x: Node, shape: list[Any], call: Callable[..., Node]) -> Node:
    old, new = s.shape(x), [s.value(n) for n in shape]
    last = len(old) - 1
    _require(len(new) > len(old) and list(old[:last]) == new[:last])
    return call(s, x, shape[last:])


def _rows_first(s: "Speller", x: Node, shape: list[Any]) -> Node:
    return s.call("reshape", s.call("reshape", x, -1), *shape)


RESHAPE: dict[str, Spelling] = {
    "x.reshape(...)": lambda s, x, shape: s.call("reshape", x, *shape),
    "x.reshape(tuple)": lambda s, x, shape: s.call("reshape", x, tuple(shape)),
    "torch.reshape": lambda s, x, shape: s.call(torch.reshape, x, tuple(shape)),
    "torch.reshape(input=, shape=)": lambda s, x, shape: s.call(torch.reshape, input=x, shape=tuple(shape)),
    "x.view(...)": lambda s, x, shape: _view(s, x, shape),
    "x.view(tuple)": lambda s, x, shape: _view(s, x, shape, tuple(shape)),
    "reshape with -1": _with_minus_one,
    "x.flatten": lambda s, x, shape: _flatten(s, x, shape, lambda s, x, i: s.call("flatten", x, i)),
    "torch.flatten": lambda s, x, shape: _flatten(
        s, x, shape, lambda s, x, i: s.call(torch.flatten, x, start_dim=i)
    ),
    "x.unflatten": lambda s, x, shape: _unflatten(
        s, x, shape, lambda s, x, tail: s.call("unflatten", x, -1, tuple(tail))
    ),
    "torch.unflatten": lambda s, x, shape: _unflatten(
        s, x, shape, lambda s, x, tail: s.call(torch.unflatten, x, -1, tuple(tail))
    ),
    "reshape(-1) first": _rows_first,
}


def _parts(made: Node, count: int, s: "Speller") -> list[Node]:
    return [s.call(operator.getitem, made, i) for i in range(count)]


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _slices(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
    after = (slice(None),) * (-dim - 1)
    return [
        s.call(operator.getitem, x, (Ellipsis, slice(start, start + size), *after))
        for start, size in zip(_starts(sizes), sizes, strict=True)
    ]


def _slices_from_the_front(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
    before = (slice(None),) * (len(s.shape(x)) + dim)
    starts: list[int | None] = [start or None for start in _starts(sizes)]
    stops = [*starts[1:], None]
    return [s.call(operator.getitem, x, (*before, slice(a, b))) for a, b in zip(starts, stops, strict=True)]


def _narrows(s: "Speller", x: Node, sizes: list[int], dim: int, function: bool) -> list[Node]:
    target: Any = torch.narrow if function else "narrow"
    return [s.call(target, x, dim, start, size) for start, size in zip(_starts(sizes), sizes, strict=True)]


def _equal(call: Callable[..., Node]) -> Spelling:
    def written(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
        _require(len(set(sizes)) == 1)
        return _parts(call(s, x, sizes, dim), len(sizes), s)

    return written


def _unbound(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
    _require(len(set(sizes)) == 1)
    unflat = s.call("unflatten", x, dim, (len(sizes), sizes[0]))
    return _parts(s.call("unbind", unflat, dim - 1), len(sizes), s)


SPLIT: dict[str, Spelling] = {
    "torch.split(x, sizes, dim=)": lambda s, x, sizes, dim: _parts(
        s.call(torch.split, x, sizes, dim=dim), len(sizes), s
    ),
    "x.split(sizes, dim)": lambda s, x, sizes, dim: _parts(s.call("split", x, sizes, dim), len(sizes), s),
    "x.split(tuple, positive dim)": lambda s, x, sizes, dim: _parts(
        s.call("split", x, tuple(sizes), len(s.shape(x)) + dim), len(sizes), s
    ),
    "x.split_with_sizes": lambda s, x, sizes, dim: _parts(
        s.call("split_with_sizes", x, sizes, dim), len(sizes), s
    ),
    "x.tensor_split(places)": lambda s, x, sizes, dim: _parts(
        s.call("tensor_split", x, tuple(_starts(sizes)[1:]), dim), len(sizes), s
    ),
    "x[..., a:b]": _slices,
    "x[:, a:b]": _slices_from_the_front,
    "x.narrow": lambda s, x, sizes, dim: _narrows(s, x, sizes, dim, function=False),
    "torch.narrow": lambda s, x, sizes, dim: _narrows(s, x, sizes, dim, function=True),
    "x.chunk": _equal(lambda s, x, sizes, dim: s.call("chunk", x, len(sizes), dim)),
    "torch.chunk(x, n, dim=)": _equal(lambda s, x, sizes, dim: s.call(torch.chunk, x, len(sizes), dim=dim)),
    "x.split(size)": _equal(lambda s, x, sizes, dim: s.call("split", x, sizes[0], dim)),
    "x.tensor_split(n)": _equal(lambda s, x, sizes, dim: s.call("tensor_split", x, len(sizes), dim)),
    "unflatten, unbind": _unbound,
}

CAT: dict[str, Spelling] = {
    "torch.cat(parts, dim=)": lambda s, parts, dim: s.call(torch.cat, parts, dim=dim),
    "torch.cat(tuple, dim)": lambda s, parts, dim: s.call(torch.cat, tuple(parts), dim),
    "torch.concat": lambda s, parts, dim: s.call(torch.concat, parts, dim),
    "torch.concatenate": lambda s, parts, dim: s.call(torch.concatenate, parts, dim=dim),
    "positive dim": lambda s, parts, dim: s.call(torch.cat, parts, dim % len(s.shape(parts[0]))),
    "cat of cats": lambda s, parts, dim: _cat_of_cats(s, parts, dim),
}


def _cat_of_cats(s: "Speller", parts: list[Node], dim: int) -> Node:
    _require(len(parts) > 2)
    return s.call(torch.cat, [s.call(torch.cat, parts[:2], dim), *parts[2:]], dim)


def _permutation(s: "Speller", x: Node, a: int, b: int) -> list[int]:
    order = list(range(len(s.shape(x))))
    order[a], order[b] = order[b], order[a]
    return order


def _movedim(s: "Speller", x: Node, a: int, b: int, target: Any) -> Node:
    _require(abs(a - b) == 1)
    return s.call(target, x, a, b)


def _transposed_by_einsum(s: "Speller", x: Node, a: int, b: int) -> Node:
    names = _letters(len(s.shape(x)))
    return s.call(torch.einsum, f"{names}->{''.join(names[i] for i in _permutation(s, x, a, b))}", x)


def _last_two(s: "Speller", x: Node, a: int, b: int, name: str) -> Node:
    dims = len(s.shape(x))
    _require({a, b} == {dims - 1, dims - 2})
    return s.call(getattr, x, name)


TRANSPOSE: dict[str, Spelling] = {
    "x.transpose": lambda s, x, a, b: s.call("transpose", x, a, b),
    "torch.transpose": lambda s, x, a, b: s.call(torch.transpose, x, b, a),
    "negative dims": lambda s, x, a, b: s.call("transpose", x, a - len(s.shape(x)), b - len(s.shape(x))),
    "x.permute(...)": lambda s, x, a, b: s.call("permute", x, *_permutation(s, x, a, b)),
    "torch.permute(x, dims=)": lambda s, x, a, b: s.call(torch.permute, x, dims=_permutation(s, x, a, b)),
    "x.movedim": lambda s, x, a, b: _movedim(s, x, a, b, "movedim"),
    "torch.moveaxis": lambda s, x, a, b: _movedim(s, x, a, b, torch.moveaxis),
    "x.swapaxes": lambda s, x, a, b: s.call("swapaxes", x, a, b),
    "torch.swapdims": lambda s, x, a, b: s.call(torch.swapdims, x, a, b),
    "x.mT": lambda s, x, a, b: _last_two(s, x, a, b, "mT"),
    "einsum": _transposed_by_einsum,
}


# Linears


def _weight(s: "Speller", name: str) -> Node:
    return s.parameter(f"{name}.weight", torch.empty(0))


def _bias(s: "Speller", name: str) -> Node | None:
    return (
        None if getattr(s.root, s.prefix + name).bias is None else s.parameter(f"{name}.bias", torch.empty(0))
    )


def _turned(s: "Speller", name: str) -> Node:
    return s.spell("turned", _weight(s, name))


def _plus_bias(s: "Speller", y: Node, name: str) -> Node:
    bias = _bias(s, name)
    return y if bias is None else s.spell("add", y, bias)


def _by_addmm(s: "Speller", x: Node, name: str) -> Node:
    bias, shape = _bias(s, name), s.shape(x)
    _require(bias is not None)
    outputs = getattr(s.root, s.prefix + name).out_features
    rows = x if len(shape) == 2 else s.spell("reshape", x, [-1, shape[-1]] if s.dynamic else _rows(shape))
    y = s.call(torch.addmm, bias, rows, _turned(s, name))
    return y if len(shape) == 2 else s.spell("reshape", y, [*s.sizes(x, len(shape) - 1), outputs])


def _rows(shape: tuple[int, ...]) -> list[int]:
    count = 1
    for size in shape[:-1]:
        count *= size
    return [count, shape[-1]]


def _by_mm(s: "Speller", x: Node, name: str) -> Node:
    _require(len(s.shape(x)) == 2)
    return _plus_bias(s, s.call(torch.mm, x, _turned(s, name)), name)


def _by_einsum(s: "Speller", x: Node, name: str) -> Node:
    lead = _letters(len(s.shape(x)) - 1)
    y = s.call(torch.einsum, f"{lead}i,oi->{lead}o", x, _weight(s, name))
    return _plus_bias(s, y, name)


LINEAR: dict[str, Spelling] = {
    "nn.Linear": lambda s, x, name: s.call_module(s.prefix + name, None, x),
    "F.linear": lambda s, x, name: s.call(F.linear, x, _weight(s, name), _bias(s, name)),
    "F.linear(input=, weight=, bias=)": lambda s, x, name: s.call(
        F.linear, input=x, weight=_weight(s, name), bias=_bias(s, name)
    ),
    "x @ w.t()": lambda s, x, name: _plus_bias(s, s.call(operator.matmul, x, _turned(s, name)), name),
    "torch.matmul": lambda s, x, name: _plus_bias(s, s.call(torch.matmul, x, _turned(s, name)), name),
    "x.matmul": lambda s, x, name: _plus_bias(s, s.call("matmul", x, _turned(s, name)), name),
    "torch.mm": _by_mm,
    "torch.addmm": _by_addmm,
    "einsum": _by_einsum,
}

TURNED: dict[str, Spelling] = {
    "w.t()": lambda s, w: s.call("t", w),
    "torch.t": lambda s, w: s.call(torch.t, w),
    "w.T": lambda s, w: s.call(getattr, w, "T"),
    "w.mT": lambda s, w: s.call(getattr, w, "mT"),
    "w.transpose(0, 1)": lambda s, w: s.call("transpose", w, 0, 1),
    "w.transpose(-1, -2)": lambda s, w: s.call("transpose", w, -1, -2),
    "w.permute(1, 0)": lambda s, w: s.call("permute", w, 1, 0),
    "torch.swapaxes": lambda s, w: s.call(torch.swapaxes, w, 0, 1),
    "w.movedim": lambda s, w: s.call("movedim", w, 0, 1),
}


# Dtypes


def _short_cast(s: "Speller", x: Node, dtype: torch.dtype, like: Node | None) -> Node:
    short = {
        torch.float32: "float",
        torch.float64: "double",
        torch.bfloat16: "bfloat16",
        torch.float16: "half",
    }
    _require(dtype in short)
    return s.call(short[dtype], x)


def _cast_like(s: "Speller", x: Node, dtype: torch.dtype, like: Node | None, target: str) -> Node:
    _require(like is not None)
    return s.call(target, x, like)


def _dtype_of_other(s: "Speller", x: Node, dtype: torch.dtype, like: Node | None) -> Node:
    _require(like is not None)
    return s.call("to", x, s.call(getattr, like, "dtype"))


CAST: dict[str, Spelling] = {
    "x.to(dtype)": lambda s, x, dtype, like: s.call("to", x, dtype),
    "x.to(dtype=)": lambda s, x, dtype, like: s.call("to", x, dtype=dtype),
    "x.float()": _short_cast,
    "x.type(dtype)": lambda s, x, dtype, like: s.call("type", x, dtype),
    "x.type_as(y)": lambda s, x, dtype, like: _cast_like(s, x, dtype, like, "type_as"),
    "x.to(y)": lambda s, x, dtype, like: _cast_like(s, x, dtype, like, "to"),
    "x.to(y.dtype)": _dtype_of_other,
}


# Arithmetic


def _needs_tensor(s: "Speller", a: Any) -> None:
    _require(isinstance(s.value(a), torch.Tensor))


def _method(name: str, swap: bool = False) -> Spelling:
    def written(s: "Speller", a: Any, b: Any) -> Node:
        a, b = (b, a) if swap else (a, b)
        _needs_tensor(s, a)
        return s.call(name, a, b)

    return written


def _in_place(name: str) -> Spelling:
    """x.mul(y) as a copy that is then written: the operand itself may be read again."""

    def written(s: "Speller", a: Any, b: Any) -> Node:
        _needs_tensor(s, a)
        first, second = s.value(a), s.value(b)
        _require(torch.broadcast_shapes(first.shape, getattr(second, "shape", ())) == first.shape)
        _require(torch.result_type(first, second) == first.dtype)
        return s.call(name, s.call("clone", a), b)

    return written


def _two(function: Callable[..., Any], swap: bool = False) -> Spelling:
    def written(s: "Speller", a: Any, b: Any) -> Node:
        a, b = (b, a) if swap else (a, b)
        if function in (torch.add, torch.mul):
            _needs_tensor(s, a)
        return s.call(function, a, b)

    return written


ADD: dict[str, Spelling] = {
    "a + b": _two(operator.add),
    "b + a": _two(operator.add, swap=True),
    "torch.add": _two(torch.add),
    "torch.add(b, a)": _two(torch.add, swap=True),
    "a.add(b)": _method("add"),
    "b.add(a)": _method("add", swap=True),
    "clone, add_": _in_place("add_"),
}

MUL: dict[str, Spelling] = {
    "a * b": _two(operator.mul),
    "b * a": _two(operator.mul, swap=True),
    "torch.mul": _two(torch.mul),
    "torch.mul(b, a)": _two(torch.mul, swap=True),
    "torch.multiply": _two(torch.mul),
    "a.mul(b)": _method("mul"),
    "b.mul(a)": _method("mul", swap=True),
    "clone, mul_": _in_place("mul_"),
}

NEG: dict[str, Spelling] = {
    "-x": lambda s, x: s.call(operator.neg, x),
    "torch.neg": lambda s, x: s.call(torch.neg, x),
    "x.neg()": lambda s, x: s.call("neg", x),
    "x * -1": lambda s, x: s.call(operator.mul, x, -1),
    "0 - x": lambda s, x: s.call(operator.sub, 0, x),
}

SQUARE: dict[str, Spelling] = {
    "x.pow(2)": lambda s, x: s.call("pow", x, 2),
    "x ** 2": lambda s, x: s.call(operator.pow, x, 2),
    "x * x": lambda s, x: s.call(operator.mul, x, x),
    "torch.square": lambda s, x: s.call(torch.square, x),
    "torch.pow(x, 2.0)": lambda s, x: s.call(torch.pow, x, 2.0),
    "x.square()": lambda s, x: s.call("square", x),
}

RSQRT: dict[str, Spelling] = {
    "torch.rsqrt": lambda s, x: s.call(torch.rsqrt, x),
    "x.rsqrt()": lambda s, x: s.call("rsqrt", x),
    "1 / torch.sqrt": lambda s, x: s.call(operator.truediv, 1, s.call(torch.sqrt, x)),
    "x.sqrt().reciprocal()": lambda s, x: s.call("reciprocal", s.call("sqrt", x)),
    "x.pow(-0.5)": lambda s, x: s.call("pow", x, -0.5),
    "x ** -0.5": lambda s, x: s.call(operator.pow, x, -0.5),
    "torch.pow(x, -0.5)": lambda s, x: s.call(torch.pow, x, -0.5),
}

EXP: dict[str, Spelling] = {
    "torch.exp": lambda s, x: s.call(torch.exp, x),
    "x.exp()": lambda s, x: s.call("exp", x),
}


def _sum_divided(s: "Speller", x: Node) -> Node:
    return s.call(operator.truediv, s.spell("sum", x), s.shape(x)[-1])


MEAN: dict[str, Spelling] = {
    "x.mean(-1, keepdim=True)": lambda s, x: s.call("mean", x, -1, keepdim=True),
    "torch.mean(x, dim=-1, keepdim=True)": lambda s, x: s.call(torch.mean, x, dim=-1, keepdim=True),
    "positive dim": lambda s, x: s.call("mean", x, len(s.shape(x)) - 1, True),
    "dim=(-1,)": lambda s, x: s.call("mean", x, dim=(-1,), keepdim=True),
    "mean, unsqueeze": lambda s, x: s.call("unsqueeze", s.call("mean", x, -1), -1),
    "sum / n": _sum_divided,
    "sum * (1 / n)": lambda s, x: s.call(operator.mul, s.spell("sum", x), 1.0 / s.shape(x)[-1]),
}

SUM: dict[str, Spelling] = {
    "x.sum(-1, keepdim=True)": lambda s, x: s.call("sum", x, -1, keepdim=True),
    "torch.sum(x, dim=-1, keepdim=True)": lambda s, x: s.call(torch.sum, x, dim=-1, keepdim=True),
    "positive dim": lambda s, x: s.call("sum", x, len(s.shape(x)) - 1, True),
    "sum, unsqueeze": lambda s, x: s.call("unsqueeze", s.call("sum", x, -1), -1),
}


def _logistic(s: "Speller", x: Node) -> Node:
    return s.call(operator.add, 1, s.spell("exp", s.spell("neg", x)))


SIGMOID: dict[str, Spelling] = {
    "torch.sigmoid": lambda s, x: s.call(torch.sigmoid, x),
    "x.sigmoid()": lambda s, x: s.call("sigmoid", x),
    "F.sigmoid": lambda s, x: s.call(F.sigmoid, x),
    "nn.Sigmoid": lambda s, x: s.call_module("sigmoid", nn.Sigmoid(), x),
    "torch.special.expit": lambda s, x: s.call(torch.special.expit, x),
    "1 / (1 + exp(-x))": lambda s, x: s.call(operator.truediv, 1, _logistic(s, x)),
}

SILU: dict[str, Spelling] = {
    "F.silu": lambda s, x: s.call(F.silu, x),
    "nn.SiLU": lambda s, x: s.call_module("silu", nn.SiLU(), x),
    "x * sigmoid(x)": lambda s, x: s.spell("mul", x, s.spell("sigmoid", x)),
    "F.silu(clone, inplace=True)": lambda s, x: s.call(F.silu, s.call("clone", x), inplace=True),
    "x / (1 + exp(-x))": lambda s, x: s.call(operator.truediv, x, _logistic(s, x)),
}

SOFTPLUS: dict[str, Spelling] = {
    "F.softplus": lambda s, x: s.call(F.softplus, x),
    "nn.Softplus": lambda s, x: s.call_module("softplus", nn.Softplus(), x),
    "F.softplus(x, beta=, threshold=)": lambda s, x: s.call(F.softplus, x, beta=1.0, threshold=20.0),
    "log(1 + exp(x))": lambda s, x: s.call(
        torch.where,
        s.call(operator.gt, x, 20.0),
        x,
        s.call(torch.log1p, s.call(torch.exp, x)),
    ),
}


def _expanded_heads(s: "Speller", x: Node, times: int) -> Node:
    _, h, _, d = s.shape(x)
    sizes = s.sizes(x, 3)
    wide = s.call("expand", s.call("unsqueeze", x, 2), sizes[0], h, times, sizes[2], d)
    return s.spell("reshape", wide, [sizes[0], h * times, sizes[2], d])


def _indexed_heads(s: "Speller", x: Node, times: int) -> Node:
    everything = slice(None)
    wide = s.call(operator.getitem, x, (everything, everything, None, everything, everything))
    _, h, _, d = s.shape(x)
    sizes = s.sizes(x, 3)
    return s.spell(
        "reshape", s.call("expand", wide, -1, -1, times, -1, -1), [sizes[0], h * times, sizes[2], d]
    )


REPEAT_HEADS: dict[str, Spelling] = {
    "expand, reshape": _expanded_heads,
    "x[:, :, None], expand": _indexed_heads,
    "repeat_interleave": lambda s, x, times: s.call("repeat_interleave", x, times, dim=1),
    "torch.repeat_interleave": lambda s, x, times: s.call(torch.repeat_interleave, x, times, 1),
}

TABLE: Mapping[str, dict[str, Spelling]] = {
    "size": SIZE,
    "identity": IDENTITY,
    "reshape": RESHAPE,
    "split": SPLIT,
    "cat": CAT,
    "transpose": TRANSPOSE,
    "linear": LINEAR,
    "turned": TURNED,
    "cast": CAST,
    "add": ADD,
    "mul": MUL,
    "neg": NEG,
    "square": SQUARE,
    "rsqrt": RSQRT,
    "exp": EXP,
    "mean": MEAN,
    "sum": SUM,
    "sigmoid": SIGMOID,
    "silu": SILU,
    "softplus": SOFTPLUS,
    "repeat_heads": REPEAT_HEADS,
}
