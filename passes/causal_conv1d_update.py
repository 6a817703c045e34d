"""A causal convolution behind a state of last columns, and the write that moves it on, become one call.

Before: columns = cat([state, x], -1); state.copy_(columns[:, :, -S:])
        y = silu(conv1d(columns, w[:, None], bias, groups=C)[:, :, -T:])
After:  y = causal_conv1d_update(x, state, w, bias, apply_silu=True)

The convolution may be a product and a sum over the taps, and the state be rolled and written at its
end. Which inputs are read, and of what sizes, says where to look; running both says whether it is so.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.causal_conv1d import is_depthwise, parameters_of, readers_of
from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, read_by, writers_of
from fxfuse.passes.storage_writes import equal_sizes, storage_of, written_by
from fxfuse.patterns import ops, readings
from fxfuse.runtime.ops.limits import unsupported

RULE = "causal_conv1d_update"
COPY = "aten.copy_.default"
_STEPS = readings.IN_SUMS_OVER_TAPS | {COPY, readings.CONV1D}


@dataclass(frozen=True)
class Step:
    """A written state [B, C, S], the tokens [B, C, T] or [B, C] behind it, and what reads the state."""

    state: Node
    tokens: Node
    writes: tuple[Node, ...]
    readers: tuple[Node, ...]

    @property
    def conv(self) -> Node | None:
        return next((n for n in self.readers if str(n.target) == readings.CONV1D and is_depthwise(n)), None)

    def ends(self) -> Iterator[Node]:
        """What may be the result, the farthest first."""
        wanted = self.tokens.meta["val"]
        for node in reversed(self.readers):
            value = node.meta.get("val")
            if not isinstance(value, Tensor) or value.dtype != wanted.dtype or written_by(node):
                continue
            if equal_sizes(value.shape, self.shape) or (
                statically_known_true(self.shape[2] == 1) and equal_sizes(value.shape, self.shape[:2])
            ):
                yield node

    @property
    def shape(self) -> tuple[Any, Any, Any]:
        return (*self.tokens.meta["val"].shape, 1)[:3]


@dataclass(frozen=True)
class Call:
    """The operator's parameters, and the calls up to `end` that it stands for."""

    step: Step
    end: Node
    weight: Node
    bias: Node | None
    silu: bool
    region: list[Node]

    def on(self, values: Mapping[Node, Any]) -> Sequence[Tensor]:
        """The operator's result."""
        bias = None if self.bias is None else values[self.bias]
        taps, x = values[self.weight], values[self.step.tokens]
        taps = taps.squeeze(1) if taps.dim() == 3 else taps
        x = x.unsqueeze(2) if x.dim() == 2 else x
        y = torch.ops.fxfuse.causal_conv1d_update(x, values[self.step.state], taps, bias, self.silu)
        return [y.squeeze(2) if self.end.meta["val"].dim() == 2 else y]

    @property
    def name(self) -> str:
        inputs = read_by(self.region)
        places = [n and inputs.index(n) for n in (self.step.tokens, self.weight, self.bias)]
        return f"{RULE} {places} {self.silu}"


def steps(program: Program) -> Iterator[Step]:
    """Every input of three dimensions that copies write, and that is read beside new tokens."""
    writers = writers_of(program.graph)
    for state in program.graph.find_nodes(op="placeholder"):
        value, writes = state.meta.get("val"), writers.get(storage_of(state), ())
        if not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
            continue
        if not writes or any(str(write.target) != COPY for write in writes):
            continue
        readers = readers_of([state], _STEPS)
        tokens = _tokens(state, writes, readers)
        if tokens is not None:
            yield Step(state, tokens, tuple(writes), tuple(n for n in readers if n is not state))


