"""Ways to average and sum over the last dimension, and the products of the delta rule's state."""

import operator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _sum_divided(s: "Speller", x: Node) -> Node:
    return s.call(operator.truediv, s.spell("sum", x), s.shape(x)[-1])


MEAN: dict[str, Spelling] = {
    "x.mean(-1, keepdim=True)": lambda s, x: s.call("mean", x, -1, keepdim=True),
    "torch.mean(x, dim=-1, keepdim=True)": lambda s, x: s.call(torch.mean, x, dim=-1, keepdim=True),
    "positive dim": lambda s, x: s.call("mean", x, len(s.shape(x)) - 1, True),
    "dim=(-1,)": lambda s, x: s.call("mean", x, dim=(-1,), keepdim=True),
    "mean, unsqueeze": lambda s, x: s.call("unsqueeze", s.call("mean", x, -1), -1),
    "mean[..., None]": lambda s, x: s.call(operator.getitem, s.call("mean", x, -1), (Ellipsis, None)),
    "torch.mean(x, -1, True)": lambda s, x: s.call(torch.mean, x, -1, True),
    "sum / n": _sum_divided,
    "torch.div(sum, n)": lambda s, x: s.call(torch.div, s.spell("sum", x), s.shape(x)[-1]),
    "sum * (1 / n)": lambda s, x: s.call(operator.mul, s.spell("sum", x), 1.0 / s.shape(x)[-1]),
}

SUM: dict[str, Spelling] = {
    "x.sum(-1, keepdim=True)": lambda s, x: s.call("sum", x, -1, keepdim=True),
    "torch.sum(x, dim=-1, keepdim=True)": lambda s, x: s.call(torch.sum, x, dim=-1, keepdim=True),
    "positive dim": lambda s, x: s.call("sum", x, len(s.shape(x)) - 1, True),
    "sum[..., None]": lambda s, x: s.call(operator.getitem, s.call("sum", x, -1), (Ellipsis, None)),
    "sum(dim=[-1], keepdim=True)": lambda s, x: s.call("sum", x, dim=[-1], keepdim=True),
    "sum, unsqueeze": lambda s, x: s.call("unsqueeze", s.call("sum", x, -1), -1),
}


# sum over k of S[b, h, k, v] · q[b, h, k]


def _by_products(s: "Speller", state: Node, q: Node) -> Node:
    return s.call("sum", s.mul(state, s.spell("unsqueeze", q, 3)), dim=-2)


def _by_matmul(s: "Speller", state: Node, q: Node) -> Node:
    return s.call("squeeze", s.call(operator.matmul, s.spell("unsqueeze", q, 2), state), -2)


def _from_the_left(s: "Speller", state: Node, q: Node) -> Node:
    turned = s.spell("transpose", state, 2, 3)
    return s.call("squeeze", s.call(torch.matmul, turned, s.spell("unsqueeze", q, 3)), -1)


def _by_bmm(s: "Speller", state: Node, q: Node) -> Node:
    b, h, k, v = s.shape(state)
    y = s.call(torch.bmm, s.spell("reshape", q, [b * h, 1, k]), s.spell("reshape", state, [b * h, k, v]))
    return s.spell("reshape", y, [b, h, v])


READ_STATE: dict[str, Spelling] = {
    "(S * q[..., None]).sum(-2)": _by_products,
    "einsum": lambda s, state, q: s.call(torch.einsum, "bhkv,bhk->bhv", state, q),
    "einsum, q first": lambda s, state, q: s.call(torch.einsum, "b h k, b h k v -> b h v", q, state),
    "q @ S": _by_matmul,
    "S.mT @ q": _from_the_left,
    "bmm": _by_bmm,
}

# k[..., None] · v[..., None, :]


def _broadcast(s: "Speller", k: Node, v: Node) -> Node:
    return s.mul(s.spell("unsqueeze", k, 3), s.spell("unsqueeze", v, 2))


def _column_by_row(s: "Speller", k: Node, v: Node) -> Node:
    return s.call(operator.matmul, s.spell("unsqueeze", k, 3), s.spell("unsqueeze", v, 2))


OUTER: dict[str, Spelling] = {
    "k[..., None] * v[..., None, :]": _broadcast,
    "einsum": lambda s, k, v: s.call(torch.einsum, "bhk,bhv->bhkv", k, v),
    "column @ row": _column_by_row,
}


# Squares over the last dimension, which stays with size 1


def _last(s: "Speller", y: Node) -> Node:
    return s.call("unsqueeze", y, -1)


def _by_letters(s: "Speller", x: Node) -> Node:
    return _last(s, s.call(torch.einsum, "...d,...d->...", x, x))


def _row_by_column(s: "Speller", x: Node) -> Node:
    product = s.call(operator.matmul, s.call("unsqueeze", x, -2), s.call("unsqueeze", x, -1))
    return s.call("squeeze", product, -1)


SUM_SQUARE: dict[str, Spelling] = {
    "sum of squares": lambda s, x: s.sum(s.square(x)),
    "norm ** 2": lambda s, x: s.call(operator.pow, s.call("norm", x, 2, -1, True), 2),
    "vector_norm squared": lambda s, x: s.call(
        torch.square, s.call(torch.linalg.vector_norm, x, dim=-1, keepdim=True)
    ),
    "einsum(x, x)": _by_letters,
    "vecdot": lambda s, x: _last(s, s.call(torch.linalg.vecdot, x, x)),
    "abs ** 2": lambda s, x: s.sum(s.call(operator.pow, s.call("abs", x), 2)),
    "mean * n": lambda s, x: s.call(operator.mul, s.mean(s.square(x)), s.shape(x)[-1]),
}

MEAN_SQUARE: dict[str, Spelling] = {
    "mean of squares": lambda s, x: s.mean(s.square(x)),
    "sum of squares / n": lambda s, x: s.call(operator.truediv, s.spell("sum_square", x), s.shape(x)[-1]),
    "row @ column / n": lambda s, x: s.call(torch.div, _row_by_column(s, x), s.shape(x)[-1]),
}

# x divided by the root of its mean square and an epsilon


def _by_scale(s: "Speller", x: Node, eps: float) -> Node:
    return s.mul(x, s.rsqrt(s.add(s.spell("mean_square", x), eps)))


def _by_root(s: "Speller", x: Node, eps: float) -> Node:
    return s.call(operator.truediv, x, s.call(torch.sqrt, s.add(s.spell("mean_square", x), eps)))


def _in_place(s: "Speller", x: Node, eps: float) -> Node:
    mean = s.call("mean", s.square(x), -1, keepdim=True)
    return s.call("mul", s.call("rsqrt_", s.call("add_", mean, eps)), x)


NORMED: dict[str, Spelling] = {
    "x * rsqrt(mean + eps)": _by_scale,
    "x / sqrt(mean + eps)": _by_root,
    "mean.add_(eps).rsqrt_().mul(x)": _in_place,
    "F.rms_norm": lambda s, x, eps: s.call(F.rms_norm, x, (s.shape(x)[-1],), None, eps),
    "torch.rms_norm(normalized_shape=, eps=)": lambda s, x, eps: s.call(
        torch.rms_norm, x, normalized_shape=[s.shape(x)[-1]], eps=eps
    ),
}
