"""Ways to cast, to add and multiply, and to average."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, letters, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _short_cast(s: "Speller", x: Node, dtype: torch.dtype, like: Node | None) -> Node:
    short = {
        torch.float32: "float",
        torch.float64: "double",
        torch.bfloat16: "bfloat16",
        torch.float16: "half",
    }
    require(dtype in short)
    return s.call(short[dtype], x)


def _cast_like(s: "Speller", x: Node, dtype: torch.dtype, like: Node | None, target: str) -> Node:
    require(like is not None)
    return s.call(target, x, like)


def _dtype_of_other(s: "Speller", x: Node, dtype: torch.dtype, like: Node | None) -> Node:
    require(like is not None)
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


def _needs_tensor(s: "Speller", a: Any) -> None:
    require(isinstance(s.value(a), torch.Tensor))


def _method(name: str, swap: bool = False) -> Spelling:
    def written(s: "Speller", a: Any, b: Any) -> Node:
        a, b = (b, a) if swap else (a, b)
        _needs_tensor(s, a)
        return s.call(name, a, b)

    return written


def _in_place(name: str | Callable[..., Any]) -> Spelling:
    """x.mul(y) as a copy that is then written: the operand itself may be read again."""

    def written(s: "Speller", a: Any, b: Any) -> Node:
        _needs_tensor(s, a)
        first, second = s.value(a), s.value(b)
        require(torch.broadcast_shapes(first.shape, getattr(second, "shape", ())) == first.shape)
        require(torch.result_type(first, second) == first.dtype)
        return s.call(name, s.call("clone", a), b)

    return written


def _two(function: Callable[..., Any], swap: bool = False) -> Spelling:
    def written(s: "Speller", a: Any, b: Any) -> Node:
        a, b = (b, a) if swap else (a, b)
        if function in (torch.add, torch.mul):
            _needs_tensor(s, a)
        return s.call(function, a, b)

    return written


def _needs_two_tensors(write: Spelling) -> Spelling:
    def written(s: "Speller", a: Any, b: Any) -> Node:
        _needs_tensor(s, a)
        _needs_tensor(s, b)
        return write(s, a, b)

    return written


def _two_by_name(function: Callable[..., Any]) -> Spelling:
    return _needs_two_tensors(lambda s, a, b: s.call(function, input=a, other=b))


def _expanded(s: "Speller", a: Any, b: Any) -> Node:
    _needs_tensor(s, a)
    _needs_tensor(s, b)
    first, second = s.shape(a), s.shape(b)
    require(first != second and torch.broadcast_shapes(first, second) == first)
    return s.call(operator.mul, a, s.call("expand_as", b, a))


def _letter_by_letter(s: "Speller", a: Any, b: Any) -> Node:
    _needs_tensor(s, a)
    _needs_tensor(s, b)
    shape, dtypes = s.shape(a), {s.value(a).dtype, s.value(b).dtype}
    require(len(shape) > 1 and shape == s.shape(b) and len(dtypes) == 1)
    names = letters(len(shape))
    return s.call(torch.einsum, f"{names},{names}->{names}", a, b)


def _number_as_tensor(s: "Speller", a: Any, b: Any) -> Node:
    _needs_tensor(s, a)
    require(type(b) is float)
    return s.call(operator.add, a, s.call(torch.tensor, b))


ADD: dict[str, Spelling] = {
    "a + b": _two(operator.add),
    "b + a": _two(operator.add, swap=True),
    "torch.add": _two(torch.add),
    "torch.add(b, a)": _two(torch.add, swap=True),
    "a.add(b)": _method("add"),
    "b.add(a)": _method("add", swap=True),
    "torch.add(alpha=1)": _needs_two_tensors(lambda s, a, b: s.call(torch.add, a, b, alpha=1)),
    "torch.add(input=, other=)": _two_by_name(torch.add),
    "a - (-b)": lambda s, a, b: s.call(operator.sub, a, s.spell("neg", b) if isinstance(b, Node) else -b),
    "clone, add_": _in_place("add_"),
    "clone, +=": _in_place(operator.iadd),
    "a + torch.tensor(n)": _number_as_tensor,
}

SUB: dict[str, Spelling] = {
    "a - b": _two(operator.sub),
    "torch.sub": _two(torch.sub),
    "torch.subtract": _two(torch.subtract),
    "a.sub(b)": _method("sub"),
    "a + (-b)": lambda s, a, b: s.call(operator.add, a, s.spell("neg", b)),
    "torch.rsub(b, a)": _two(torch.rsub, swap=True),
    "clone, sub_": _in_place("sub_"),
    "torch.add(alpha=-1)": lambda s, a, b: s.call(torch.add, a, b, alpha=-1),
}

MUL: dict[str, Spelling] = {
    "a * b": _two(operator.mul),
    "b * a": _two(operator.mul, swap=True),
    "torch.mul": _two(torch.mul),
    "torch.mul(b, a)": _two(torch.mul, swap=True),
    "torch.multiply": _two(torch.mul),
    "a.mul(b)": _method("mul"),
    "b.mul(a)": _method("mul", swap=True),
    "torch.mul(input=, other=)": _two_by_name(torch.mul),
    "clone, mul_": _in_place("mul_"),
    "clone, *=": _in_place(operator.imul),
    "a * b.expand_as(a)": _expanded,
    "-(-a * b)": lambda s, a, b: s.call(operator.neg, s.call(operator.mul, s.spell("neg", a), b)),
    "einsum": _letter_by_letter,
}

NEG: dict[str, Spelling] = {
    "-x": lambda s, x: s.call(operator.neg, x),
    "torch.neg": lambda s, x: s.call(torch.neg, x),
    "x.neg()": lambda s, x: s.call("neg", x),
    "x * -1": lambda s, x: s.call(operator.mul, x, -1),
    "torch.negative": lambda s, x: s.call(torch.negative, x),
    "x / -1": lambda s, x: s.call(operator.truediv, x, -1),
    "0 - x": lambda s, x: s.call(operator.sub, 0, x),
}

SQUARE: dict[str, Spelling] = {
    "x.pow(2)": lambda s, x: s.call("pow", x, 2),
    "x ** 2": lambda s, x: s.call(operator.pow, x, 2),
    "x * x": lambda s, x: s.call(operator.mul, x, x),
    "torch.square": lambda s, x: s.call(torch.square, x),
    "torch.pow(x, 2.0)": lambda s, x: s.call(torch.pow, x, 2.0),
    "x.mul(x)": lambda s, x: s.call("mul", x, x),
    "torch.mul(x, x)": lambda s, x: s.call(torch.mul, x, x),
    "clone, pow_": lambda s, x: s.call("pow_", s.call("clone", x), 2),
    "x.square()": lambda s, x: s.call("square", x),
}

RSQRT: dict[str, Spelling] = {
    "torch.rsqrt": lambda s, x: s.call(torch.rsqrt, x),
    "x.rsqrt()": lambda s, x: s.call("rsqrt", x),
    "1 / torch.sqrt": lambda s, x: s.call(operator.truediv, 1, s.call(torch.sqrt, x)),
    "x.sqrt().reciprocal()": lambda s, x: s.call("reciprocal", s.call("sqrt", x)),
    "x.sqrt() ** -1": lambda s, x: s.call(operator.pow, s.call("sqrt", x), -1),
    "1 / x ** 0.5": lambda s, x: s.call(operator.truediv, 1.0, s.call(operator.pow, x, 0.5)),
    "torch.reciprocal(torch.sqrt)": lambda s, x: s.call(torch.reciprocal, s.call(torch.sqrt, x)),
    "sqrt(1 / x)": lambda s, x: s.call(torch.sqrt, s.call(operator.truediv, 1, x)),
    "torch.pow(sqrt, exponent=-1)": lambda s, x: s.call(
        torch.pow, s.call(torch.sqrt, input=x), exponent=-1.0
    ),
    "x.pow(-0.5)": lambda s, x: s.call("pow", x, -0.5),
    "x ** -0.5": lambda s, x: s.call(operator.pow, x, -0.5),
    "torch.pow(x, -0.5)": lambda s, x: s.call(torch.pow, x, -0.5),
    "clone, rsqrt_": lambda s, x: s.call("rsqrt_", s.call("clone", x)),
    "x.reciprocal().sqrt()": lambda s, x: s.call("sqrt", s.call("reciprocal", x)),
}


# -a · b

MINUS_PRODUCT: dict[str, Spelling] = {
    "(-a) * b": lambda s, a, b: s.mul(s.neg(a), b),
    "a * (-b)": lambda s, a, b: s.mul(a, s.neg(b)),
    "-(a * b)": lambda s, a, b: s.neg(s.mul(a, b)),
}


def _distributed(s: "Speller", x: Node, w: Node) -> Node:
    return s.call(operator.add, x, s.call(operator.mul, x, w))


# x · (1 + w)

TIMES_ONE_PLUS: dict[str, Spelling] = {
    "x * (1 + w)": lambda s, x, w: s.mul(x, s.add(w, 1.0)),
    "x + x * w": _distributed,
    "addcmul(x, x, w)": lambda s, x, w: s.call(torch.addcmul, x, x, w),
    "x * (1 - (-w))": lambda s, x, w: s.mul(x, s.call(operator.sub, 1, s.spell("neg", w))),
    'einsum("...d,d->...d")': lambda s, x, w: s.call(torch.einsum, "...d,d->...d", x, s.add(w, 1.0)),
}
