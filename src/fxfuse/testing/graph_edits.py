"""Small edits of a graph, as changes of near misses are made of: on graphs as written, and on traced ones."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

__all__ = [
    "TRACED",
    "ImpossibleError",
    "Values",
    "added_output",
    "floating",
    "insert",
    "instead",
    "is_call",
    "read_instead",
    "readable",
    "some",
    "written",
]

Values = dict[str, Any]

# Key in a graph module's meta: its calls are of ATen operators, and so are those that an edit inserts.
TRACED = "traced"


class ImpossibleError(Exception):
    """Nothing in this graph can be changed so; nothing was."""


def some(rng: random.Random, found: Sequence[Any]) -> Any:
    """One of them, at random; raises ImpossibleError where there is none."""
    if not found:
        raise ImpossibleError
    return rng.choice(list(found))


def is_call(node: Node) -> bool:
    return node.op.startswith("call_")


def floating(module: GraphModule, values: Values) -> list[Node]:
    """Nodes that are one floating tensor and can be read by others, parameters left out."""
    return [
        node
        for node in module.graph.nodes
        if node.op not in ("output", "get_attr")
        and isinstance(value := values.get(node.name), Tensor)
        and value.is_floating_point()
    ]


def readable(module: GraphModule, values: Values) -> list[Node]:
    """Those of them that somebody reads, and that have dimensions."""
    return [node for node in floating(module, values) if node.users and values[node.name].dim()]


def _overload(name: str, args: tuple[Any, ...]) -> OpOverload:
    """The ATen operator that a call of that name reaches; whatever is a node counts as a tensor."""
    tensor = torch.empty(0)
    given = map_aggregate(args, lambda a: tensor if isinstance(a, Node) else a)
    resolved = torch._C._jit_resolve_packet(f"aten::{name}", *given)
    return getattr(getattr(torch.ops.aten, name), resolved)


def insert(after: Node, name: str, *args: Any) -> Node:
    """A call by name right behind a node, or behind the inputs: in a traced graph of an ATen operator."""
    graph = after.graph
    while after.op in ("placeholder", "get_attr", "root") and after.next.op in ("placeholder", "get_attr"):
        after = after.next
    with graph.inserting_after(after):
        if graph.owning_module is not None and graph.owning_module.meta.get(TRACED):
            return graph.call_function(_overload(name, args), args)
        if hasattr(Tensor, name) and args and isinstance(args[0], Node):
            return graph.call_method(name, args)
        return graph.call_function(getattr(torch, name), args)


def instead(node: Node, last: Node, first: Node) -> None:
    """Everything reads `last` in the place of `node`, except `first`, from which `last` is computed."""
    node.replace_all_uses_with(last, delete_user_cb=lambda user: user is not first)


def read_instead(rng: random.Random, node: Node, last: Node, first: Node) -> None:
    """All the readers of a node, or one of them, read `last` instead; `first` is computed from the node."""
    readers = [user for user in node.users if user is not first and user > last]
    if rng.random() < 0.5 or not readers:
        instead(node, last, first)
    else:
        rng.choice(readers).replace_input_with(node, last)


def added_output(module: GraphModule, node: Node) -> None:
    """One more output of the graph."""
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], node),)  # type: ignore[misc]


def written(after: Node, name: str, target: Node, *args: Any) -> Node:
    """A call that writes to `target`; as tracing has it, later readers read its result, the same memory."""
    write = insert(after, name, target, *args)
    if isinstance(write.target, OpOverload):
        target.replace_all_uses_with(write, delete_user_cb=lambda user: user > write)
    return write
