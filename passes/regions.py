"""A part of a graph that one call is to replace: its nodes, why it may not be, and the replacement."""

import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxfuse.passes.modes import PLAIN, modes
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import (
    StorageWrites,
    dense_order,
    is_contiguous,
    layout_shows,
    storage_of,
    written_by,
)
from fxfuse.patterns import ops
from fxfuse.patterns.terms import is_cast


def writers_of(graph: Graph) -> dict[int | None, list[Node]]:
    """The calls that write to each storage, in graph order."""
    found: dict[int | None, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for target in written_by(node):
            found[storage_of(target)].append(node)
    return found


def behind(
    outputs: Iterable[Node],
    inputs: Collection[Node],
    writers: Mapping[int | None, Sequence[Node]] = MappingProxyType({}),
) -> list[Node]:
    """The call nodes that the outputs are computed from, up to the inputs, in graph order.

    With `writers`, calls that write to what is read on the way belong to it, too.
    """
    found: set[Node] = set()
    waiting = [node for node in outputs if node not in inputs]
    while waiting:
        node = waiting.pop()
        if node in found or node.op != "call_function":
            continue
        found.add(node)
        waiting += [n for n in node.all_input_nodes if n not in inputs and _is_computed(n)]
        waiting += [write for n in (node, *node.all_input_nodes) for write in writers.get(storage_of(n), ())]
    return _ordered(found)


def _is_computed(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), (Tensor, list, tuple))


def _ordered(nodes: Collection[Node]) -> list[Node]:
    if not nodes:
        return []
    graph = next(iter(nodes)).graph
    return [node for node in graph.nodes if node in nodes]


def read_by(region: Sequence[Node]) -> list[Node]:
    """The nodes outside a region that it reads, sizes too."""
    inside = set(region)
    return list(dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside))


def is_made_of_numbers(node: Node, cone: Sequence[Node] | None = None) -> bool:
    """Whether a node is computed from nothing but numbers and constants of the graph."""
    calls = behind([node], ()) if cone is None else cone
    return bool(calls) and all(n.op == "get_attr" for n in read_by(calls))


