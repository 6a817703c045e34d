"""A causal depthwise convolution with its cut and SiLU becomes one call.

Before: y = silu(conv1d(x, w[:, None], bias, padding=K - 1, groups=C)[:, :, :T])
        y = silu(sum(pad(x, (K - 1, 0))[:, :, k : k + T] * w[:, k, None] for k in range(K)))
After:  y = causal_conv1d(x, w, bias, None, None, apply_silu=True)
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, read_by
from fxfuse.passes.storage_writes import equal_sizes, written_by
from fxfuse.patterns import readings
from fxfuse.patterns.ops import CAT
from fxfuse.runtime.ops.limits import unsupported

RULE = "causal_conv1d"
NONE_AT_ALL = "run on random values it is no causal convolution"


@dataclass(frozen=True)
class Found:
    """A convolution of x up to `end`, the operator's parameters, and all calls that it stands for.

    `turned`: x and the result are [B, T, C].
    """

    x: Node
    end: Node
    weight: Node
    bias: Node | None
    silu: bool
    region: list[Node]
    turned: bool = False

    def on(self, values: Mapping[Node, Any]) -> Sequence[Tensor]:
        """The operator's result."""
        x, bias = values[self.x], None if self.bias is None else values[self.bias]
        taps = values[self.weight]
        taps = taps.squeeze(1) if taps.dim() == 3 else taps
        x = x.transpose(1, 2) if self.turned else x
        y = torch.ops.fxfuse.causal_conv1d(x, taps, bias, None, None, self.silu)
        return [y.transpose(1, 2) if self.turned else y]

    @property
    def name(self) -> str:
        inputs = read_by(self.region)
        places = [n and inputs.index(n) for n in (self.x, self.weight, self.bias)]
        return f"{RULE} {places} {self.silu} {self.turned}"

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {self.end.meta["val"].dtype, torch.float32}


def is_depthwise(conv: Node) -> bool:
    x, weight, groups = conv.args[0], conv.args[1], conv.args[6] if len(conv.args) > 6 else 1
    if not isinstance(x, Node) or not isinstance(weight, Node) or x.meta["val"].dim() != 3:
        return False
    shape = weight.meta["val"].shape
    return groups == shape[0] and shape[1] == 1 and statically_known_true(x.meta["val"].shape[1] == groups)


