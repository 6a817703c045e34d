"""Ways to ask for a size, to change a shape, to split and to join."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from fxfuse.testing.spellings.spelling import DoesNotApply, Spelling, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _size_number(s: "Speller", x: Node, dim: int) -> int:
    require(not s.dynamic)
    return s.shape(x)[dim]


SIZE: dict[str, Spelling] = {
    "number": _size_number,
    "x.size(i)": lambda s, x, dim: s.call("size", x, dim),
    "x.shape[i]": lambda s, x, dim: s.call(operator.getitem, s.call(getattr, x, "shape"), dim),
    "x.size()[i]": lambda s, x, dim: s.call(operator.getitem, s.call("size", x), dim),
}


def _view(s: "Speller", x: Node, shape: list[Any], *packed: Any) -> Node:
    try:
        s.value(x).view([s.value(n) for n in shape])
    except RuntimeError:
        raise DoesNotApply from None
    return s.call("view", x, *(packed or shape))


def _with_minus_one(s: "Speller", x: Node, shape: list[Any]) -> Node:
    require(s.value(x).numel() > 0 and -1 not in [s.value(n) for n in shape])
    place = s.rng.randrange(len(shape))
    return s.call("reshape", x, *(-1 if i == place else n for i, n in enumerate(shape)))


def _flatten(s: "Speller", x: Node, shape: list[Any], call: Callable[..., Node]) -> Node:
    old, new = s.shape(x), [s.value(n) for n in shape]
    last = len(new) - 1
    require(len(old) > len(new) and list(old[:last]) == new[:last])
    return call(s, x, last)


def _unflatten(s: "Speller", x: Node, shape: list[Any], call: Callable[..., Node]) -> Node:
    old, new = s.shape(x), [s.value(n) for n in shape]
    last = len(old) - 1
    require(len(new) > len(old) and list(old[:last]) == new[:last])
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
    "x.reshape(shape=)": lambda s, x, shape: s.call("reshape", x, shape=tuple(shape)),
    "x.unflatten(dim=, sizes=)": lambda s, x, shape: _unflatten(
        s, x, shape, lambda s, x, tail: s.call("unflatten", x, dim=-1, sizes=(*tail[:-1], -1))
    ),
    "x.flatten(from, to)": lambda s, x, shape: _flatten(
        s, x, shape, lambda s, x, i: s.call("flatten", x, i - len(s.shape(x)), -1)
    ),
    "torch.unflatten": lambda s, x, shape: _unflatten(
        s, x, shape, lambda s, x, tail: s.call(torch.unflatten, x, -1, tuple(tail))
    ),
    "reshape(-1) first": _rows_first,
}


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
        require(len(set(sizes)) == 1)
        return s.parts(call(s, x, sizes, dim), len(sizes))

    return written


def _unbound(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
    require(len(set(sizes)) == 1)
    unflat = s.call("unflatten", x, dim, (len(sizes), sizes[0]))
    return s.parts(s.call("unbind", unflat, dim - 1), len(sizes))


def _indexed(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
    require(len(set(sizes)) == 1)
    unflat = s.call("unflatten", x, dim, (len(sizes), sizes[0]))
    after = (slice(None),) * -dim
    return [s.call(operator.getitem, unflat, (Ellipsis, i, *after)) for i in range(len(sizes))]


def _split_by_name(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
    """hsplit cuts the second dimension, dsplit the third."""
    place = len(s.shape(x)) + dim
    require(place in (1, 2))
    function = torch.hsplit if place == 1 else torch.dsplit
    return s.parts(s.call(function, x, _starts(sizes)[1:]), len(sizes))


def _selected(s: "Speller", x: Node, sizes: list[int], dim: int) -> list[Node]:
    places = [s.call(torch.arange, a, a + n) for a, n in zip(_starts(sizes), sizes, strict=True)]
    return [s.call(torch.index_select, x, dim, place) for place in places]


SPLIT: dict[str, Spelling] = {
    "torch.split(x, sizes, dim=)": lambda s, x, sizes, dim: s.parts(
        s.call(torch.split, x, sizes, dim=dim), len(sizes)
    ),
    "x.split(sizes, dim)": lambda s, x, sizes, dim: s.parts(s.call("split", x, sizes, dim), len(sizes)),
    "x.split(tuple, positive dim)": lambda s, x, sizes, dim: s.parts(
        s.call("split", x, tuple(sizes), len(s.shape(x)) + dim), len(sizes)
    ),
    "x.split_with_sizes": lambda s, x, sizes, dim: s.parts(
        s.call("split_with_sizes", x, sizes, dim), len(sizes)
    ),
    "x.tensor_split(places)": lambda s, x, sizes, dim: s.parts(
        s.call("tensor_split", x, tuple(_starts(sizes)[1:]), dim), len(sizes)
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
    "unflatten, x[..., i, :]": _indexed,
    "unpacked chunks of a tuple": _equal(lambda s, x, sizes, dim: s.call(torch.split, x, sizes[0], dim)),
    "torch.split(split_size_or_sections=)": lambda s, x, sizes, dim: s.parts(
        s.call(torch.split, tensor=x, split_size_or_sections=tuple(sizes), dim=dim), len(sizes)
    ),
    "torch.tensor_split(indices=)": lambda s, x, sizes, dim: s.parts(
        s.call(torch.tensor_split, x, _starts(sizes)[1:], dim=dim), len(sizes)
    ),
    "torch.hsplit, dsplit": _split_by_name,
    "index_select": _selected,
    "x[..., a:b] by slice()": lambda s, x, sizes, dim: [
        s.call(torch.ops.aten.slice.Tensor, x, dim, a, a + n)
        for a, n in zip(_starts(sizes), sizes, strict=True)
    ],
}


def _stacked(s: "Speller", parts: list[Node], dim: int) -> Node:
    require(len({s.shape(part) for part in parts}) == 1 and dim < 0)
    return s.call("flatten", s.call(torch.stack, parts, dim=dim - 1), dim - 1, dim)


def _cat_of_cats(s: "Speller", parts: list[Node], dim: int) -> Node:
    require(len(parts) > 2)
    return s.call(torch.cat, [s.call(torch.cat, parts[:2], dim), *parts[2:]], dim)


CAT: dict[str, Spelling] = {
    "torch.cat(parts, dim=)": lambda s, parts, dim: s.call(torch.cat, parts, dim=dim),
    "torch.cat(tuple, dim)": lambda s, parts, dim: s.call(torch.cat, tuple(parts), dim),
    "torch.concat": lambda s, parts, dim: s.call(torch.concat, parts, dim),
    "torch.concatenate": lambda s, parts, dim: s.call(torch.concatenate, parts, dim=dim),
    "positive dim": lambda s, parts, dim: s.call(torch.cat, parts, dim % len(s.shape(parts[0]))),
    "stack, flatten": _stacked,
    "cat with an empty one": lambda s, parts, dim: s.call(
        torch.cat, [s.call(torch.empty, 0, dtype=s.value(parts[0]).dtype), *parts], dim
    ),
    "torch.cat(tensors=, dim=)": lambda s, parts, dim: s.call(torch.cat, tensors=parts, dim=dim),
    "cat of cats": lambda s, parts, dim: _cat_of_cats(s, parts, dim),
}
