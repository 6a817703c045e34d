"""Query and key that are l2-normalised for a delta rule are normalised by it.

Before: delta_rule(q / sqrt(Σ q² + ε), k / sqrt(Σ k² + ε), v, g, β, state, normalise=False)
After:  delta_rule(q, k, v, g, β, state, normalise=True)

Heads that are repeated once they are normalised are repeated before.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.grouped_delta_rule import repeats
from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, read_by
from fxfuse.passes.storage_writes import equal_sizes
from fxfuse.patterns import idioms, readings
from fxfuse.patterns.matcher import Bound, matches
from fxfuse.runtime.ops.recurrent_gated_delta_rule import L2_EPSILON

RULE = "l2_norm"
FLAG = "normalise"


def _place_of_flag(rule: Node) -> int:
    schema = rule.target._schema  # type: ignore[union-attr]
    return next(i for i, argument in enumerate(schema.arguments) if argument.name == FLAG)


def _norm(node: Node) -> tuple[Bound, int] | None:
    """The norm that a query or key is, and how often its heads are repeated after it."""
    for norm, times in [(node, 1), *(repeats(node) if node.meta["val"].dim() == 4 else ())]:
        for bound in matches(idioms.L2_NORM, norm):
            given, got = bound["x"].meta["val"], norm.meta["val"]
            if given.dtype == got.dtype == node.meta["val"].dtype and equal_sizes(given.shape, got.shape):
                return bound, times
    return None


def _accepted(
    guards: Guards, judge: Judge, rule: Node, bound: Sequence[Bound], times: Sequence[int]
) -> list[Node]:
    """The calls that normalise query and key, repeat their heads and do nothing else; raises Refused."""
    normed: list[Node] = list(rule.args[:2])  # type: ignore[arg-type]
    sources = [each["x"] for each in bound]
    for node, each in zip(normed, bound, strict=True):
        if not math.isclose(each["eps"], L2_EPSILON, rel_tol=1e-6):
            raise Refused(node, f"its epsilon is {each['eps']}, the rule's own is {L2_EPSILON}")
        if guards.writes.version(each["x"], node) != guards.writes.version(each["x"], rule):
            raise Refused(node, f"{each['x'].name} is written before the rule reads it")
    region = behind(normed, set(sources))
    read = read_by(region)
    unread = next((source for source in sources if source not in read), None)
    if unread is not None:
        raise Refused(rule, f"{unread.name} is read by nothing but what the other is computed from")
    reason = guards.reason(region, normed, {normed[0].meta["val"].dtype, torch.float32})
    if reason is not None:
        raise Refused(*reason)

    def norms(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        given = (values[source] for source in sources)
        each = [x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON) for x in given]
        return [x if n == 1 else x.repeat_interleave(n, dim=2) for x, n in zip(each, times, strict=True)]

    if not judge.equal(region, normed, norms, f"{RULE} {times}"):
        raise Refused(rule, "run on random values its query and key are not l2-normalised")
    return region


def run(program: Program) -> Outcome:
    """Take the norms of every delta rule into it; report those that stay, with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    repeat_heads: Any = torch.ops.aten.repeat_interleave.self_int
    for rule in program.calls(readings.CHUNKED_DELTA_RULE, readings.RECURRENT_DELTA_RULE):
        flag = _place_of_flag(rule)
        found = [_norm(n) for n in rule.args[:2] if isinstance(n, Node)]
        norms = [norm for norm in found if norm is not None]
        if rule.args[flag] or len(norms) != 2:
            continue
        bound, times = zip(*norms, strict=True)
        try:
            region = _accepted(guards, judge, rule, bound, times)
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(rule), refusal.node.name, refusal.reason))
            continue
        args = list(rule.args)
        with program.graph.inserting_before(rule):
            args[:2] = [
                each["x"] if n == 1 else call(program, rule, repeat_heads, each["x"], n, 2)
                for each, n in norms
            ]
        args[flag] = True
        rule.args = tuple(args)
        erase(program, region)
        outcome.matches.append(Match(RULE, module_path(rule), (), f"{len(region)} calls → 0"))
    return outcome
