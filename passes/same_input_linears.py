"""Linears that read one input become one, their weights stacked: [x·W₁ᵀ | x·W₂ᵀ | …] = x·[W₁; W₂; …]ᵀ.

Before: q = linear(x, Wq); k = linear(x, Wk); v = linear(x, Wv)
After:  y = linear(x, fused); q, k, v = y[..., :nq], y[..., nq:nq+nk], y[..., nq+nk:]
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxfuse.passes.modes import Mode, grad_enabled_at, modes
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.storage_writes import StorageWrites, layout_matters, same_memory, storage_of, written_by
from fxfuse.passes.weights.naming import fused_name
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
            return f"its weight is computed by {node.target}, not a parameter (quantised or parametrised?)"
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
    if not grad_enabled_at(linear, program.grad_enabled):
        return None
    trained = [
        program.weights[n.name].name for n in _parameters([linear]) if program.weights[n.name].trainable
    ]
    if not trained:
        return None
    return f"grad mode is on and {trained[0]} is trainable: call under torch.no_grad(), or freeze it"


def shape_is_unusual(program: Program, writes: StorageWrites, linear: Node) -> Reason:
    """A vector as the weight gives no last dimension, a bias may be broadcast: neither can be stacked."""
    weight, bias = weight_of(linear).meta["val"], bias_of(linear)
    if weight.dim() != 2 or weight.numel() == 0:
        return f"its weight has the shape {tuple(weight.shape)}, where rows and columns are needed"
    if bias is None:
        return None
    value = bias.meta["val"]
    if tuple(value.shape) != (weight.shape[0],) or value.dtype != weight.dtype:
        return (
            f"its bias is {value.dtype} {list(value.shape)}, its weight {weight.dtype} {list(weight.shape)}"
        )
    return None


def factor_of_low_rank_product(program: Program, writes: StorageWrites, linear: Node) -> Reason:
    """An adapter's first linear: merged with its like it was not faster (docs/performance.md)."""
    users = [use for use in linear.users if use.target is not torch.ops.aten.dropout.default]
    outer = [use for use in users if use.target is torch.ops.aten.linear.default and use.args[0] is linear]
    rank, features = weight_of(linear).meta["val"].shape
    narrow = all(rank < min(features, weight_of(use).meta["val"].shape[0]) for use in outer)
    if not outer or len(outer) < len(linear.users) or not narrow:
        return None
    return "it is the first factor of a low-rank product (an adapter's), which is not faster merged"


GUARDS = (
    weight_is_computed,
    memory_is_not_its_own,
    weight_is_written,
    output_is_written,
    weight_is_trained,
    shape_is_unusual,
    factor_of_low_rank_product,
)


@dataclass(frozen=True)
class Kind:
    """What all linears of one merge have in common.

    A frozen weight beside a trained one (an adapter) merges with grad mode on as well, the trained one does
    not: merged with it at inference, the two kinds of call would lay the memory out in two ways.
    """

    dtype: torch.dtype
    device: torch.device
    bias: bool
    trainable: bool

    @classmethod
    def of(cls, program: Program, linear: Node) -> "Kind":
        value, parameters = weight_of(linear).meta["val"], _parameters([linear])
        trainable = any(program.weights[p.name].trainable for p in parameters)
        return cls(value.dtype, value.device, bias_of(linear) is not None, trainable)

    def difference(self, other: "Kind") -> str:
        """Why a linear of the other kind cannot join one of this kind."""
        if self.dtype != other.dtype:
            return f"its weight is {other.dtype}, the others' are {self.dtype}"
        if self.device != other.device:
            return f"its weight is on {other.device}, the others' are on {self.device}"
        if self.trainable != other.trainable:
            return (
                "its weight is trainable, the others' are frozen"
                if other.trainable
                else ("its weight is frozen, the others' are trainable")
            )
        return "it has a bias, the others have none" if other.bias else "it has no bias, the others have one"


def _before_writes(source: Node) -> Node:
    """The node that in-place calls, each of which hands back what it has written to, started from."""
    while (written := written_by(source)) and same_memory(source, written[0]):
        source = written[0]
    return source


