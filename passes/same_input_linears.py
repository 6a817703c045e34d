"""Linears that read one input become one linear over their weights, stacked in order: [x·W₁ᵀ | x·W₂ᵀ | …] = x·[W₁; W₂; …]ᵀ.

Before: q = linear(x, Wq); k = linear(x, Wk); v = linear(x, Wv)
After:  y = linear(x, fused); q, k, v = y[..., :nq], y[..., nq:nq+nk], y[..., nq+nk:]
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, common_module, module_path
from fxfuse.passes.storage_writes import StorageWrites, storage_of
from fxfuse.patterns import ops

RULE = "same_input_linears"
Reason = str | None


def weight_of(linear: Node) -> Node:
    return linear.args[1]  # type: ignore[return-value]


def bias_of(linear: Node) -> Node | None:
    return linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")  # type: ignore[return-value]


def _parameters(linears: Sequence[Node]) -> list[Node]:
    biases = [bias_of(n) for n in linears]
    return [weight_of(n) for n in linears] + [b for b in biases if b is not None]


# The guards: each returns a reason to leave one linear alone, or None.


def weight_is_computed(program: Program, writes: StorageWrites, linear: Node) -> Reason:
    for node in _parameters([linear]):
        if node.op != "placeholder":
            return f"its weight is computed by {node.name}, not a parameter (quantised or parametrised?)"
        if node.name not in program.weights:
            return f"its weight {node.name} is an input of the call, not a parameter"
    return None


def memory_is_not_its_own(program: Program, writes: StorageWrites, linear: Node) -> Reason:
    reasons = (program.weights[node.name].refusal for node in _parameters([linear]))
    return next((reason for reason in reasons if reason), None)


def weight_is_written(program: Program, writes: StorageWrites, linear: Node) -> Reason:
    written = [node for node in _parameters([linear]) if writes.is_written(node)]
    return (
        f"its parameter {program.weights[written[0].name].name} is written inside the graph"
        if written
        else None
    )


def output_is_written(program: Program, writes: StorageWrites, linear: Node) -> Reason:
    return "its output is written in place" if writes.is_written(linear) else None


def weight_is_trained(program: Program, writes: StorageWrites, linear: Node) -> Reason:
    if not program.grad_enabled:
        return None
    trained = [
        program.weights[n.name].name for n in _parameters([linear]) if program.weights[n.name].trainable
    ]
    if not trained:
        return None
    return f"grad mode is on and {trained[0]} is trainable: call under torch.no_grad(), or freeze it"


GUARDS = (weight_is_computed, memory_is_not_its_own, weight_is_written, output_is_written, weight_is_trained)


@dataclass(frozen=True)
class Kind:
    """What all linears of one merge have in common."""

    dtype: torch.dtype
    device: torch.device
    bias: bool

    @classmethod
    def of(cls, linear: Node) -> "Kind":
        value = weight_of(linear).meta["val"]
        return cls(value.dtype, value.device, bias_of(linear) is not None)

    def difference(self, other: "Kind") -> str:
        """Why a linear of the other kind cannot join one of this kind."""
        if self.dtype != other.dtype:
            return f"its weight is {other.dtype}, the others' are {self.dtype}"
        if self.device != other.device:
            return f"its weight is on {other.device}, the others' are on {self.device}"
        return "it has a bias, the others have none" if other.bias else "it has no bias, the others have one"


def _groups(program: Program, writes: StorageWrites) -> list[list[Node]]:
    """Linears by the value they read: the same node, with no write to its memory in between."""
    by_input: dict[tuple[Node, int], list[Node]] = defaultdict(list)
    for linear in program.calls(ops.LINEAR):
        source = linear.args[0]
        if isinstance(source, Node):
            by_input[source, writes.version(source, linear)].append(linear)
    return [group for group in by_input.values() if len(group) > 1]


def _where(program: Program, linear: Node) -> str:
    weight = program.weights.get(weight_of(linear).name)
    return weight.name if weight is not None else module_path(linear) or linear.name


def _partition(
    program: Program, writes: StorageWrites, linears: Sequence[Node]
) -> tuple[list[list[Node]], list[tuple[Node, str]]]:
    """The linears that merge, by kind, and those that stay, each with its reason."""
    kinds: dict[Kind, list[Node]] = defaultdict(list)
    left: list[tuple[Node, str]] = []
    seen: set[int | None] = set()
    for linear in linears:
        reason = next((r for guard in GUARDS if (r := guard(program, writes, linear)) is not None), None)
        if reason is None and storage_of(weight_of(linear)) in seen:
            reason = "its weight is shared with another linear of the group"
        if reason is None:
            seen.add(storage_of(weight_of(linear)))
            kinds[Kind.of(linear)].append(linear)
        else:
            left.append((linear, reason))
    most = max(kinds, key=lambda kind: len(kinds[kind]), default=None)
    for kind, alone in kinds.items():
        if len(alone) == 1 and most is not None and kind != most:
            left.append((alone[0], most.difference(kind)))
        elif len(alone) == 1:
            left.append((alone[0], "no other linear of its kind reads the same input"))
    return [group for group in kinds.values() if len(group) > 1], left


def _merge(program: Program, linears: Sequence[Node]) -> None:
    weights = [weight_of(n) for n in linears]
    biases = [b for n in linears if (b := bias_of(n)) is not None]
    fused = [program.stack(parameters) for parameters in (weights, biases) if parameters]
    graph, escaping = program.graph, set(program.graph.find_nodes(op="output")[0].all_input_nodes)
    with graph.inserting_before(linears[0]):
        whole = graph.call_function(torch.ops.aten.linear.default, (linears[0].args[0], *fused))
        whole.meta["nn_module_stack"] = linears[0].meta.get("nn_module_stack", {})
        start = 0
        for linear, weight in zip(linears, weights, strict=True):
            stop = start + weight.meta["val"].shape[0]
            part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, start, stop))
            part.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
            if linear in escaping:  # the caller gets memory of its own, laid out as before
                part = graph.call_function(
                    torch.ops.aten.clone.default, (part,), {"memory_format": torch.contiguous_format}
                )
            linear.replace_all_uses_with(part)
            start = stop
    for linear in linears:
        graph.erase_node(linear)


def run(program: Program) -> Outcome:
    """Merge every group that may be merged; report every linear that stays, with the node and the reason."""
    outcome, writes = Outcome(), StorageWrites(program.graph)
    for linears in _groups(program, writes):
        groups, left = _partition(program, writes, linears)
        for group in groups:
            overlap = program.fused_elsewhere(_parameters(group))
            if overlap is not None:
                left.append((group[0], f"{overlap} is already part of another fused weight"))
                continue
            members = tuple(program.weights[weight_of(n).name].name for n in group)
            _merge(program, group)
            outcome.matches.append(Match(RULE, common_module(members), members, f"{len(group)} linears → 1"))
        outcome.misses += [Miss(RULE, _where(program, linear), linear.name, why) for linear, why in left]
    return outcome
