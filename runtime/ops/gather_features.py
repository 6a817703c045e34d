"""Features of a tensor picked in regular blocks: the layout half of a split→reshape→cat chain, as one node.

A block (start, run, stride, count) is the features start + i·stride + j for i < count, j < run, in that
order. One block whose (count, run) is the wanted shape is a strided view; everything else is one copy. The
operator is composite: it stays one node in a captured graph, and AOTAutograd and Inductor see through it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Block = tuple[int, int, int, int]


def _block(x: Tensor, start: int, run: int, stride: int, count: int) -> Tensor:
    """[..., count, run]; a view where whole strides fit into the features and runs do not overlap."""
    base = max(0, start + run - stride)
    if stride < run or base + count * stride > x.shape[-1]:
        return torch.stack([x.narrow(-1, start + i * stride, run) for i in range(count)], dim=-2)
    groups = x.narrow(-1, base, count * stride).unflatten(-1, (count, stride))
    return groups.narrow(-1, start - base, run)


def gather_features(x: Tensor, blocks: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Features of x [..., N] in the order of the blocks, as [..., *shape]; a view where that is possible."""
    views = [_block(x, *blocks[i : i + 4]) for i in range(0, len(blocks), 4)]
    if len(views) == 1 and tuple(views[0].shape[-2:]) == tuple(shape):
        return views[0]
    flat = [view.flatten(-2) for view in views]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)).unflatten(-1, tuple(shape))


_library = torch.library.Library("fxfuse", "FRAGMENT")
_library.define("gather_features(Tensor(a) x, int[] blocks, int[] shape) -> Tensor(a)")
_library.impl("gather_features", gather_features, "CompositeImplicitAutograd")
