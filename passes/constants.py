"""Constants in arithmetic are spelled as numbers.

Before: y = x + detach_(lift_fresh_copy(c)); z = v + full_like(v, 1e-6); n = add_(length, ones_like(length))
After:  y = x + 1e-6;                        z = v + 1e-6;               n = add_(length, 1)
"""

import math
from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes
from fxfuse.patterns import ops


def spell_constants(program: Program) -> None:
    """Rewrite in place; a constant that is written stays a tensor."""
    for node in program.calls(ops.DETACH_):
        made: Any = node.args[0]
        if str(made.target) == ops.CONSTANT_COPY and not made.meta["val"].requires_grad:
            node.replace_all_uses_with(made)
            program.graph.erase_node(node)
    writes = StorageWrites(program.graph)
    for node in program.calls(ops.CONSTANT_COPY, *ops.FILLED):
        kept = node.args[0] if str(node.target) == ops.CONSTANT_COPY else node
        number = _number(program, node)
        if number is None or writes.is_written(node) or writes.is_written(kept):  # type: ignore[arg-type]
            continue
        for user in list(node.users):
            if str(user.target) in {*ops.ARITHMETIC, *ops.ARITHMETIC_IN_PLACE} and not user.kwargs:
                _put_number(user, node, number)
        for unused in dict.fromkeys((node, kept)):
            if not unused.users:  # type: ignore[union-attr]
                program.graph.erase_node(unused)  # type: ignore[arg-type]


def _put_number(user: Node, node: Node, number: float) -> None:
    """The number for the constant where that leaves dtype, device and sizes of the result as they are."""
    if len(user.args) != 2:
        return
    name, (first, second) = str(user.target), user.args
    inverse = name == ops.DIV and first is node and number == 1
    commutes = name in ops.ARITHMETIC and ops.ARITHMETIC[name][1]
    x: Any = first if second is node else second if first is node and (commutes or inverse) else None
    values = [n.meta.get("val") for n in (x, user) if isinstance(n, Node) and n is not node]
    if len(values) < 2 or not isinstance(values[0], torch.Tensor):
        return
    given, got, constant = values[0], values[1], node.meta["val"]
    if (given.dtype, given.device) != (got.dtype, got.device):  # type: ignore[union-attr]
        return
    alike = equal_sizes((*given.shape, *given.stride()), (*got.shape, *got.stride()))  # type: ignore[union-attr]
    if constant.dim() and (given.dtype != constant.dtype or not alike):
        return
    in_front = first is node and name == ops.MUL  # there it has the dtype of x
    rounds = constant.dim() or in_front or not given.is_floating_point()
    own = _rounded(number, given.dtype) if rounds else number
    if inverse:
        if given.device.type == "cpu" or given.dtype.itemsize > 2:  # on a GPU autocast widens a reciprocal
            user.target, user.args = torch.ops.aten.reciprocal.default, (x,)
    elif own is not None:
        user.args = (x, own)


def _rounded(number: float, dtype: torch.dtype) -> float | None:
    """A number as a tensor of a dtype holds it, None where that is no finite one."""
    if dtype.is_complex:
        return None
    held = torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None).to(dtype).item()
    return held if math.isfinite(held) else None


def _number(program: Program, node: Node) -> float | None:
    """The number that a constant of the graph holds, or that a tensor is filled with, in its dtype."""
    if str(node.target) in ops.FILLED:
        place, value = ops.FILLED[str(node.target)], node.meta["val"]
        if value.requires_grad:
            return None
        filled: Any = 1.0 if place is None else (*node.args, *(None,) * 3)[place]
        is_number = type(filled) in (int, float) and (value.device.type == "cpu" or value.dim() > 0)
        return _rounded(filled, value.dtype) if is_number else None
    kept: Any = node.args[0]
    value = attrgetter(kept.target)(program.graph_module) if kept.op == "get_attr" else None
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.dim() > 0:
        return None
    if value.device.type != "cpu":  # on a GPU it is rounded to the dtype of what stands beside it
        return None
    number = float(value) if value.is_floating_point() else math.nan
    return number if math.isfinite(number) else None
