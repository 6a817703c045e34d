"""Which memory a node reads, and how often that memory had been written before it ran."""

from bisect import bisect_left
from collections import defaultdict

import torch
from torch.fx import Graph, Node


def storage_of(node: Node) -> int | None:
    """An identity shared by exactly the nodes whose values share memory; None for what is not one tensor."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def written_by(node: Node) -> list[Node]:
    """The arguments that a call writes to, by its schema."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    written = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.kwargs.get(argument.name, node.args[position] if position < len(node.args) else None)
        written += [
            v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)
        ]
    return written


class StorageWrites:
    """The writes of a graph, numbered for each storage in the order of execution."""

    def __init__(self, graph: Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[int]] = defaultdict(list)
        for node, position in self._position.items():
            for target in written_by(node):
                storage = storage_of(target)
                if storage is not None:
                    self._writes[storage].append(position)

    def version(self, value: Node, at: Node) -> int:
        """How many writes the memory of `value` has seen when `at` runs."""
        storage = storage_of(value)
        return 0 if storage is None else bisect_left(self._writes.get(storage, []), self._position[at])

    def is_written(self, value: Node) -> bool:
        """Whether anything in the graph writes to the memory of `value`."""
        return storage_of(value) in self._writes
