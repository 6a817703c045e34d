"""What was cut to pieces and put together again in the same order is the whole, as a view.

Before: y = stack(split(x, d, -1), -2);                    z = cat(chunk(x, 2, -1), -1)
After:  y = unflatten(x, -1, [n, d]);                      z = x
"""

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.backward import Backward
from fxfuse.passes.numbered_features import TooLarge, features_of
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import storage_of
from fxfuse.patterns import ops, readings

_CUTS = readings.CUTS | ops.RESHAPES | {"aten.squeeze.dim", "aten.unsqueeze.default"}


def rejoined(program: Program, node: Node) -> Any:
    """Target and arguments of the view that a stack or cat of all parts of one tensor is; None for others."""
    chains = [_cut_from(part) for part in node.args[0]]  # type: ignore[arg-type, union-attr]
    source = next((n for n in chains[0] if _is_tensor(n) and all(n in chain for chain in chains)), None)
    if source is None or any(storage_of(chain[0]) != storage_of(source) for chain in chains):
        return None
    inside = {n for chain in chains for n in chain[: chain.index(source)]}
    if not inside or Backward(program).parts(node, *inside):
        return None
    rows = source.meta["val"].dim() - 1
    shape = [*node.meta["val"].shape[rows:]]
    if rows < 0 or not all(type(size) is int for size in shape):
        return None
    try:
        features = features_of(node, [source, *sorted(inside), node])
    except TooLarge:
        return None
    width = source.meta["val"].shape[-1]
    if type(width) is not int or features != tuple(range(width)):
        return None
    if len(shape) == 1:
        return torch.ops.aten.alias.default, (source,)
    return torch.ops.aten.unflatten.int, (source, -1, shape)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _cut_from(part: Node) -> list[Node]:
    """The node and what it is a part of, from near to far."""
    found = [part]
    while part.target is operator.getitem or str(part.target) in _CUTS:
        part = part.args[0]  # type: ignore[assignment]
        found.append(part)
    return found
