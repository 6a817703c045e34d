"""Ways to exchange dimensions, and to repeat along one."""

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, letters, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _permutation(s: "Speller", x: Node, a: int, b: int) -> list[int]:
    order = list(range(len(s.shape(x))))
    order[a], order[b] = order[b], order[a]
    return order


def _movedim(s: "Speller", x: Node, a: int, b: int, target: Any) -> Node:
    require(abs(a - b) == 1)
    return s.call(target, x, a, b)


def _transposed_by_einsum(s: "Speller", x: Node, a: int, b: int) -> Node:
    names = letters(len(s.shape(x)))
    return s.call(torch.einsum, f"{names}->{''.join(names[i] for i in _permutation(s, x, a, b))}", x)


def _last_two(s: "Speller", x: Node, a: int, b: int, name: str) -> Node:
    dims = len(s.shape(x))
    require({a, b} == {dims - 1, dims - 2})
    return s.call(getattr, x, name)


def _by_none(s: "Speller", x: Node, dim: int) -> Node:
    return s.call(operator.getitem, x, (*(slice(None) for _ in range(dim)), None))


def _by_reshape(s: "Speller", x: Node, dim: int) -> Node:
    require(not s.dynamic)
    shape = s.shape(x)
    return s.call("reshape", x, *shape[:dim], 1, *shape[dim:])


UNSQUEEZE: dict[str, Spelling] = {
    "x.unsqueeze(dim)": lambda s, x, dim: s.call("unsqueeze", x, dim),
    "torch.unsqueeze(x, dim=)": lambda s, x, dim: s.call(torch.unsqueeze, x, dim=dim),
    "negative dim": lambda s, x, dim: s.call("unsqueeze", x, dim - len(s.shape(x)) - 1),
    "x[:, None]": _by_none,
    "x[..., None, :]": lambda s, x, dim: s.call(
        operator.getitem, x, (Ellipsis, None, *(slice(None) for _ in s.shape(x)[dim:]))
    ),
    "reshape": _by_reshape,
}

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
    "x.permute(tuple)": lambda s, x, a, b: s.call("permute", x, tuple(_permutation(s, x, a, b))),
    "torch.movedim(x, tuple, tuple)": lambda s, x, a, b: s.call(torch.movedim, x, (a, b), (b, a)),
    "torch.transpose(dim0=, dim1=)": lambda s, x, a, b: s.call(torch.transpose, input=x, dim0=a, dim1=b),
    "einsum": _transposed_by_einsum,
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


def _joined(s: "Speller", wide: Node) -> Node:
    return s.call("flatten", wide, 1, 2)


def _stacked_heads(s: "Speller", x: Node, times: int) -> Node:
    return _joined(s, s.call(torch.stack, [x] * times, dim=2))


def _chosen_heads(s: "Speller", x: Node, times: int) -> Node:
    heads = s.call(torch.arange, s.shape(x)[1])
    return s.call("index_select", x, 1, s.call("repeat_interleave", heads, times))


def _broadcast_heads(s: "Speller", x: Node, times: int) -> Node:
    b, h, t, d = s.shape(x)
    require(not s.dynamic)
    return _joined(s, s.call(torch.broadcast_to, s.call("unsqueeze", x, 2), (b, h, times, t, d)))


def _one_head_expanded(s: "Speller", x: Node, times: int) -> Node:
    require(s.shape(x)[1] == 1)
    return s.call("expand", x, -1, times, -1, -1)


REPEAT_HEADS: dict[str, Spelling] = {
    "expand, reshape": _expanded_heads,
    "x[:, :, None], expand": _indexed_heads,
    "repeat_interleave": lambda s, x, times: s.call("repeat_interleave", x, times, dim=1),
    "unsqueeze, repeat, flatten": lambda s, x, times: _joined(
        s, s.call("repeat", s.call("unsqueeze", x, 2), 1, 1, times, 1, 1)
    ),
    "stack, flatten": _stacked_heads,
    "unsqueeze, tile, flatten": lambda s, x, times: _joined(
        s, s.call("tile", s.call("unsqueeze", x, 2), (1, 1, times, 1, 1))
    ),
    "one head, expanded": _one_head_expanded,
    "broadcast_to, flatten": _broadcast_heads,
    "index_select": _chosen_heads,
    "repeat_interleave(repeats=, dim=)": lambda s, x, times: s.call(
        torch.repeat_interleave, input=x, repeats=times, dim=-3
    ),
    "torch.repeat_interleave": lambda s, x, times: s.call(torch.repeat_interleave, x, times, 1),
}
