"""A causal convolution behind a state of last columns, and the write that moves it on, become one call.

Before: columns = cat([state, x], -1); state.copy_(columns[:, :, -S:])
        y = silu(conv1d(columns, w[:, None], bias, groups=C)[:, :, -T:])
After:  y = causal_conv1d_update(x, state, w, bias, apply_silu=True)
"""

from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.causal_conv1d import ends_of, is_depthwise
from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, writers_of
from fxfuse.passes.storage_writes import storage_of
from fxfuse.patterns import ops, readings
from fxfuse.runtime.ops.limits import unsupported

RULE = "causal_conv1d_update"


def _columns(conv: Node, writers: Mapping[int | None, Sequence[Node]]) -> tuple[Node, Node, Node] | None:
    """The state, the new tokens and the write, where a convolution reads them side by side."""
    joined: Any = conv.args[0]
    while isinstance(joined, Node) and (joined.target is getitem or str(joined.target) in readings.CUTS):
        joined = joined.args[0]
    if not isinstance(joined, Node) or str(joined.target) != ops.CAT or joined.args[1:] not in ((2,), (-1,)):
        return None
    parts: Any = joined.args[0]
    if len(parts) != 2 or not all(isinstance(part, Node) for part in parts):
        return None
    state, tokens = parts
    writes = writers.get(storage_of(state), ())
    if state.op != "placeholder" or len(writes) != 1:
        return None
    return state, tokens, writes[0]


def _operator_on(conv: Node, state: Node, tokens: Node, silu: bool) -> Any:
    weight, bias = (*conv.args[1:3], None)[:2]

    def run(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        given = None if bias is None else values[bias]  # type: ignore[index]
        taps = values[weight].squeeze(1)  # type: ignore[index]
        return [torch.ops.fxfuse.causal_conv1d_update(values[tokens], values[state], taps, given, silu)]

    return run


def _accepted(
    guards: Guards, judge: Judge, conv: Node, state: Node, tokens: Node, write: Node
) -> tuple[Node, bool, list[Node]]:
    """The last call that the operator computes, whether with SiLU, and all of them; raises Refused."""
    inputs = [tokens, *(n for n in conv.args[1:3] if isinstance(n, Node))]
    limit = unsupported(RULE, tokens.meta["val"], *(n.meta["val"] for n in (state, *inputs[1:])))
    if limit is not None:
        raise Refused(conv, limit)
    miss = Refused(conv, "run on random values it is no step of a causal convolution")
    ends = [end for end in ends_of(conv) if end.meta["val"].dtype == tokens.meta["val"].dtype]
    for end, silu in ((end, silu) for end in ends for silu in (True, False)):
        region = behind([end, write], set(inputs))
        candidate = _operator_on(conv, state, tokens, silu)
        if not judge.equal(region, [end], candidate, f"{RULE} {silu}", [state]):
            continue
        reason = guards.reason(region, [end], {end.meta["val"].dtype, torch.float32}, [state])
        if storage_of(end) in guards.fixed:
            reason = end, f"{end.name} leaves the graph, or its strides are read"
        early = [u for u in end.users if guards.position[u] < guards.position[region[-1]]]
        if early and reason is None:
            reason = early[0], f"{early[0].name} reads the result before the state is written"
        if reason is None:
            return end, silu, region
        miss = Refused(*reason)
    raise miss


def run(program: Program) -> Outcome:
    """Rewrite every step of a convolution over a state; report those that stay, with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    writers = writers_of(program.graph)
    found: list[tuple[Node, Node, Node, Node, bool, list[Node]]] = []
    for conv in program.calls(readings.CONV1D):
        columns = _columns(conv, writers) if is_depthwise(conv) else None
        if columns is None:
            continue
        try:
            found.append((conv, *columns[:2], *_accepted(guards, judge, conv, *columns)))
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(conv), refusal.node.name, refusal.reason))
    for conv, state, tokens, end, silu, region in found:
        weight, bias = (*conv.args[1:3], None)[:2]
        with program.graph.inserting_after(region[-1]):
            anchor = program.graph.call_function(torch.ops.aten.alias.default, (end,))
        with program.graph.inserting_before(anchor):
            taps = call(program, conv, torch.ops.aten.squeeze.dim, weight, 1)
            target: Any = torch.ops.fxfuse.causal_conv1d_update.default
            new = call(program, conv, target, tokens, state, taps, bias, silu)
        program.graph.erase_node(anchor)
        end.replace_all_uses_with(new)
        erase(program, region)
        outcome.matches.append(Match(RULE, module_path(conv), (), f"{len(region)} calls → 1"))
    return outcome