def ends_of(conv: Node) -> Iterator[Node]:
    """The last nodes that the operator may compute, the farthest first: nobody else reads what is before."""
    after, waiting = {conv}, [conv]
    while waiting:
        for user in waiting.pop().users:
            tensors = [n for n in user.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
            alone = user not in after and after.issuperset(tensors)
            if alone and (user.target is getitem or str(user.target) in readings.AFTER_CONVOLUTION):
                after.add(user)
                waiting.append(user)
    inputs = set(conv.all_input_nodes)
    for end in sorted(after, reverse=True):
        inside = set(behind([end], inputs))
        if isinstance(end.meta["val"], Tensor) and all(
            user in inside for node in inside - {end} for user in node.users
        ):
            yield end


def readers_of(sources: Iterable[Node], targets: Collection[str]) -> list[Node]:
    """What is computed from the sources, and them, by calls of these operators alone; in graph order."""
    found = set(sources)
    waiting = list(found)
    while waiting:
        for user in waiting.pop().users:
            if user not in found and (user.target is getitem or str(user.target) in targets):
                found.add(user)
                waiting.append(user)
    return sorted(found)


def parameters_of(
    region: Sequence[Node], given: Collection[Node], channels: Any
) -> tuple[Node, Node | None] | None:
    """The taps [C, 1, K] or [C, K] and the bias [C], where a region reads nothing else than `given`."""
    others = [n for n in read_by(region) if isinstance(n.meta.get("val"), Tensor) and n not in given]
    biases = [n for n in others if n.meta["val"].dim() == 1]
    taps = [n for n in others if n not in biases]
    if len(taps) != 1 or len(biases) > 1:
        return None
    sizes = list(taps[0].meta["val"].shape)
    if len(sizes) == 3 and not statically_known_true(sizes.pop(1) == 1):
        return None
    rows = [sizes[0], *(n.meta["val"].shape[0] for n in biases)] if len(sizes) == 2 else [None]
    fits = all(size is not None and statically_known_true(size == channels) for size in rows)
    return (taps[0], (*biases, None)[0]) if fits else None


def _unpadded(x: Node) -> Node | None:
    """What a node puts zeros before, perhaps."""
    source: Any = x.args[0] if str(x.target) in readings.PADDINGS else None
    if str(x.target) == CAT and len(x.args[0]) == 2:  # type: ignore[arg-type]
        source = x.args[0][1]  # type: ignore[index]
    value = source.meta["val"] if isinstance(source, Node) else None
    return source if value is not None and value.dim() == 3 and value.is_floating_point() else None


def _accepted(guards: Guards, judge: Judge, conv: Node) -> Found:
    """What a convolution and the calls behind it are; raises Refused."""
    given, *parameters = [n for n in conv.args[:3] if isinstance(n, Node)]
    weight, bias = (*parameters, None)[:2]
    limit = unsupported(RULE, *(n.meta["val"] for n in (given, *parameters)))
    if limit is not None:
        raise Refused(conv, limit)
    miss = Refused(conv, NONE_AT_ALL)
    inputs = [x for x in (_unpadded(given), given) if x is not None]  # what is put before may be a state
    for x, end, silu in product(inputs, list(ends_of(conv)), (True, False)):
        if end.meta["val"].dtype != x.meta["val"].dtype:
            continue
        found = Found(x, end, weight, bias, silu, behind([end], {x, *parameters}))  # type: ignore[arg-type]
        if not judge.equal(found.region, [end], found.on, f"{RULE} {silu}"):
            continue
        reason = guards.reason(found.region, [end], found.dtypes, restored=True)
        if reason is None:
            return found
        miss = Refused(*reason)
    raise miss


def _sum_accepted(guards: Guards, judge: Judge, x: Node, pads: Sequence[Node]) -> Found | None:
    """The sum of products of what zeros are put before; None for none at all, raises Refused for almost."""
    value, miss = x.meta["val"], None
    for end in reversed(readers_of(pads, readings.IN_SUMS_OVER_TAPS)):
        own = end.meta.get("val")
        if not isinstance(own, Tensor) or own.dtype != value.dtype or written_by(end):
            continue
        if end in pads or not equal_sizes(own.shape, value.shape):
            continue
        region = behind([end], {x})
        for turned, silu in product((False, True), (True, False)):
            parameters = parameters_of(region, (x,), value.shape[2 if turned else 1])
            if parameters is None:
                continue
            found = Found(x, end, *parameters, silu, region, turned)
            limit = unsupported(RULE, *(n.meta["val"] for n in (x, *parameters) if n is not None))
            if limit is not None:
                raise Refused(end, limit)
            if not judge.equal(region, [end], found.on, found.name):
                miss = miss or Refused(end, NONE_AT_ALL)
                continue
            reason = guards.reason(region, [end], found.dtypes, restored=True)
            if reason is None:
                return found
            miss = Refused(*reason)
    if miss is not None:
        raise miss
    return None


def _replace(program: Program, guards: Guards, found: Found) -> None:
    aten, end, x, taps = torch.ops.aten, found.end, found.x, found.weight
    with program.graph.inserting_before(end):
        if taps.meta["val"].dim() == 3:
            taps = call(program, end, aten.squeeze.dim, taps, 1)
        if found.turned:
            x = call(program, end, aten.transpose.int, x, 1, 2)
        target: Any = torch.ops.fxfuse.causal_conv1d.default
        new = call(program, end, target, x, taps, found.bias, None, None, found.silu)
        if found.turned:
            new = call(program, end, aten.transpose.int, new, 1, 2)
        guards.put_in_place(program, end, new, reordered=True)  # the operator may leave channels last
    erase(program, found.region)


def run(program: Program) -> Outcome:
    """Rewrite every causal convolution; one that is depthwise and not causal is reported."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    accepted: list[tuple[Node, Found]] = []
    for conv in program.calls(readings.CONV1D):
        if not is_depthwise(conv):
            continue
        try:
            accepted.append((conv, _accepted(guards, judge, conv)))
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(conv), refusal.node.name, refusal.reason))
    padded: dict[Node, list[Node]] = {}
    for pad in program.calls(*readings.PADDINGS, CAT):
        x = _unpadded(pad)
        zeros = str(pad.target) != CAT or str(pad.args[0][0].target) in readings.ZEROS  # type: ignore[index, union-attr]
        if x is not None and zeros:
            padded.setdefault(x, []).append(pad)
    for x, pads in padded.items():
        try:
            found = _sum_accepted(guards, judge, x, pads)
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(refusal.node), refusal.node.name, refusal.reason))
            continue
        if found is not None:
            accepted.append((found.end, found))
    for _, found in sorted(accepted, key=lambda pair: pair[1].end, reverse=True):
        _replace(program, guards, found)  # from the end of the graph: an earlier result may be a later input
    for like, found in accepted:
        outcome.matches.append(Match(RULE, module_path(like), (), f"{len(found.region)} calls → 1"))
    return outcome
