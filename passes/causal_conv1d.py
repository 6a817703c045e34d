"""A causal depthwise convolution with its cut and SiLU becomes one call.

Before: y = silu(conv1d(x, w[:, None], bias, padding=K - 1, groups=C)[:, :, :T])
After:  y = causal_conv1d(x, w, bias, None, None, apply_silu=True)
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
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
from fxfuse.passes.regions import Guards, Refused, behind, call, erase
from fxfuse.passes.storage_writes import layout_shows, storage_of
from fxfuse.patterns import readings
from fxfuse.patterns.ops import CAT
from fxfuse.runtime.ops.limits import unsupported

RULE = "causal_conv1d"


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


def _unpadded(x: Node) -> Node | None:
    """What a node puts zeros before, perhaps."""
    source: Any = x.args[0] if str(x.target) in readings.PADDINGS else None
    if str(x.target) == CAT and len(x.args[0]) == 2:  # type: ignore[arg-type]
        source = x.args[0][1]  # type: ignore[index]
    value = source.meta["val"] if isinstance(source, Node) else None
    return source if value is not None and value.dim() == 3 and value.is_floating_point() else None


def _operator_on(conv: Node, x: Node, silu: bool) -> Any:
    _, weight, bias = (*conv.args, None)[:3]

    def run(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        given = None if bias is None else values[bias]  # type: ignore[index]
        taps = values[weight].squeeze(1)  # type: ignore[index]
        return [torch.ops.fxfuse.causal_conv1d(values[x], taps, given, None, None, silu)]

    return run


def _accepted(
    guards: Guards, judge: Judge, conv: Node, fixed: Collection[int | None]
) -> tuple[Node, Node, bool, list[Node]]:
    """Its input, the last call that it computes, whether with SiLU, and all of them; raises Refused."""
    given, *parameters = [n for n in conv.args[:3] if isinstance(n, Node)]
    limit = unsupported(RULE, *(n.meta["val"] for n in (given, *parameters)))
    if limit is not None:
        raise Refused(conv, limit)
    miss = Refused(conv, "run on random values it is no causal convolution")
    inputs = [x for x in (_unpadded(given), given) if x is not None]  # what is put before may be a state
    for x, end, silu in product(inputs, list(ends_of(conv)), (True, False)):
        if end.meta["val"].dtype != x.meta["val"].dtype:
            continue
        region = behind([end], {x, *parameters})
        if not judge.equal(region, [end], _operator_on(conv, x, silu), f"{RULE} {silu}"):
            continue
        reason = guards.reason(region, [end], {end.meta["val"].dtype, torch.float32})
        if storage_of(end) in fixed:
            reason = end, f"{end.name} leaves the graph, or its strides are read"
        if reason is None:
            return x, end, silu, region
        miss = Refused(*reason)
    raise miss


def run(program: Program) -> Outcome:
    """Rewrite every causal convolution; one that is depthwise and not causal is reported."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    fixed = layout_shows(program.graph)
    found: list[tuple[Node, Node, Node, bool, list[Node]]] = []
    for conv in program.calls(readings.CONV1D):
        if not is_depthwise(conv):
            continue
        try:
            found.append((conv, *_accepted(guards, judge, conv, fixed)))
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(conv), refusal.node.name, refusal.reason))
    for conv, x, end, silu, region in found:
        _, weight, bias = (*conv.args, None)[:3]
        with program.graph.inserting_before(end):
            taps = call(program, conv, torch.ops.aten.squeeze.dim, weight, 1)
            target: Any = torch.ops.fxfuse.causal_conv1d.default
            new = call(program, conv, target, x, taps, bias, None, None, silu)
        end.replace_all_uses_with(new)
        erase(program, region)
        outcome.matches.append(Match(RULE, module_path(conv), (), f"{len(region)} calls → 1"))
    return outcome
