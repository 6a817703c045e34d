"""Ways to do nothing."""

import operator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _own_dtype(s: "Speller", x: Node) -> torch.dtype:
    return s.value(x).dtype


def _flat_and_back(s: "Speller", x: Node) -> Node:
    shape = s.shape(x)
    require(len(shape) > 1 and not s.dynamic)
    return s.call("unflatten", s.call("flatten", x, 0, 1), 0, shape[:2])


@torch.no_grad()
def without_gradients(x: torch.Tensor) -> torch.Tensor:
    """x itself, by a function that switches grad mode off on its way."""
    return x.view_as(x)


IDENTITY: dict[str, Spelling] = {
    "contiguous": lambda s, x: s.call("contiguous", x),
    "x.to(own dtype)": lambda s, x: s.call("to", x, _own_dtype(s, x)),
    "x.to(dtype=own)": lambda s, x: s.call("to", x, dtype=_own_dtype(s, x)),
    "x.type_as(x)": lambda s, x: s.call("type_as", x, x),
    "x.type(own dtype)": lambda s, x: s.call("type", x, _own_dtype(s, x)),
    "F.dropout in eval": lambda s, x: s.call(F.dropout, x, 0.1, False),
    "nn.Dropout in eval": lambda s, x: s.call_module("dropout", nn.Dropout(0.1).eval(), x),
    "nn.Identity": lambda s, x: s.call_module("identity", nn.Identity(), x),
    "F.dropout at rate 0": lambda s, x: s.call(F.dropout, x, 0.0, True),
    "torch.dropout in eval": lambda s, x: s.call(torch.dropout, x, 0.5, False),
    "x.clone()": lambda s, x: s.call("clone", x),
    "x.detach()": lambda s, x: s.call("detach", x),
    "x.to(own device)": lambda s, x: s.call("to", x, s.value(x).device),
    "torch.no_grad()": lambda s, x: s.call(without_gradients, x),
    "-(-x)": lambda s, x: s.call(operator.neg, s.call(operator.neg, x)),
    "torch.cat([x])": lambda s, x: s.call(torch.cat, [x], 0),
    "stack of one, [0]": lambda s, x: s.call("squeeze", s.call(torch.stack, [x]), 0),
    "x.pow(1)": lambda s, x: s.call("pow", x, 1),
    "x.expand_as(x)": lambda s, x: s.call("expand_as", x, x),
    "x.reshape_as(x)": lambda s, x: s.call("reshape_as", x, x),
    "x.permute(in order)": lambda s, x: s.call("permute", x, *range(len(s.shape(x)))),
    "flatten, unflatten": _flat_and_back,
    "x[None][0]": lambda s, x: s.call(operator.getitem, s.call(operator.getitem, x, None), 0),
    "x.repeat(1, 1)": lambda s, x: s.call("repeat", x, *(1 for _ in s.shape(x))),
    "x += 0": lambda s, x: s.call(operator.iadd, s.call("clone", x), 0),
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
