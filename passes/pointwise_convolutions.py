"""A convolution of one tap over channels is spelled as a linear.

Before: y = conv1d(x.mT, w[:, :, None], b)        x: [B, T, C], w: [O, C]
After:  y = linear(x, w, b).mT
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.backward import Backward
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes, layout_shows, storage_of
from fxfuse.patterns import ops
from fxfuse.patterns.readings import CONV1D

_DEFAULTS = (None, None, None, [1], [0], [1], 1)


def spell_pointwise_convolutions(program: Program) -> None:
    """Rewrite in place where the weight is a matrix of the graph's inputs and nobody reads y's strides."""
    writes, fixed, changed = StorageWrites(program.graph), layout_shows(program.graph), []
    backward = Backward(program)
    for conv in program.calls(CONV1D):
        args: tuple[Any, ...] = (*conv.args, *_DEFAULTS[len(conv.args) :])
        x, weight, bias, *how = args
        matrix = _matrix(weight)
        if matrix is None or backward.parts(conv, weight):
            continue
        if how != [[1], [0], [1], 1] or x.meta["val"].dim() != 3:
            continue
        one = statically_known_true(x.meta["val"].shape[2] == 1)  # whose strides are those of a row
        if (storage_of(conv) in fixed and not one) or any(
            writes.is_written(n) for n in (conv, x, matrix, bias) if n is not None
        ):
            continue
        with program.graph.inserting_before(conv):
            rows = call(program, conv, torch.ops.aten.transpose.int, x, 1, 2)
            given = (rows, matrix) if bias is None else (rows, matrix, bias)
            y = call(program, conv, torch.ops.aten.linear.default, *given)
        conv.target, conv.args, conv.kwargs = torch.ops.aten.transpose.int, (y, 1, 2), {}
        changed.append(conv)
    program.refresh(changed)  # not before: the next may read their sizes


def _matrix(weight: Any) -> Node | None:
    """The input [O, C] that a weight [O, C, 1] shows."""
    made = isinstance(weight, Node) and str(weight.target) in _NEW_DIMENSION
    source: Any = weight.args[0] if made else None
    values: list[Any] = [n.meta.get("val") if isinstance(n, Node) else None for n in (weight, source)]
    if source is None or source.op != "placeholder" or not all(isinstance(v, Tensor) for v in values):
        return None
    wide, own = values
    if own.dim() != 2 or wide.dim() != 3 or storage_of(weight) != storage_of(source):
        return None
    same = equal_sizes(wide.shape, (*own.shape, 1)) and equal_sizes(wide.stride()[:2], own.stride())
    return source if same and statically_known_true(wide.storage_offset() == own.storage_offset()) else None


_NEW_DIMENSION = ops.RESHAPES | {ops.UNSQUEEZE}