class Refused(Exception):
    """Why a candidate is left alone: the node that decides, and the reason."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class Guards:
    """Reasons to leave a region of one program alone."""

    def __init__(self, program: Program) -> None:
        self.writes = StorageWrites(program.graph)
        self.modes = modes(program.graph, program.grad_enabled)
        self.position = {node: i for i, node in enumerate(program.graph.nodes)}
        self.fixed = layout_shows(program.graph)

    def reason(
        self,
        region: Sequence[Node],
        outputs: Collection[Node],
        dtypes: Collection[torch.dtype],
        states: Collection[Node] = (),
        at: Node | None = None,
        kept: bool = False,
        restored: bool = False,
    ) -> tuple[Node, str] | None:
        """The node that decides, and why; None where the region may be replaced by one call at its end.

        Args:
            outputs: nodes of the region that may be used outside; what replaces them is contiguous.
            dtypes: floating dtypes that values inside may have.
            states: inputs that the region writes, and the call that replaces it.
            at: the node before which the inputs are read instead, where that is not the end of the region.
            kept: whether the outputs stay as they are for everybody else: then nobody sees another layout.
            restored: whether each output is put in its place by `put_in_place`, with the strides that it had.
        """
        inside = set(region)
        given = {storage_of(n) for n in read_by(region)} - {None} - {storage_of(s) for s in states}
        for node in region:
            if self.modes[node] != PLAIN:
                return node, "grad mode or autocast is on here: call under torch.no_grad()"
            user = next((user for user in node.users if user not in inside), None)
            if user is not None and node not in outputs and not _is_still_there(node, inside, given):
                return node, f"{node.name} is used by {user.name} outside"
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype not in dtypes:
                return node, f"{node.name} is {value.dtype}, which the computation is not rounded to"
        written = {storage_of(state) for state in states}
        for node in () if kept else outputs:
            storage, value = storage_of(node), node.meta.get("val")
            if storage not in self.fixed or storage in written or is_contiguous(value):
                continue
            if not restored or dense_order(value) is None:
                return node, f"{node.name} leaves the graph, or its strides are read"
        return self._disturbed(region, states, at or region[-1])

    def put_in_place(self, program: Program, old: Node, new: Node, reordered: bool = False) -> None:
        """Give the users of an output what was computed instead, laid out as it was where that shows.

        The calls go in at the insertion point.

        Args:
            reordered: whether `new` may be anything else than contiguous.
        """
        value = old.meta["val"]
        order = dense_order(value) if storage_of(old) in self.fixed else None
        if order is not None and (reordered or order != sorted(order)):
            new = laid_out(program, old, new, order)
        old.replace_all_uses_with(new)

    def _disturbed(
        self, region: Sequence[Node], states: Collection[Node], at: Node
    ) -> tuple[Node, str] | None:
        inside, written = set(region), {storage_of(state) for state in states}
        own = {storage_of(node) for node in region} - {None}
        given = {storage_of(node) for node in read_by(region)} - {None}
        first, last = self.position[region[0]], max(self.position[at], self.position[region[-1]])
        for node, place in self.position.items():
            if node in inside:
                for target in written_by(node):
                    storage = storage_of(target)
                    if storage in given and storage not in written:
                        return node, f"{node.name} writes to an input of the computation"
                continue
            targets = {storage_of(target) for target in written_by(node)}
            if first < place < last and targets & given:
                return node, f"{node.name} writes to what the computation reads, in its midst"
            if targets & (own - given):
                return node, f"{node.name} writes to a value inside the computation"
            reads = first < place < last and written & {storage_of(n) for n in node.all_input_nodes} - {None}
            if reads and not self.shows_later(node, last):
                return node, f"{node.name} reads a state while it is being written"
        return None

    def shows_later(self, node: Node, last: int) -> bool:
        """Whether a call is a view that nobody reads before the last one of a region."""
        return str(node.target) in ops.VIEWS and all(
            self.position[user] > last or self.shows_later(user, last) for user in node.users
        )


def _is_still_there(node: Node, inside: Collection[Node], given: Collection[int | None]) -> bool:
    """A view or a cast of an input: it costs nothing, and may stay in the graph for others."""
    value = node.meta.get("val")
    tensors = value if isinstance(value, (list, tuple)) else [value]
    if all(isinstance(v, Tensor) and v.untyped_storage()._cdata in given for v in tensors):
        return True
    while is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
        if node not in inside:
            return True
    return False


def call(program: Program, like: Node, target: Any, *args: Any) -> Node:
    """A new call at the insertion point, of the module that `like` belongs to."""
    node = program.graph.call_function(target, args)
    node.meta["nn_module_stack"] = like.meta.get("nn_module_stack", {})
    return node


def laid_out(program: Program, like: Node, node: Node, order: list[int]) -> Node:
    """The value with its dimensions stored in this order, the widest step first."""
    if order == sorted(order):
        return call(program, like, torch.ops.aten.contiguous.default, node)
    back = sorted(range(len(order)), key=order.__getitem__)
    node = call(program, like, torch.ops.aten.permute.default, node, order)
    node = call(program, like, torch.ops.aten.contiguous.default, node)
    return call(program, like, torch.ops.aten.permute.default, node, back)


def written_out(call: Callable[..., Any], x: Any, *sizes: Any) -> Any:
    """A contiguous value as memory of its own, in these sizes, by way of `call`: of nodes, or of values.

    Inductor computes a value anew for each of its readers; asking for strides makes it memory.
    """
    strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return call(torch.ops.aten.as_strided.default, x, [*sizes], strides)


def erase(program: Program, region: Sequence[Node]) -> None:
    """Remove the nodes that nobody uses any more, writes as well, and what was computed for them alone."""
    there = set(program.graph.nodes)
    for node in reversed(region):
        waiting = [node] if not node.users and node in there else []
        while waiting:
            unused = waiting.pop()
            inputs = unused.all_input_nodes
            program.graph.erase_node(unused)
            there.remove(unused)
            waiting += [n for n in inputs if not n.users and _is_pure(n)]


def _is_pure(node: Node) -> bool:
    if node.op != "call_function" or written_by(node):
        return False
    return node.target is operator.getitem or isinstance(node.target, OpOverload)
