"""A split→reshape→cat chain behind a linear moves features: strided views, or an order of the weight's rows.

    Before: y = linear(x, W); q, k, v, z = split(reshape(y, [B, T, H, G]), …, 3); m = cat([reshape(q), …], -1)
    After:  m = gather_features(y, blocks of q, k, v); z = gather_features(y, block of z)
    Copy:   y = linear(x, W[order]); m = y[..., :n]; z = unflatten(y[..., n:], …)           weights="copy"

Which features a node holds is not read off the spelling: the chain is run on numbered features.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.same_input_linears import bias_of, weight_is_trained, weight_of
from fxfuse.passes.storage_writes import StorageWrites
from fxfuse.patterns import ops

RULE = "layout_chains"


@dataclass(frozen=True)
class Cut:
    """A node of the chain whose rows are whole: the features it holds, in order, and their shape."""

    node: Node
    features: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_in_order(self) -> bool:
        return self.features == tuple(range(self.features[0], self.features[0] + len(self.features)))


def _region(linear: Node) -> list[Node]:
    """The nodes that hold nothing but features of this linear, in graph order."""
    region = {linear}
    for node in linear.graph.nodes:
        is_layout = node.op == "call_function" and (
            node.target is operator.getitem or str(node.target) in ops.LAYOUT
        )
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple))]
        if is_layout and tensors and region.issuperset(tensors):
            region.add(node)
    return [node for node in linear.graph.nodes if node in region]


def _concrete(value: Any, sizes: dict[Any, int]) -> Any:
    """A size with every symbol replaced by a small number, the same one everywhere."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    for symbol in expression.free_symbols:
        sizes.setdefault(symbol, 2 + len(sizes))
    return int(expression.subs(sizes))


def _numbered(region: Sequence[Node]) -> dict[Node, Any]:
    """The region run on numbers: row · N + feature, so that every element says where it came from."""
    sizes: dict[Any, int] = {}
    linear, *rest = region
    shape = [_concrete(size, sizes) for size in linear.meta["val"].shape]
    values: dict[Node, Any] = {linear: torch.arange(prod(shape)).reshape(shape)}

    def value_of(node: Node) -> Any:
        return values[node] if node in values else _concrete(node.meta["val"], sizes)

    for node in rest:
        args, kwargs = map_arg((node.args, node.kwargs), value_of)
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _features(value: Any, whole: Tensor) -> tuple[int, ...] | None:
    """The features that each row of the linear has in `value`, if every row is there, in order and alike."""
    lead, width = whole.shape[:-1], whole.shape[-1]
    if not isinstance(value, Tensor) or value.shape[: len(lead)] != lead or value.dim() == len(lead):
        return None
    rows = value.reshape(prod(lead), -1)
    picked = rows[0]
    if not torch.equal(rows, picked + torch.arange(prod(lead))[:, None] * width):
        return None
    return tuple(picked.tolist())


def _cuts(region: Sequence[Node], values: dict[Node, Any]) -> list[Cut]:
    """The last nodes whose rows are whole: somebody uses them for more than to rearrange them so again."""
    whole = values[region[0]]
    features = {node: _features(values[node], whole) for node in region}
    inside = {node for node in region if features[node] is not None or _only_feeds(node, features)}
    return [
        Cut(node, found, tuple(values[node].shape[whole.dim() - 1 :]))
        for node in region
        if (found := features[node]) is not None and any(user not in inside for user in node.users)
    ]


def _only_feeds(node: Node, features: dict[Node, tuple[int, ...] | None]) -> bool:
    """Whether a list (of a split) or another step is there only on the way to nodes whose rows are whole."""
    return bool(node.users) and all(
        user in features and (features[user] is not None or _only_feeds(user, features))
        for user in node.users
    )


def _blocks(features: Sequence[int]) -> list[int]:
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


def leaves_by_another_way(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    """Every use of the linear's features must go through a cut."""
    reached = {cut.node for cut in cuts}
    for node in region:
        if node in reached or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    for node in region:
        outside = next((user for user in node.users if user not in region), None)
        if outside is not None and node not in reached:
            return f"{node.name} is used by {outside.name}, where its rows are not whole"
    return None


def is_no_permutation(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    """Folding an order into the weight needs every row once."""
    if not program.copy_weights:
        return None
    width = region[0].meta["val"].shape[-1]
    used = sorted(feature for cut in cuts for feature in cut.features)
    return None if used == list(range(width)) else "not every feature is used exactly once"


def weight_cannot_be_permuted(program: Program, region: Sequence[Node], cuts: Sequence[Cut]) -> str | None:
    if not program.copy_weights:
        return None
    for parameter in filter(None, (weight_of(region[0]), bias_of(region[0]))):
        if not program.name_of(parameter):
            return f"{parameter.name} is not a parameter whose rows can be put in another order"
    if bias_of(region[0]) is None and weight_of(region[0]).name in program.weights:
        return weight_is_trained(program, StorageWrites(program.graph), region[0])
    return None


GUARDS = (memory_is_written, leaves_by_another_way, is_no_permutation, weight_cannot_be_permuted)


def _read_strided(program: Program, cuts: Sequence[Cut], linear: Node) -> None:
    for cut in cuts:
        if cut.is_in_order:
            continue
        with program.graph.inserting_after(linear):
            picked = program.graph.call_function(
                torch.ops.fxfuse.gather_features.default, (linear, _blocks(cut.features), list(cut.shape))
            )
        picked.meta["nn_module_stack"] = cut.node.meta.get("nn_module_stack", {})
        cut.node.replace_all_uses_with(picked)


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
        region = _region(linear)
        if not any(str(node.target) == ops.CAT for node in region):
            continue
        cuts = _cuts(region, _numbered(region))
        if not cuts or all(cut.is_in_order for cut in cuts):
            continue
        name = program.name_of(weight_of(linear))
        where = name or module_path(linear)
        reason = next((r for guard in GUARDS if (r := guard(program, region, cuts)) is not None), None)
        if reason is not None:
            outcome.misses.append(Miss(RULE, where, linear.name, reason))
            continue
        members = program.members_of(weight_of(linear)) if name else ()
        if program.copy_weights:
            _fold_into_weight(program, cuts, linear)
        else:
            _read_strided(program, cuts, linear)
        for node in reversed(region[1:]):
            if not node.users:
                program.graph.erase_node(node)
        program.drop_unused_weights()
        detail = "chain → order of rows" if program.copy_weights else "chain → strided views"
        outcome.matches.append(Match(RULE, where, members, detail))
    return outcome