def _groups(program: Program, writes: StorageWrites) -> tuple[list[list[Node]], list[tuple[Node, str]]]:
    """Linears that read one value, no write to it and no switch of modes between; those parted by one."""
    by_input: dict[Node, dict[tuple[int, Mode], list[Node]]] = defaultdict(lambda: defaultdict(list))
    mode = modes(program.graph, program.grad_enabled)
    for linear in program.calls(ops.LINEAR):
        source = linear.args[0]
        if isinstance(source, Node):
            state = writes.version(source, linear), mode[linear]
            by_input[_before_writes(source)][state].append(linear)
    groups: list[list[Node]] = []
    left: list[tuple[Node, str]] = []
    for source, states in by_input.items():
        first = next(iter(states))
        for (version, modes_then), linears in states.items():
            if len(linears) > 1:
                groups.append(linears)
            elif version != first[0]:
                write = writes.write_before(source, linears[0])
                left.append((linears[0], f"its input {source.name} is written by {write} before it"))
            elif modes_then != first[1]:
                left.append(
                    (linears[0], "it runs under another grad or autocast mode than the linears before it")
                )
    return groups, left


def _where(program: Program, linear: Node) -> str:
    return program.name_of(weight_of(linear)) or module_path(linear) or linear.name


def _partition(
    program: Program, writes: StorageWrites, linears: Sequence[Node]
) -> tuple[list[list[Node]], list[tuple[Node, str]]]:
    """The linears that merge, by kind, and those that stay, each with its reason."""
    kinds: dict[Kind, list[Node]] = defaultdict(list)
    left: list[tuple[Node, str]] = []
    seen: set[int | None] = set()
    for linear in linears:
        reason = next((r for guard in GUARDS if (r := guard(program, writes, linear)) is not None), None)
        memory = {storage_of(parameter) for parameter in _parameters([linear])}
        if reason is None and not seen.isdisjoint(memory):
            reason = "its weight or bias is shared with another linear of the group"
        if reason is None:
            seen |= memory
            kinds[Kind.of(program, linear)].append(linear)
        else:
            left.append((linear, reason))
    most = max(kinds, key=lambda kind: len(kinds[kind]), default=None)
    for kind, alone in kinds.items():
        if len(alone) == 1 and most is not None and kind != most:
            left.append((alone[0], most.difference(kind)))
        elif len(alone) == 1:
            left.append((alone[0], "no other linear of its kind reads the same input"))
    return [group for group in kinds.values() if len(group) > 1], left


def _merge(program: Program, linears: Sequence[Node], keep_layout: Collection[int | None]) -> str:
    """Put one linear in the place of several; returns the module name of its weight."""
    weights = [weight_of(n) for n in linears]
    biases = [b for n in linears if (b := bias_of(n)) is not None]
    fused = [program.stack(parameters) for parameters in (weights, biases) if parameters]
    graph = program.graph
    with graph.inserting_before(linears[0]):
        whole = graph.call_function(torch.ops.aten.linear.default, (linears[0].args[0], *fused))
        whole.meta["nn_module_stack"] = linears[0].meta.get("nn_module_stack", {})
        start = 0
        for linear, weight in zip(linears, weights, strict=True):
            stop = start + weight.meta["val"].shape[0]
            part = graph.call_function(torch.ops.aten.slice.Tensor, (whole, -1, start, stop))
            part.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
            if storage_of(linear) in keep_layout:
                part = graph.call_function(
                    torch.ops.aten.clone.default, (part,), {"memory_format": torch.contiguous_format}
                )
            linear.replace_all_uses_with(part)
            start = stop
    for linear in linears:
        graph.erase_node(linear)
    return program.name_of(fused[0])


def _obstacle(program: Program, group: Sequence[Node]) -> Reason:
    """Why a whole group cannot become one weight, or None."""
    weights = [weight_of(n) for n in group]
    biases = [b for n in group if (b := bias_of(n)) is not None]
    for parameters in filter(None, (weights, biases)):
        overlap = program.fused_elsewhere(parameters)
        if overlap is not None:
            return f"{overlap} is already part of another fused weight"
        name = fused_name([program.weights[p.name].name for p in parameters])
        if any(weight.name == name for weight in program.weights.values()):
            return f"the name {name} of the fused weight is taken by another parameter"
    return None


def run(program: Program) -> Outcome:
    """Merge every group that may be merged; report every linear that stays, with the node and the reason."""
    outcome, writes, keep_layout = Outcome(), StorageWrites(program.graph), layout_matters(program.graph)
    candidates, left = _groups(program, writes)
    for linears in candidates:
        groups, stay = _partition(program, writes, linears)
        left += stay
        for group in groups:
            obstacle = _obstacle(program, group)
            if obstacle is not None:
                left += [(linear, obstacle) for linear in group]
                continue
            members = tuple(program.weights[weight_of(n).name].name for n in group)
            where = _merge(program, group, keep_layout)
            outcome.matches.append(Match(RULE, where, members, f"{len(group)} linears → 1"))
    outcome.misses += [Miss(RULE, _where(program, linear), linear.name, why) for linear, why in left]
    return outcome
