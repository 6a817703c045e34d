"""One spelling for what means the same, before any pattern looks.

Before: y = to(x, x.dtype); z = view(y, [2, 3]); dead = x + 1
After:  z = reshape(x, [2, 3])
"""

import operator

import torch
from torch.fx import Node

from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites, written_by
from fxfuse.patterns import ops


def normalise(program: Program) -> None:
    """Rewrite the graph in place; values and writes stay what they were."""
    _fold_identities(program)
    _one_reshape(program)
    _drop_dead_nodes(program)
    program.graph.lint()


def _is_same_memory(node: Node, source: Node) -> bool:
    value, given = node.meta.get("val"), source.meta.get("val")
    return (
        isinstance(value, torch.Tensor)
        and isinstance(given, torch.Tensor)
        and value.untyped_storage()._cdata == given.untyped_storage()._cdata
        and (value.dtype, value.stride(), value.storage_offset())
        == (given.dtype, given.stride(), given.storage_offset())
        and value.shape == given.shape
        and value.requires_grad == given.requires_grad
    )


def _fold_identities(program: Program) -> None:
    """to(x, x.dtype) -> x, alias(x) -> x: where the result is the very memory of the input."""
    for node in program.calls(*ops.MAYBE_IDENTITY):
        source = node.args[0]
        if isinstance(source, Node) and _is_same_memory(node, source):
            node.replace_all_uses_with(source)
            program.graph.erase_node(node)


def _one_reshape(program: Program) -> None:
    """view(x, s) -> reshape(x, s): unless somebody writes to that memory, when a copy would lose the write."""
    writes = StorageWrites(program.graph)
    for node in program.calls(*(ops.RESHAPES - {ops.RESHAPE})):
        if not writes.is_written(node):
            node.target = torch.ops.aten.reshape.default


def _drop_dead_nodes(program: Program) -> None:
    """Remove what nobody reads and what has no effect: reversed, so that chains go at once."""
    for node in reversed(list(program.graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        pure = node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload)
            and not written_by(node)
            and torch.Tag.nondeterministic_seeded not in node.target.tags
            and node.target.namespace in ("aten", "fxfuse")
            and bool(node.target._schema.returns)
        )
        if pure:
            program.graph.erase_node(node)