def _tokens(state: Node, writes: Sequence[Node], readers: Collection[Node]) -> Node | None:
    """What stands behind the state in a cat, or is written into a part of it."""
    shape = state.meta["val"].shape
    for node in readers:
        found: Any = None
        if str(node.target) == ops.CAT:
            parts: Any = node.args[0]
            joined = len(parts) == 2 and parts[0] in readers and node.args[1:] in ((2,), (-1,))
            found = parts[1] if joined else None
        elif node in writes and written_by(node) != [state]:
            found = node.args[1]
        value = found.meta.get("val") if isinstance(found, Node) and found not in readers else None
        if isinstance(value, Tensor) and value.dim() in (2, 3) and equal_sizes(value.shape[:2], shape[:2]):
            return found  # type: ignore[no-any-return]
    return None


def _accepted(guards: Guards, judge: Judge, step: Step) -> Call | None:
    """The call that computes the step, None for what is none at all; raises Refused for what almost is."""
    conv = step.conv
    given = [] if conv is None else [n for n in conv.args[1:3] if isinstance(n, Node)]
    miss = None if conv is None else Refused(conv, "its result has not the sizes and the dtype of the tokens")
    for end in step.ends():
        region = behind([end, *step.writes], {step.tokens, *given})
        parameters = parameters_of(region, (step.state, step.tokens), step.shape[1])
        if parameters is None or not {step.state, step.tokens} <= set(read_by(region)):
            continue
        values = [n.meta["val"] for n in (step.tokens, step.state, *parameters) if n is not None]
        limit = unsupported(RULE, *values)
        if limit is not None:
            raise Refused(conv or end, limit)
        calls = [Call(step, end, *parameters, silu, region) for silu in (True, False)]
        same = (each for each in calls if judge.equal(region, [end], each.on, each.name, [step.state]))
        found = next(same, None)
        if found is None:
            miss = miss or Refused(end, "run on random values it is no step of a causal convolution")
            continue
        reason = _reason(guards, found)
        if reason is None:
            return found
        miss = Refused(*reason)
    if miss is not None:
        raise miss
    return None


def _reason(guards: Guards, found: Call) -> tuple[Node, str] | None:
    end, region = found.end, found.region
    dtypes = {end.meta["val"].dtype, torch.float32}
    reason = guards.reason(region, [end], dtypes, [found.step.state], restored=True)
    if reason is not None:
        return reason
    early = [u for u in end.users if guards.position[u] < guards.position[region[-1]]]
    return (early[0], f"{early[0].name} reads the result before the state is written") if early else None


def _replace(program: Program, guards: Guards, found: Call) -> None:
    aten, end, tokens, taps = torch.ops.aten, found.end, found.step.tokens, found.weight
    with program.graph.inserting_after(found.region[-1]):
        anchor = program.graph.call_function(aten.alias.default, (end,))
    with program.graph.inserting_before(anchor):
        if taps.meta["val"].dim() == 3:
            taps = call(program, end, aten.squeeze.dim, taps, 1)
        if tokens.meta["val"].dim() == 2:
            tokens = call(program, end, aten.unsqueeze.default, tokens, 2)
        target: Any = torch.ops.fxfuse.causal_conv1d_update.default
        new = call(program, end, target, tokens, found.step.state, taps, found.bias, found.silu)
        if end.meta["val"].dim() == 2:
            new = call(program, end, aten.squeeze.dim, new, 2)
        guards.put_in_place(program, end, new, reordered=True)
    program.graph.erase_node(anchor)
    erase(program, found.region)


def run(program: Program) -> Outcome:
    """Rewrite every step of a convolution over a state; report those that stay, with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    accepted: list[Call] = []
    for step in steps(program):
        try:
            found = _accepted(guards, judge, step)
        except Refused as refusal:
            where = module_path(step.conv or refusal.node)
            outcome.misses.append(Miss(RULE, where, refusal.node.name, refusal.reason))
            continue
        if found is not None:
            accepted.append(found)
    for found in accepted:
        where, detail = module_path(found.step.conv or found.end), f"{len(found.region)} calls → 1"
        outcome.matches.append(Match(RULE, where, (), detail))
    for found in sorted(accepted, key=lambda each: each.region[-1], reverse=True):
        _replace(program, guards, found)  # from the end of the graph: an earlier result may be a later input
    return outcome
