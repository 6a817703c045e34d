"""Which memory a node reads, and how often that memory had been written before it ran."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch._prims_common import make_contiguous_strides_for
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.patterns import ops
from fxfuse.patterns.readings import PADDINGS


def storage_of(node: Node) -> int | None:
    """An identity shared by exactly the nodes whose values share memory; None for what is not one tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or torch._C._functorch.is_batchedtensor(value):
        return None  # inside vmap there is no storage to ask for
    return value.untyped_storage()._cdata


def storages(value: Any) -> set[int]:
    """The identities of the memory of a tensor, or of those in a list; tensors of a transform have none."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return {
        v.untyped_storage()._cdata
        for v in values
        if isinstance(v, torch.Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(v)
    }


def same_layout(value: Any, other: Any) -> bool:
    """Whether two values, or two lists of them, are tensors of one dtype, device, size and strides."""
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(value) == len(other) and all(map(same_layout, value, other))
    return (
        isinstance(value, torch.Tensor)
        and isinstance(other, torch.Tensor)
        and (value.dtype, value.device) == (other.dtype, other.device)
        and (value.is_conj(), value.is_neg()) == (other.is_conj(), other.is_neg())
        and equal_sizes(value.shape, other.shape)
        and equal_sizes(value.stride(), other.stride())
        and equal_sizes([value.storage_offset()], [other.storage_offset()])
    )


def same_memory(node: Node, other: Node) -> bool:
    """Whether two nodes are the same elements of the same memory, whatever sizes their symbols stand for."""
    a, b = node.meta.get("val"), other.meta.get("val")
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and storage_of(node) is not None
        and storage_of(node) == storage_of(other)
        and a.requires_grad == b.requires_grad
        and same_layout(a, b)
    )


def is_idle_view(node: Node) -> bool:
    """Whether a view shows its input as it is, as a permutation into the same order does."""
    source = node.args[0] if str(node.target) in ops.VIEWS else None
    return isinstance(source, Node) and same_memory(node, source)


def lies_in_rows(value: Any) -> bool:
    """Whether it has the strides of fresh memory of its sizes, those of single elements included."""
    return equal_sizes(value.stride(), make_contiguous_strides_for(value.shape))


def is_contiguous(value: Any) -> bool:
    """Without asking the shape environment for a guard, as the method of symbolic tensors would."""
    expected: Any = 1
    for size, stride in zip(value.shape[::-1], value.stride()[::-1], strict=True):
        if not statically_known_true(size == 1) and not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def dense_order(value: Any) -> list[int] | None:
    """The dimensions from the widest step to the narrowest, if in this order the memory is contiguous."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    for order in _orders(value):
        if is_contiguous(value.permute(order)):
            return order
    return None


def _orders(value: torch.Tensor) -> list[list[int]]:
    """The order of the strides where all are numbers, and the order as it is."""
    own = list(range(value.dim()))
    if not all(isinstance(stride, int) for stride in value.stride()):
        return [own, *([*own[:i], own[i + 1], own[i], *own[i + 2 :]] for i in own[:-1])]
    single = [statically_known_true(size == 1) for size in value.shape]
    steps = [dim for dim in own if not single[dim]]
    steps.sort(key=lambda dim: value.stride()[dim], reverse=True)
    return [own, [*(dim for dim in own if single[dim]), *steps]]


def equal_sizes(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Without asking the shape environment for a guard, as `==` on symbolic sizes would."""
    return len(sizes) == len(others) and all(map(_equal, sizes, others))


def _equal(size: Any, other: Any) -> bool:
    if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
        return size.node.expr == other.node.expr or statically_known_true(size == other)
    return statically_known_true(size == other)


def written_by(node: Node) -> list[Node]:
    """The arguments that a call writes to: by its schema, and all of them where there is none to ask."""
    if node.op != "call_function":
        return []
    if isinstance(node.target, HigherOrderOperator):
        return [] if node.target.name() in ops.READ_ONLY_HIGHER_ORDER else node.all_input_nodes
    written: list[Node] = []
    for position, name in _written_arguments(node.target):
        value = node.kwargs.get(name, node.args[position] if position < len(node.args) else None)
        written += [
            v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Node)
        ]
    return written


@cache
def _written_arguments(target: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of each argument that a call of this target writes to."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ()
    undeclared = ops.UNDECLARED_WRITES.get(str(target), ())
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments)
        if position in undeclared or (argument.alias_info is not None and argument.alias_info.is_write)
    )


class StorageWrites:
    """The writes of a graph, numbered for each storage in the order of execution."""

    def __init__(self, graph: Graph) -> None:
        self._position = {node: i for i, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[int]] = defaultdict(list)
        for node, position in self._position.items():
            for storage in {storage_of(target) for target in written_by(node)} - {None}:
                self._writes[storage].append(position)  # type: ignore[index]

    def version(self, value: Node, at: Node) -> int:
        """How many writes the memory of `value` has seen when `at` runs."""
        storage = storage_of(value)
        return 0 if storage is None else bisect_left(self._writes.get(storage, []), self._position[at])

    def is_written(self, value: Node) -> bool:
        """Whether anything in the graph writes to the memory of `value`."""
        return storage_of(value) in self._writes

    def write_before(self, value: Node, at: Node) -> Node | None:
        """The last call that writes to the memory of `value` before `at` runs."""
        version = self.version(value, at)
        if version == 0:
            return None
        position = self._writes[storage_of(value)][version - 1]  # type: ignore[index]
        return next(node for node, i in self._position.items() if i == position)


def layout_matters(graph: Graph) -> set[int | None]:
    """The storages that leave the graph or are read by strides: there the memory stays laid out as it was."""
    found = set()
    for node in graph.nodes:
        if node.op == "output" or _reads_strides(node):
            found |= {storage_of(value) for value in node.all_input_nodes}
    return found


def layout_shows(graph: Graph) -> set[int | None]:
    """The storages whose strides decide those of something that leaves the graph or is read by strides."""
    found = layout_matters(graph)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and _keeps_order(node):
            read = {storage_of(value) for value in node.all_input_nodes} - {None}
            made = storages(node.meta.get("val"))
            if made & found and not made & read:  # a view is its input's memory, and so is what is written
                found |= read
    return found


def _keeps_order(node: Node) -> bool:
    """Whether the strides of what a call makes may be those of its inputs."""
    name = str(node.target).rpartition(".")[0]
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return False
    if str(node.target) in PADDINGS:
        given: Any = node.args[1]
        added = [n.meta["val"] if isinstance(n, Node) else n for n in given]
        if not any(statically_known_true(n > 0) for n in added):
            return True  # a copy of a part
    if name == "aten.scaled_dot_product_attention":
        return not all(map(_is_joined, node.users))
    if name in ops.CHANNELS_MAY_LIE_LAST:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.dim() > 3 and not is_contiguous(value)
    return name not in ops.LAID_OUT_ANEW


def _is_joined(turned: Node) -> bool:
    """Whether all that reads attention's [B, T, H, D] lies row by row, whatever order attention has kept."""
    rows = {ops.CONTIGUOUS, ops.FLATTEN, *ops.RESHAPES}
    return str(turned.target) == "aten.transpose.int" and all(str(n.target) in rows for n in turned.users)


def _reads_strides(node: Node) -> bool:
    if isinstance(node.target, OpOverload):
        return str(node.target) in ops.STRIDE_READERS or node.target.namespace not in ("aten", "fxfuse")
    return isinstance(node.target, HigherOrderOperator)
