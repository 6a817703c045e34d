"""Ways to write exponentials and the functions made of them."""

import operator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


EXP: dict[str, Spelling] = {
    "torch.exp": lambda s, x: s.call(torch.exp, x),
    "x.exp()": lambda s, x: s.call("exp", x),
}


def _logistic(s: "Speller", x: Node) -> Node:
    return s.call(operator.add, 1, s.spell("exp", s.spell("neg", x)))


def _by_tanh(s: "Speller", x: Node) -> Node:
    turned = s.call(torch.tanh, s.call(operator.mul, x, 0.5))
    return s.call(operator.mul, s.call(operator.add, turned, 1.0), 0.5)


SIGMOID: dict[str, Spelling] = {
    "torch.sigmoid": lambda s, x: s.call(torch.sigmoid, x),
    "x.sigmoid()": lambda s, x: s.call("sigmoid", x),
    "F.sigmoid": lambda s, x: s.call(F.sigmoid, x),
    "nn.Sigmoid": lambda s, x: s.call_module("sigmoid", nn.Sigmoid(), x),
    "torch.special.expit": lambda s, x: s.call(torch.special.expit, x),
    "clone, sigmoid_": lambda s, x: s.call("sigmoid_", s.call("clone", x)),
    "(1 + exp(-x)).reciprocal()": lambda s, x: s.call("reciprocal", _logistic(s, x)),
    "(1 + exp(-x)) ** -1": lambda s, x: s.call(operator.pow, _logistic(s, x), -1),
    "(1 + tanh(x / 2)) / 2": _by_tanh,
    "exp(logsigmoid(x))": lambda s, x: s.call(torch.exp, s.call(F.logsigmoid, x)),
    "1 - sigmoid(-x)": lambda s, x: s.call(operator.sub, 1, s.call(torch.sigmoid, s.spell("neg", x))),
    "1 / (1 + exp(-x))": lambda s, x: s.call(operator.truediv, 1, _logistic(s, x)),
}

SILU: dict[str, Spelling] = {
    "F.silu": lambda s, x: s.call(F.silu, x),
    "nn.SiLU": lambda s, x: s.call_module("silu", nn.SiLU(), x),
    "x * sigmoid(x)": lambda s, x: s.spell("mul", x, s.spell("sigmoid", x)),
    "F.silu(clone, inplace=True)": lambda s, x: s.call(F.silu, s.call("clone", x), inplace=True),
    "nn.SiLU(inplace=True)": lambda s, x: s.call_module(
        "silu_in_place", nn.SiLU(inplace=True), s.call("clone", x)
    ),
    "sigmoid(x).mul_(x)": lambda s, x: s.call("mul_", s.call("sigmoid", x), x),
    "torch.ops.aten.silu": lambda s, x: s.call(torch.ops.aten.silu, x),
    "F.glu(cat([x, x]))": lambda s, x: s.call(F.glu, s.cat([x, x]), -1),
    "x / (1 + exp(-x))": lambda s, x: s.call(operator.truediv, x, _logistic(s, x)),
}


def _stable_softplus(s: "Speller", x: Node) -> Node:
    decaying = s.call(torch.exp, s.call(operator.neg, s.call(torch.abs, x)))
    return s.call(operator.add, s.call(F.relu, x), s.call(torch.log1p, decaying))


def _clamped_softplus(s: "Speller", x: Node) -> Node:
    decaying = s.call("exp", s.call("neg", s.call("abs", x)))
    return s.call(torch.add, s.call("clamp", x, min=0), s.call("log1p", decaying))


SOFTPLUS: dict[str, Spelling] = {
    "F.softplus": lambda s, x: s.call(F.softplus, x),
    "nn.Softplus": lambda s, x: s.call_module("softplus", nn.Softplus(), x),
    "F.softplus(x, beta=, threshold=)": lambda s, x: s.call(F.softplus, x, beta=1.0, threshold=20.0),
    "nn.Softplus(beta=, threshold=)": lambda s, x: s.call_module("softplus", nn.Softplus(1, 20), x),
    "-logsigmoid(-x)": lambda s, x: s.call(operator.neg, s.call(F.logsigmoid, s.call(operator.neg, x))),
    "logaddexp(x, 0)": lambda s, x: s.call(torch.logaddexp, x, s.call(torch.zeros_like, x)),
    "log(1 + exp(x))": lambda s, x: s.call(torch.log, s.call(operator.add, 1, s.call(torch.exp, x))),
    "log1p(exp(x))": lambda s, x: s.call("log1p", s.call("exp", x)),
    "relu(x) + log1p(exp(-|x|))": _stable_softplus,
    "relu by clamp": _clamped_softplus,
    "logaddexp(number, x)": lambda s, x: s.call(
        torch.logaddexp, s.call(torch.zeros, (), dtype=s.value(x).dtype), x
    ),
    "x + log1p(exp(-x))": lambda s, x: s.call(
        operator.add, x, s.call("log1p", s.call("exp", s.call(operator.neg, x)))
    ),
    "x - logsigmoid(x)": lambda s, x: s.call(torch.sub, x, s.call(F.logsigmoid, x)),
    "x where it is large": lambda s, x: s.call(
        torch.where, s.call(operator.le, x, 20.0), s.call("log1p", s.call("exp", x)), x
    ),
    "log1p(exp(x)) where x is small": lambda s, x: s.call(
        torch.where,
        s.call(operator.gt, x, 20.0),
        x,
        s.call(torch.log1p, s.call(torch.exp, x)),
    ),
}

# y · sigmoid(g)


def _by_glu(s: "Speller", y: Node, g: Node) -> Node:
    require(s.shape(y) == s.shape(g) and s.value(y).dtype == s.value(g).dtype)
    return s.call(F.glu, s.cat([y, g]), -1)


TIMES_SIGMOID: dict[str, Spelling] = {
    "y * sigmoid(g)": lambda s, y, g: s.mul(y, s.sigmoid(g)),
    "F.glu(cat([y, g]))": _by_glu,
    "y / (1 + exp(-g))": lambda s, y, g: s.call(operator.truediv, y, _logistic(s, g)),
}

# silu(g) · u

TIMES_SILU: dict[str, Spelling] = {
    "silu(g) * u": lambda s, g, u: s.mul(s.silu(g), u),
    "(g * u) * sigmoid(g)": lambda s, g, u: s.spell("times_sigmoid", s.mul(g, u), g),
}
