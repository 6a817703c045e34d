"""Ways to write a linear and the transpose of its weight."""

import operator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, letters, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _weight(s: "Speller", name: str) -> Node:
    return s.parameter(f"{name}.weight", torch.empty(0))


def _bias(s: "Speller", name: str) -> Node | None:
    return None if s.owned(name).bias is None else s.parameter(f"{name}.bias", torch.empty(0))


def _turned(s: "Speller", name: str) -> Node:
    return s.spell("turned", _weight(s, name))


def _plus_bias(s: "Speller", y: Node, name: str) -> Node:
    bias = _bias(s, name)
    return y if bias is None else s.spell("add", y, bias)


def _by_addmm(s: "Speller", x: Node, name: str) -> Node:
    bias, shape = _bias(s, name), s.shape(x)
    require(bias is not None)
    outputs = s.owned(name).out_features
    rows = x if len(shape) == 2 else s.spell("reshape", x, [-1, shape[-1]] if s.dynamic else _rows(shape))
    y = s.call(torch.addmm, bias, rows, _turned(s, name))
    return y if len(shape) == 2 else s.spell("reshape", y, [*s.sizes(x, len(shape) - 1), outputs])


def _rows(shape: tuple[int, ...]) -> list[int]:
    count = 1
    for size in shape[:-1]:
        count *= size
    return [count, shape[-1]]


def _by_mm(s: "Speller", x: Node, name: str) -> Node:
    require(len(s.shape(x)) == 2)
    return _plus_bias(s, s.call(torch.mm, x, _turned(s, name)), name)


def _by_einsum(s: "Speller", x: Node, name: str) -> Node:
    lead = letters(len(s.shape(x)) - 1)
    y = s.call(torch.einsum, f"{lead}i,oi->{lead}o", x, _weight(s, name))
    return _plus_bias(s, y, name)


def _rows_by_mm(s: "Speller", x: Node, name: str) -> Node:
    shape = s.shape(x)
    require(len(shape) > 2 and not s.dynamic)
    y = s.call(torch.mm, s.spell("reshape", x, _rows(shape)), _turned(s, name))
    back = s.spell("reshape", y, [*shape[:-1], s.owned(name).out_features])
    return _plus_bias(s, back, name)


def _from_the_left(s: "Speller", x: Node, name: str) -> Node:
    require(s.shape(x)[-2] > 1)
    y = s.call(operator.matmul, _weight(s, name), s.call(getattr, x, "mT"))
    rows = s.call("contiguous", s.call(getattr, y, "mT"))  # or the result has other strides
    return _plus_bias(s, rows, name)


def _for_each_batch(s: "Speller", x: Node, name: str) -> tuple[Node, int]:
    """The weight's transpose, once for each of the batch."""
    shape = s.shape(x)
    require(len(shape) == 3 and not s.dynamic)
    return s.call("expand", s.call("unsqueeze", _turned(s, name), 0), shape[0], -1, -1), shape[0]


def _by_bmm(s: "Speller", x: Node, name: str) -> Node:
    weights, _ = _for_each_batch(s, x, name)
    return _plus_bias(s, s.call(torch.bmm, x, weights), name)


def _by_baddbmm(s: "Speller", x: Node, name: str) -> Node:
    bias = s.owned(name).bias
    require(bias is not None)
    weights, _ = _for_each_batch(s, x, name)
    return s.call(torch.baddbmm, s.parameter(f"{name}.bias", torch.empty(0)), x, weights)


def _by_letters(equation: str) -> Spelling:
    return lambda s, x, name: _plus_bias(s, s.call(torch.einsum, equation, x, _weight(s, name)), name)


def _weight_first(s: "Speller", x: Node, name: str) -> Node:
    lead = letters(len(s.shape(x)) - 1)
    y = s.call(torch.einsum, f"o i, {' '.join(lead)} i -> {' '.join(lead)} o", _weight(s, name), x)
    return _plus_bias(s, y, name)


def _by_one_tap(s: "Speller", x: Node, name: str) -> Node:
    require(len(s.shape(x)) == 3)
    weight = s.call(operator.getitem, _weight(s, name), (slice(None), slice(None), None))
    y = s.call(F.conv1d, s.call(getattr, x, "mT"), weight, _bias(s, name))
    return s.call("contiguous", s.call(getattr, y, "mT"))  # or the result has other strides


def _added_to_nothing(s: "Speller", x: Node, name: str) -> Node:
    shape, outputs = s.shape(x), s.owned(name).out_features
    require(len(shape) > 2 and not s.dynamic)
    zeros = s.call(torch.zeros, outputs, dtype=s.value(x).dtype)
    y = s.call(torch.addmm, zeros, s.spell("reshape", x, _rows(shape)), _turned(s, name))
    return _plus_bias(s, s.spell("reshape", y, [*shape[:-1], outputs]), name)


LINEAR: dict[str, Spelling] = {
    "nn.Linear": lambda s, x, name: s.call_module(s.prefix + name, None, x),
    "F.linear": lambda s, x, name: s.call(F.linear, x, _weight(s, name), _bias(s, name)),
    "F.linear(input=, weight=, bias=)": lambda s, x, name: s.call(
        F.linear, input=x, weight=_weight(s, name), bias=_bias(s, name)
    ),
    "x @ w.t()": lambda s, x, name: _plus_bias(s, s.call(operator.matmul, x, _turned(s, name)), name),
    "torch.matmul": lambda s, x, name: _plus_bias(s, s.call(torch.matmul, x, _turned(s, name)), name),
    "x.matmul": lambda s, x, name: _plus_bias(s, s.call("matmul", x, _turned(s, name)), name),
    "x.inner(w)": lambda s, x, name: _plus_bias(s, s.call("inner", x, _weight(s, name)), name),
    "torch.tensordot": lambda s, x, name: _plus_bias(
        s, s.call(torch.tensordot, x, _weight(s, name), dims=([-1], [1])), name
    ),
    "(w @ x.mT).mT.contiguous()": _from_the_left,
    "torch.bmm": _by_bmm,
    "torch.baddbmm": _by_baddbmm,
    "rows, torch.mm": _rows_by_mm,
    "einsum with an ellipsis": _by_letters("...i,oi->...o"),
    "einsum, weight first": _weight_first,
    "torch.mm": _by_mm,
    "torch.addmm": _by_addmm,
    "einsum": _by_einsum,
    "F.conv1d of one tap": _by_one_tap,
    "torch.addmm(zeros)": _added_to_nothing,
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
    "w.t().contiguous()": lambda s, w: s.call("contiguous", s.call("t", w)),
}
