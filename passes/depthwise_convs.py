"""A short depthwise convolution is a sum of shifted products, which Inductor fuses with what surrounds it.

Before: y = conv1d(x, w, b, groups=C)                x: [N, C, T], w: [C, 1, K]
After:  y = Σ_k w[:, k] · x[:, :, k : T - K + 1 + k] + b, summed in fp32, in x's dtype again

Where all that reads y turns it into [N, T, C], behind an activation or not, it is computed over these axes.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from fxfuse.passes import regions
from fxfuse.passes.modes import PLAIN, modes
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.storage_writes import is_contiguous, layout_shows, storage_of
from fxfuse.patterns.ops import VIEWS
from fxfuse.patterns.readings import AFTER_CONVOLUTION, CONV1D, CUTS

RULE = "depthwise_convs"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONGEST = 8  # more taps than this are better left to a library


def _replace(program: Program, conv: Node, padding: int, after: Sequence[Node]) -> None:
    """`after` is what `_in_rows` finds: then all of it is computed over [N, T, C]."""
    aten, graph = torch.ops.aten, program.graph
    x, weight, bias = (*conv.args, None)[:3]
    dtype, tokens = conv.meta["val"].dtype, 1 if after else 2
    channels, _, taps = weight.meta["val"].shape  # type: ignore[union-attr]

    call = partial(regions.call, program, conv)

    def wide(node: Any) -> Node:
        return node if dtype == torch.float32 else call(aten.to.dtype, node, torch.float32)

    with graph.inserting_before(conv):
        padded = call(aten.transpose.int, x, 1, 2) if after else x
        if padding:
            zeros = [0, 0, padding, padding] if after else [padding, padding]
            padded = call(aten.constant_pad_nd.default, padded, zeros)
        row = wide(padded)
        columns = call(aten.permute.default, wide(weight), [2, 1, 0] if after else [2, 0, 1])
        if not statically_known_true(conv.meta["val"].shape[-1] == 1):
            # Once: else each column is gathered for each token.
            columns = call(aten.contiguous.default, columns)
            sizes = (1, channels) if after else (channels, 1)
            columns = regions.written_out(call, columns, taps, *sizes)
        products = []
        for k in range(taps):
            shifted = call(aten.slice.Tensor, row, tokens, k, k - taps + 1 or sys.maxsize)
            products.append(call(aten.mul.Tensor, shifted, call(aten.select.int, columns, 0, k)))
        y = products[0]
        for product in products[1:]:
            y = call(aten.add.Tensor, y, product)
        if bias is not None:
            y = call(aten.add.Tensor, y, bias if after else call(aten.unsqueeze.default, bias, 1))
        if dtype != torch.float32:
            y = call(aten.to.dtype, y, dtype)
        if not after and not is_contiguous(x.meta["val"]):  # type: ignore[union-attr]
            y = call(aten.contiguous.default, y)  # as a convolution's output is, whatever the layout of x
    for node in after[:-1]:
        _, *others = node.args
        if node.target == aten.slice.Tensor:
            others[0] = tokens
        with graph.inserting_before(node):
            y = regions.call(program, node, node.target, y, *others)
            y.kwargs = node.kwargs
    last = after[-1] if after else conv
    y.meta["val"] = last.meta["val"]  # which the next convolution may read
    last.replace_all_uses_with(y)
    regions.erase(program, (conv, *after))


def _in_rows(conv: Node) -> list[Node]:
    """What follows a convolution element by element, up to the view of it as [N, T, C]; nothing without one.

    Inductor writes in the order of the axes, and what reads such a view wants it token by token.
    """
    found, node = [], conv
    while len(node.users) == 1:
        source, (node,) = node, node.users
        found.append(node)
        if str(node.target) in VIEWS and _is_turned(source.meta["val"], node.meta["val"]):
            return found
        cut = str(node.target) == "aten.slice.Tensor" and node.args[1] in (2, -1)
        alone = node.args[0] is source and not any(
            isinstance(n, Node) and isinstance(n.meta["val"], Tensor)
            for n in tree_leaves((node.args[1:], node.kwargs))
        )
        if not alone or not (cut or str(node.target) in AFTER_CONVOLUTION - VIEWS - CUTS):
            break
    return []


def _is_turned(value: Tensor, view: Tensor) -> bool:
    turned = value.transpose(1, 2)
    pairs = zip((*view.shape, *view.stride()), (*turned.shape, *turned.stride()), strict=True)
    return view.dim() == 3 and all(statically_known_true(a == b) for a, b in pairs)


def padding_of(conv: Node) -> int | None:
    """The zeros at both ends of a convolution that this pass can write out; None for any other."""
    defaults = (None, None, None, [1], [0], [1], 1)
    args: tuple[Any, ...] = (*conv.args, *defaults[len(conv.args) :])
    _, weight, _, stride, padding, dilation, groups = args
    x, w = args[0].meta["val"], weight.meta["val"]
    channels, one, taps = w.shape
    if conv.kwargs or x.dim() != 3 or x.device.type != "cpu" or x.dtype != w.dtype or x.dtype not in DTYPES:
        return None
    if (groups, one, list(stride), list(dilation)) != (channels, 1, [1], [1]) or not 0 < taps <= LONGEST:
        return None
    return int(padding[0])


def run(program: Program) -> Outcome:
    """Rewrite every short depthwise convolution of stride 1 on a CPU; others are no candidates."""
    outcome = Outcome()
    mode = modes(program.graph, program.grad_enabled)
    convs = program.calls(CONV1D)
    shows = layout_shows(program.graph) if convs else set()
    for conv in convs:
        padding = padding_of(conv)
        if padding is None or mode[conv] != PLAIN:  # with gradients every product would be kept
            continue
        weight, after = conv.args[1], _in_rows(conv)
        if after and storage_of(after[-1]) in shows:
            after = []
        _replace(program, conv, padding, after)
        where = program.name_of(weight) or module_path(conv) or conv.name  # type: ignore[arg-type]
        outcome.matches.append(Match(RULE, where, (), "1 convolution → shifted products"))
    return outcome
