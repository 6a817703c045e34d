"""Ways to write to a tensor that others read later."""

import operator
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller

_ALL = slice(None)


def _assigned(s: "Speller", x: Node, value: Node, place: object) -> None:
    s.call(operator.setitem, x, place, value)


# The whole of x.
WRITE: dict[str, Spelling] = {
    "x.copy_(v)": lambda s, x, value: s.call("copy_", x, value),
    "x[:] = v": lambda s, x, value: _assigned(s, x, value, _ALL),
    "x[...] = v": lambda s, x, value: _assigned(s, x, value, Ellipsis),
    "x[:, :] = v": lambda s, x, value: _assigned(s, x, value, (_ALL, _ALL)),
    "torch.Tensor.copy_": lambda s, x, value: s.call(torch.Tensor.copy_, x, value),
    "x.detach().copy_(v)": lambda s, x, value: s.call("copy_", s.call("detach", x), value),
}

# Rows `positions` of the third of four dimensions; the tensor is handed back. x[:, :, positions] = v is no
# spelling of it: there negative positions count from the end.
WRITE_AT: dict[str, Spelling] = {
    "x.index_copy_(2, p, v)": lambda s, x, p, v: s.call("index_copy_", x, 2, p, v),
    "x.index_copy_(-2, p, v)": lambda s, x, p, v: s.call("index_copy_", x, -2, p, v),
    "torch.Tensor.index_copy_": lambda s, x, p, v: s.call(torch.Tensor.index_copy_, x, 2, p, v),
    "x.index_copy_(dim=, index=, source=)": lambda s, x, p, v: s.call(
        "index_copy_", x, dim=2, index=p, source=v
    ),
}


def _from_python(s: "Speller", x: Node, step: int) -> None:
    require(step > 0)
    s.call(operator.iadd, x, step)


# A tensor of one whole number, by a number.
COUNT_UP: dict[str, Spelling] = {
    "x.add_(n)": lambda s, x, n: s.call("add_", x, n),
    "x += n": _from_python,
    "x.add_(n, alpha=1)": lambda s, x, n: s.call("add_", x, n, alpha=1),
    "torch.Tensor.add_": lambda s, x, n: s.call(torch.Tensor.add_, x, n),
    "x.sub_(-n)": lambda s, x, n: s.call("sub_", x, -n),
    "x.copy_(x + n)": lambda s, x, n: s.call("copy_", x, s.call(operator.add, x, n)),
    "x[...] = x + n": lambda s, x, n: s.call(operator.setitem, x, Ellipsis, s.call(operator.add, x, n)),
}
