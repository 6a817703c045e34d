"""Ways to write a depthwise convolution over time, a causal one, and one of a single window."""

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _weight(s: "Speller", name: str) -> Node:
    return s.parameter(f"{name}.weight", torch.empty(0))


def _bias(s: "Speller", name: str) -> Node | None:
    return None if s.owned(name).bias is None else s.parameter(f"{name}.bias", torch.empty(0))


def _channels(s: "Speller", x: Node) -> int:
    return s.shape(x)[1]


def _by_module(s: "Speller", x: Node, name: str) -> Node:
    return s.call_module(s.prefix + name, None, x)


def _by_taps(s: "Speller", x: Node, name: str) -> Node:
    """From a weight of two dimensions, as functions for a causal convolution take it."""
    taps = s.spell("taps", _weight(s, name))
    wide = s.call("unsqueeze", taps, 1)
    return s.call(F.conv1d, x, wide, _bias(s, name), padding=0, groups=_channels(s, x))


DEPTHWISE: dict[str, Spelling] = {
    "F.conv1d(groups=)": lambda s, x, name: s.call(
        F.conv1d, x, _weight(s, name), _bias(s, name), groups=_channels(s, x)
    ),
    "nn.Conv1d": _by_module,
    "torch.conv1d": lambda s, x, name: s.call(
        torch.conv1d, x, _weight(s, name), _bias(s, name), 1, 0, 1, _channels(s, x)
    ),
    "F.conv1d, all by name": lambda s, x, name: s.call(
        F.conv1d,
        input=x,
        weight=_weight(s, name),
        bias=_bias(s, name),
        stride=1,
        padding=0,
        dilation=1,
        groups=_channels(s, x),
    ),
    'padding="valid"': lambda s, x, name: s.call(
        F.conv1d, x, _weight(s, name), _bias(s, name), padding="valid", groups=_channels(s, x)
    ),
    "weight of two dimensions": _by_taps,
    "torch.convolution": lambda s, x, name: s.call(
        torch.convolution, x, _weight(s, name), _bias(s, name), [1], [0], [1], False, [0], _channels(s, x)
    ),
}

TAPS: dict[str, Spelling] = {
    "w.squeeze(1)": lambda s, w: s.call("squeeze", w, 1),
    "w[:, 0]": lambda s, w: s.call(operator.getitem, w, (slice(None), 0)),
    "w.view(channels, taps)": lambda s, w: s.call("view", w, s.shape(w)[0], s.shape(w)[-1]),
    "w.flatten(1)": lambda s, w: s.call("flatten", w, 1),
    "w.select": lambda s, w: s.call("select", w, 1, 0),
}


# The first T of T + K - 1 outputs, or the outputs of what was padded on one side.


def _cut(s: "Speller", y: Node, length: int, how: str) -> Node:
    if how == "narrow":
        return s.call("narrow", y, -1, 0, length)
    if how == "ellipsis":
        return s.call(operator.getitem, y, (Ellipsis, slice(None, length)))
    if how == "negative":
        return s.call(operator.getitem, y, (Ellipsis, slice(None, length - s.shape(y)[-1])))
    return s.call(operator.getitem, y, (slice(None), slice(None), slice(None, length)))


def _padded_by_convolution(how: str) -> Spelling:
    def written(s: "Speller", x: Node, name: str) -> Node:
        taps, length = s.owned(name).weight.shape[-1], s.shape(x)[-1]
        require(taps > 1)
        y = s.call(F.conv1d, x, _weight(s, name), _bias(s, name), padding=taps - 1, groups=_channels(s, x))
        return _cut(s, y, length, how)

    return written


def _module_with_padding(s: "Speller", x: Node, name: str) -> Node:
    """As models have it: a module whose own padding is K - 1, on the weight that the others read."""
    conv, length = s.owned(name), s.shape(x)[-1]
    require(conv.padding == (conv.kernel_size[0] - 1,))
    return _cut(s, s.call_module(s.prefix + name, None, x), length, "")


def _padded_before(pad: Any) -> Spelling:
    def written(s: "Speller", x: Node, name: str) -> Node:
        taps = s.owned(name).weight.shape[-1]
        require(taps > 1)
        padded = pad(s, x, taps - 1)
        return s.call(F.conv1d, padded, _weight(s, name), _bias(s, name), groups=_channels(s, x))

    return written


