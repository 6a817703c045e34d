"""Ways to choose matrices by number, and to multiply each with a row of its own."""

import operator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _by_gather(s: "Speller", weights: Node, ids: Node) -> Node:
    _, height, width = s.shape(weights)
    places = s.call("expand", s.call("view", ids, -1, 1, 1), -1, height, width)
    return s.call(torch.gather, weights, 0, places)


# weights [E, N, K] at ids [S]: [S, N, K]
CHOSEN: dict[str, Spelling] = {
    "w[ids]": lambda s, w, ids: s.call(operator.getitem, w, ids),
    "w[ids, :, :]": lambda s, w, ids: s.call(operator.getitem, w, (ids, slice(None), slice(None))),
    "w.index_select(0, ids)": lambda s, w, ids: s.call("index_select", w, 0, ids),
    "torch.index_select(dim=, index=)": lambda s, w, ids: s.call(torch.index_select, w, dim=0, index=ids),
    "torch.gather": _by_gather,
    "F.embedding of rows, unflatten": lambda s, w, ids: s.call(
        "unflatten", s.call(F.embedding, ids, s.call("flatten", w, 1)), 1, tuple(s.shape(w)[1:])
    ),
}


def _column(s: "Speller", x: Node) -> Node:
    return s.call("unsqueeze", x, -1)


def _row(s: "Speller", x: Node) -> Node:
    return s.call(operator.getitem, x, (slice(None), None))


def _turned(s: "Speller", w: Node) -> Node:
    return s.call("transpose", w, 1, 2)


# w [S, N, K] and x [S, K]: [S, N]
EACH_TIMES_ITS_ROW: dict[str, Spelling] = {
    "torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)": lambda s, w, x: s.call(
        "squeeze", s.call(torch.bmm, w, _column(s, x)), -1
    ),
    "(w @ x[..., None])[..., 0]": lambda s, w, x: s.call(
        operator.getitem, s.call(operator.matmul, w, _column(s, x)), (Ellipsis, 0)
    ),
    "torch.bmm(x[:, None], w.transpose(1, 2))": lambda s, w, x: s.call(
        "squeeze", s.call(torch.bmm, _row(s, x), _turned(s, w)), 1
    ),
    "x[:, None].matmul(w.mT)[:, 0]": lambda s, w, x: s.call(
        "select", s.call("matmul", _row(s, x), s.call(getattr, w, "mT")), 1, 0
    ),
    "einsum": lambda s, w, x: s.call(torch.einsum, "eoi,ei->eo", w, x),
    "einsum, x first": lambda s, w, x: s.call(torch.einsum, "n k, n h k -> n h", x, w),
    "einsum with ellipsis": lambda s, w, x: s.call(torch.einsum, "...oi,...i->...o", w, x),
    "(w * x[:, None]).sum(-1)": lambda s, w, x: s.call("sum", s.mul(w, _row(s, x)), -1),
    "sum(keepdim=True).squeeze": lambda s, w, x: s.call(
        "squeeze", s.call(torch.sum, s.call(torch.mul, _row(s, x), w), dim=2, keepdim=True), -1
    ),
    "vecdot": lambda s, w, x: s.call(torch.linalg.vecdot, w, _row(s, x)),
}
