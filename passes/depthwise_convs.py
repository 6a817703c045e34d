"""A short depthwise convolution is a sum of shifted products, which Inductor fuses with what surrounds it.

Before: y = conv1d(x, w, b, groups=C)                x: [N, C, T], w: [C, 1, K]
After:  y = Σ_k w[:, k] · x[:, :, k : T - K + 1 + k] + b, summed in fp32, in x's dtype again
"""

import sys
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes import regions
from fxfuse.passes.modes import PLAIN, modes
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.storage_writes import is_contiguous
from fxfuse.patterns.readings import CONV1D

RULE = "depthwise_convs"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LONGEST = 8  # more taps than this are better left to a library


def _replace(program: Program, conv: Node, padding: int) -> None:
    aten, graph = torch.ops.aten, program.graph
    x, weight, bias = (*conv.args, None)[:3]
    dtype = conv.meta["val"].dtype
    channels, _, taps = weight.meta["val"].shape  # type: ignore[union-attr]

    call = partial(regions.call, program, conv)

    def wide(node: Any) -> Node:
        return node if dtype == torch.float32 else call(aten.to.dtype, node, torch.float32)

    with graph.inserting_before(conv):
        padded = call(aten.constant_pad_nd.default, x, [padding, padding]) if padding else x
        row, columns = wide(padded), call(aten.permute.default, wide(weight), [2, 0, 1])
        if not statically_known_true(conv.meta["val"].shape[-1] == 1):
            # Once: else each column is gathered for each token.
            columns = call(aten.contiguous.default, columns)
            columns = regions.written_out(program, conv, columns, taps, channels, 1)
        products = []
        for k in range(taps):
            shifted = call(aten.slice.Tensor, row, 2, k, k - taps + 1 or sys.maxsize)
            products.append(call(aten.mul.Tensor, shifted, call(aten.select.int, columns, 0, k)))
        y = products[0]
        for product in products[1:]:
            y = call(aten.add.Tensor, y, product)
        if bias is not None:
            y = call(aten.add.Tensor, y, call(aten.unsqueeze.default, bias, 1))
        if dtype != torch.float32:
            y = call(aten.to.dtype, y, dtype)
        if not is_contiguous(x.meta["val"]):  # type: ignore[union-attr]
            y = call(aten.contiguous.default, y)  # as a convolution's output is, whatever the layout of x
    conv.replace_all_uses_with(y)
    graph.erase_node(conv)


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
    for conv in program.calls(CONV1D):
        padding = padding_of(conv)
        if padding is None or mode[conv] != PLAIN:  # with gradients every product would be kept
            continue
        weight = conv.args[1]
        _replace(program, conv, padding)
        where = program.name_of(weight) or module_path(conv) or conv.name  # type: ignore[arg-type]
        outcome.matches.append(Match(RULE, where, (), "1 convolution → shifted products"))
    return outcome
