"""A split→reshape→cat chain behind a linear moves features: strided views, or an order of the weight's rows.

    Before: y = linear(x, W); q, k, v, z = split(reshape(y, [B, T, H, G]), …, 3); m = cat([reshape(q), …], -1)
    After:  m = gather_features(y, blocks of q, k, v); z = gather_features(y, block of z)
    Copy:   y = linear(x, W[order]); m = y[..., :n]; z = unflatten(y[..., n:], …)           weights="copy"

Which features a node holds is not read off the spelling: see `numbered_features`.
"""

from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from fxfuse.passes.backward import Backward
from fxfuse.passes.modes import grad_enabled_at
from fxfuse.passes.numbered_features import MOST_ELEMENTS, Cut, TooLarge, cuts_of, region_of
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import call
from fxfuse.passes.same_input_linears import bias_of, weight_of
from fxfuse.passes.storage_writes import StorageWrites, is_contiguous, layout_matters, storage_of
from fxfuse.patterns import ops

RULE = "layout_chains"


def blocks_of(features: Sequence[int]) -> list[int]:
    """The fewest (start, run, stride, count) that spell the features in order."""
    runs: list[list[int]] = []
    for feature in features:
        if runs and feature == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([feature, 1])
    blocks: list[list[int]] = []
    for start, run in runs:
        last = blocks[-1] if blocks else None
        if last is not None and last[1] == run and last[3] == 1 and start > last[0]:
            last[2:] = [start - last[0], 2]
        elif last is not None and last[1] == run and last[3] > 1 and start == last[0] + last[2] * last[3]:
            last[3] += 1
        else:
            blocks.append([start, run, run, 1])
    return [number for block in blocks for number in block]


# The guards: each returns a reason to leave the chain alone, or None.


def memory_is_written(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    writes = StorageWrites(program.graph)
    written = next((node for node in region if writes.is_written(node)), None)
    return f"{written.name} is written in place" if written is not None else None


def gradients_are_parted(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    parted = Backward(program).parts(*region)
    return "gradients pass a part of the chain only" if parted else None


def is_no_permutation(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    """Folding an order into the weight needs every row once."""
    width = region[0].meta["val"].shape[-1]
    used = sorted(feature for cut in cuts for feature in cut.features)
    return None if used == list(range(width)) else "not every feature is used exactly once"


def weight_cannot_be_permuted(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    trained = grad_enabled_at(region[0], program.grad_enabled)
    for parameter in filter(None, (weight_of(region[0]), bias_of(region[0]))):
        if not program.name_of(parameter):
            return f"{parameter.name} is not a parameter whose rows can be put in another order"
        if trained and program.is_trainable(parameter):
            return "grad mode is on and a weight is trainable: call under torch.no_grad(), or freeze it"
    return None


def memory_is_read_as_it_was(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    """A value that leaves the graph, or whose strides are read, stays where and as it was."""
    fixed = layout_matters(program.graph)
    found = next((cut.node for cut in cuts if storage_of(cut.node) in fixed), None)
    return f"{found.name} leaves the graph, or its strides are read" if found is not None else None


GUARDS = (memory_is_written, gradients_are_parted)
COPY_GUARDS = (is_no_permutation, weight_cannot_be_permuted, memory_is_read_as_it_was)


def _reason(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    guards = (*GUARDS, *COPY_GUARDS) if program.copy_weights else GUARDS
    return next((r for guard in guards if (r := guard(program, region, cuts)) is not None), None)


def _read_strided(program: Program, cuts: Sequence[Cut], linear: Node) -> None:
    fixed, gather = layout_matters(program.graph), torch.ops.fxfuse.gather_features.default
    for cut in cuts:
        with program.graph.inserting_before(linear.next):
            picked = call(program, cut.node, gather, linear, blocks_of(cut.features), list(cut.shape))
            if storage_of(cut.node) in fixed:  # memory of its own, as it was
                picked = call(program, cut.node, torch.ops.aten.clone.default, picked)
                picked.kwargs = {"memory_format": torch.contiguous_format}
        cut.node.replace_all_uses_with(picked)


def _movable(program: Program, cuts: Sequence[Cut]) -> list[Cut]:
    """The cuts out of order that may become views, or one copy where their memory leaves the graph."""
    fixed: Collection[int | None] = layout_matters(program.graph)
    moved = [cut for cut in cuts if not cut.is_in_order]
    return [c for c in moved if storage_of(c.node) not in fixed or is_contiguous(c.node.meta["val"])]


def _fold_into_weight(program: Program, cuts: Sequence[Cut], linear: Node) -> None:
    order = [feature for cut in cuts for feature in cut.features]
    weight, bias = weight_of(linear), bias_of(linear)
    parameters = [program.permuted(p, order) for p in (weight, bias) if p is not None]
    linear.args = (linear.args[0], *parameters)
    linear.kwargs = {}
    start, point = 0, linear
    for cut in cuts:
        stop = start + len(cut.features)
        with program.graph.inserting_after(point):
            part = program.graph.call_function(torch.ops.aten.slice.Tensor, (linear, -1, start, stop))
        point = part
        if len(cut.shape) > 1:
            with program.graph.inserting_after(point):
                part = program.graph.call_function(torch.ops.aten.unflatten.int, (part, -1, list(cut.shape)))
            point = part
        part.meta["nn_module_stack"] = cut.node.meta.get("nn_module_stack", {})
        cut.node.replace_all_uses_with(part)
        start = stop


def run(program: Program) -> Outcome:
    """Rewrite the chain with a cat behind each linear; report every chain that stays, with the reason."""
    outcome = Outcome()
    for linear in program.calls(ops.LINEAR):
        region = region_of(linear)
        if not any(str(node.target) == ops.CAT for node in region):
            continue
        name = program.name_of(weight_of(linear))
        where = name or module_path(linear)
        try:
            known, cuts = cuts_of(region)
        except TooLarge:
            reason: str | None = f"its output has more than {MOST_ELEMENTS} elements: let lengths vary"
        else:
            if all(cut.is_in_order for cut in cuts):
                continue
            reason = _reason(program, known, cuts)
            if reason is None and not program.copy_weights and not _movable(program, cuts):
                reason = memory_is_read_as_it_was(program, known, [c for c in cuts if not c.is_in_order])
        if reason is not None:
            outcome.misses.append(Miss(RULE, where, linear.name, reason))
            continue
        members = program.members_of(weight_of(linear)) if name else ()
        if program.copy_weights:
            _fold_into_weight(program, cuts, linear)
        else:
            _read_strided(program, _movable(program, cuts), linear)
        for node in reversed(known[1:]):
            if not node.users:
                program.graph.erase_node(node)
        program.drop_unused_weights()
        detail = "chain → order of rows" if program.copy_weights else "chain → strided views"
        outcome.matches.append(Match(RULE, where, members, detail))
    return outcome
