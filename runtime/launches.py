"""How many kernels a lowered graph launches, block by block, counted without a device.

A launch is one call that is no view. Pointwise calls and reductions that feed each other are one, as Inductor
makes one kernel of them; a call of a library or of a Triton kernel of ours is one by itself. A norm between
two blocks is counted with the block before it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxfuse.passes.program import module_path
from fxfuse.passes.storage_writes import written_by
from fxfuse.runtime.ops.causal_conv1d_update import MAX_LENGTH

# Kernels of libraries, and those of torch that Inductor does not generate; the operators of fxfuse are Triton
# kernels.
LIBRARY = frozenset(
    {
        "aten._grouped_mm.default",
        "aten.addmm.default",
        "aten.baddbmm.default",
        "aten.bmm.default",
        "aten.conv1d.default",
        "aten.histc.default",
        "aten.index_put.default",
        "aten.index_put_.default",
        "aten.linear.default",
        "aten.matmul.default",
        "aten.mm.default",
        "aten.scaled_dot_product_attention.default",
        "aten.sort.default",
        "aten.sort.stable",
        "aten.topk.default",
    }
)
# Operators of fxfuse with more than one kernel.
SEVERAL = {"fxfuse.chunk_gated_delta_rule.default": 2}
CONVOLUTION_STEP = "fxfuse.causal_conv1d_update.default"
NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.sym_")


@dataclass(frozen=True)
class Launch:
    """One kernel: of fxfuse ("triton"), of a library, or what Inductor generates ("inductor").

    Attributes:
        names: of its calls, one for a kernel that is there before compiling.
    """

    kind: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {' + '.join(self.names)}"


@dataclass
class Block:
    """Launches of equal blocks: a kind of layer's part, such as `self_attn` or `mlp`, in some layers."""

    kind: str
    launches: tuple[Launch, ...]
    layers: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.kind} × {len(self.layers)}: {len(self.launches)} launches"]
        return "\n".join([*lines, *(f"    {launch}" for launch in self.launches)])


def blocks_of(graph: Graph) -> list[Block]:
    """The launches of a graph by kind of block, equal ones together; those outside of blocks as one more."""
    place: tuple[int, str] | None = None
    found: dict[tuple[int, str] | None, list[Launch]] = {}
    homes = {_home(node) for node in graph.nodes if str(node.target) in LIBRARY} - {None}
    for node, launch in launches(graph):
        home = _home(node)
        last = home is not None and place is not None and home != place and home not in homes
        place = place if last or (home is None and _is_norm(launch)) else home
        found.setdefault(place, []).append(launch)
    blocks: dict[tuple[str, tuple[Launch, ...]], Block] = {}
    for home, ran in found.items():
        kind = "outside of layers" if home is None else home[1]
        block = blocks.setdefault((kind, tuple(ran)), Block(kind, tuple(ran)))
        block.layers.append(-1 if home is None else home[0])
    return list(blocks.values())


def launches(graph: Graph) -> list[tuple[Node, Launch]]:
    """Every launch with its first call, in graph order."""
    groups = _groups(graph)
    members: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node in groups:
            members.setdefault(groups[node], []).append(node)
    first = {nodes[0]: nodes for nodes in members.values()}
    found = []
    for node in graph.nodes:
        if node in first:
            names = tuple(str(n.target).split(".")[1] for n in first[node])
            found.append((node, Launch("inductor", names)))
        elif _is_kernel(node):
            target = str(node.target)
            launch = Launch("library" if target in LIBRARY else "triton", (target.split(".")[1],))
            found += [(node, launch)] * _kernels(node)
    return found


def _kernels(node: Node) -> int:
    """How many kernels an operator launches; for many tokens where their number varies."""
    if str(node.target) == CONVOLUTION_STEP:
        length = node.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
        return 1 if isinstance(length, int) and length <= MAX_LENGTH else 2
    return SEVERAL.get(str(node.target), 1)


def _home(node: Node) -> tuple[int, str] | None:
    """The number of the layer that a call belongs to, and the part of that layer."""
    parts = re.search(r"\.(\d+)\.(\w+)", f".{module_path(node)}.")
    return (int(parts[1]), parts[2]) if parts else None


def _is_norm(launch: Launch) -> bool:
    return launch.names in (("rms_norm",), ("add_rms_norm",))


def _is_kernel(node: Node) -> bool:
    """Whether a call is a kernel by itself, before any compiler."""
    if node.op != "call_function" or _is_free(node):
        return False
    return str(node.target) in LIBRARY or (
        isinstance(node.target, OpOverload) and node.target.namespace == "fxfuse"
    )


def _is_free(node: Node) -> bool:
    """A view, an allocation, or a number: nothing runs on the device."""
    if (
        node.op != "call_function"
        or node.target is operator.getitem
        or not isinstance(node.target, OpOverload)
    ):
        return True
    if str(node.target).startswith(NO_KERNEL):
        return True
    if written_by(node):
        return False
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        values: Sequence[Any] = value
    else:
        values = [value]
    if not values or not all(isinstance(v, torch.Tensor) for v in values):
        return True
    given = {v.untyped_storage()._cdata for n in node.all_input_nodes for v in _tensors(n.meta.get("val"))}
    return all(v.untyped_storage()._cdata in given for v in values)


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return [
        v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, torch.Tensor)
    ]


def _groups(graph: Graph) -> dict[Node, Node]:
    """For each call that Inductor generates code for, one that stands for its kernel.

    Two calls are in one kernel if one feeds the other, through views at most, with no other kernel between.
    """
    parent: dict[Node, Node] = {}
    level: dict[Node, int] = {}
    reached: dict[Node, set[Node]] = {}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in graph.nodes:
        inputs = node.all_input_nodes
        level[node] = max((level[n] + _is_kernel(n) for n in inputs), default=0)
        feeding = {g for n in inputs for g in reached.get(n, ()) if level[g] == level[node]}
        if node.op != "call_function" or _is_kernel(node):
            reached[node] = set()
        elif _is_free(node):
            reached[node] = feeding
        else:
            parent[node] = node
            for other in feeding:
                if _home(other) == _home(node):
                    parent[root(node)] = root(other)
            reached[node] = {node}
    return {node: root(node) for node in parent}
