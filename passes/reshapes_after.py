"""What is computed of two tensors that are reshaped alike is computed before, and reshaped afterwards.

Before: y = f(reshape(a, s), reshape(b, s), …)      a and b views of larger rows perhaps
After:  y = reshape(f(a, b, …), s)                  nothing is copied; b is viewed in the shape of a
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from fxfuse.passes.program import Program
from fxfuse.passes.regions import call
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes
from fxfuse.patterns import ops

JOINS = (ops.RESHAPE, "aten.flatten.using_ints")


def reshape_after(program: Program, target: str, keeps_last: bool = False) -> None:
    """Rewrite the calls of an operator of two operands first; with `keeps_last`, rows have to stay rows."""
    writes = StorageWrites(program.graph)
    for node in program.calls(target):
        joined: list[Node] = list(node.args[:2])  # type: ignore[arg-type]
        if any(str(n.target) not in JOINS or writes.is_written(n) for n in joined):
            continue
        if any(writes.version(n.args[0], n) != writes.version(n.args[0], node) for n in joined):  # type: ignore[arg-type]
            continue  # what was copied has been written since
        for first in (0, 1):
            source: Node = joined[first].args[0]  # type: ignore[assignment]
            other: Node = joined[1 - first].args[0]  # type: ignore[assignment]
            last = [n.meta["val"].shape[-1:] for n in (source, joined[0])]
            if keeps_last and not equal_sizes(*last):
                continue
            if not equal_sizes(source.meta["val"].shape, other.meta["val"].shape):
                size = _one_unknown(source.meta["val"].shape)
                if size is None:
                    continue
                with program.graph.inserting_before(node):
                    other = call(program, node, torch.ops.aten.reshape.default, other, size)
            _move(program, node, joined, [source, other] if first == 0 else [other, source])
            break


def _one_unknown(shape: Sequence[Any]) -> list[int] | None:
    """Sizes to reshape to, -1 for one that varies; None where more of them do."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return sizes if sizes.count(-1) <= 1 else None


def _move(program: Program, node: Node, joined: list[Node], sources: list[Node]) -> None:
    how = joined[0]
    with program.graph.inserting_after(node):
        after = program.graph.call_function(how.target, (node, *how.args[1:]))  # type: ignore[arg-type]
    after.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    node.args = (*sources, *node.args[2:])
    node.meta.pop("val", None)
    for n in joined:
        if not n.users:
            program.graph.erase_node(n)