def _zeros_before(s: "Speller", x: Node, count: int) -> Node:
    batch, channels, _ = s.shape(x)
    zeros = s.call(torch.zeros, batch, channels, count, dtype=s.value(x).dtype)
    return s.call(torch.cat, [zeros, x], dim=-1)


CAUSAL: dict[str, Spelling] = {
    "nn.Conv1d(padding=K-1)[:, :, :T]": _module_with_padding,
    "F.conv1d(padding=K-1)[:, :, :T]": _padded_by_convolution(""),
    "F.conv1d(padding=K-1)[..., :T]": _padded_by_convolution("ellipsis"),
    "F.conv1d(padding=K-1)[..., :1-K]": _padded_by_convolution("negative"),
    "F.conv1d(padding=K-1).narrow": _padded_by_convolution("narrow"),
    "F.pad, F.conv1d": _padded_before(lambda s, x, n: s.call(F.pad, x, (n, 0))),
    "F.pad(mode=, value=), F.conv1d": _padded_before(
        lambda s, x, n: s.call(F.pad, input=x, pad=[n, 0], mode="constant", value=0.0)
    ),
    "nn.ConstantPad1d": _padded_before(
        lambda s, x, n: s.call_module(f"pad_{n}", nn.ConstantPad1d((n, 0), 0.0), x)
    ),
    "zeros before, F.conv1d": _padded_before(_zeros_before),
}


# The same as sums of products with the taps


def _plus_bias(s: "Speller", y: Node, name: str) -> Node:
    bias = _bias(s, name)
    return y if bias is None else s.add(y, s.call("unsqueeze", bias, -1))


def _shifted_products(s: "Speller", x: Node, name: str) -> Node:
    taps, length = s.spell("taps", _weight(s, name)), s.shape(x)[-1]
    count = s.shape(taps)[-1]
    padded = s.call(F.pad, x, (count - 1, 0))
    parts = [
        s.mul(s.call("narrow", padded, -1, i, length), s.call(operator.getitem, taps, (slice(None), i, None)))
        for i in range(count)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = s.add(total, part)
    return _plus_bias(s, total, name)


def _windows(s: "Speller", x: Node, name: str) -> tuple[Node, Node]:
    taps = s.spell("taps", _weight(s, name))
    count = s.shape(taps)[-1]
    return s.call("unfold", s.call(F.pad, x, (count - 1, 0)), -1, count, 1), taps


def _windows_by_einsum(s: "Speller", x: Node, name: str) -> Node:
    windows, taps = _windows(s, x, name)
    return _plus_bias(s, s.call(torch.einsum, "bctk,ck->bct", windows, taps), name)


def _windows_summed(s: "Speller", x: Node, name: str) -> Node:
    windows, taps = _windows(s, x, name)
    return _plus_bias(s, s.call("sum", s.mul(windows, s.call("unsqueeze", taps, 1)), -1), name)


CAUSAL_OR_BY_HAND: dict[str, Spelling] = {
    **CAUSAL,
    "shifted products": _shifted_products,
    "unfold, einsum": _windows_by_einsum,
    "unfold, sum": _windows_summed,
}

# [B, C, K] with K taps for each channel: [B, C, 1].


def _window(dot: Spelling) -> Spelling:
    def written(s: "Speller", x: Node, name: str) -> Node:
        require(s.owned(name).bias is None)
        y = dot(s, x, s.spell("taps", _weight(s, name)))
        return y if len(s.shape(y)) == 3 else s.call("unsqueeze", y, -1)

    return written


def _tap_by_tap(s: "Speller", x: Node, taps: Node) -> Node:
    columns = [s.call("select", x, 2, i) for i in range(s.shape(taps)[-1])]
    total = s.mul(columns[0], s.call("select", taps, 1, 0))
    for i, column in enumerate(columns[1:], 1):
        total = s.call(torch.addcmul, total, column, s.call("select", taps, 1, i))
    return total


WINDOW: dict[str, Spelling] = {
    **DEPTHWISE,
    "(x * taps).sum(-1, keepdim=True)": _window(lambda s, x, taps: s.sum(s.mul(x, taps))),
    "einsum": _window(lambda s, x, taps: s.call(torch.einsum, "bck,ck->bc", x, taps)),
    "vecdot": _window(lambda s, x, taps: s.call(torch.linalg.vecdot, x, taps)),
    "tap by tap": _window(_tap_by_tap),
}
