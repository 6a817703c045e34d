"""Query and key that are l2-normalised for a delta rule are normalised by it.

Before: delta_rule(q / sqrt(Σ q² + ε), k / sqrt(Σ k² + ε), v, g, β, state, normalise=False)
After:  delta_rule(q, k, v, g, β, state, normalise=True)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, erase, read_by
from fxfuse.passes.storage_writes import equal_sizes
from fxfuse.patterns import idioms, readings
from fxfuse.patterns.matcher import Bound, matches
from fxfuse.runtime.ops.recurrent_gated_delta_rule import L2_EPSILON

RULE = "l2_norm"
FLAG = "normalise"


def _place_of_flag(rule: Node) -> int:
    schema = rule.target._schema  # type: ignore[union-attr]
    return next(i for i, argument in enumerate(schema.arguments) if argument.name == FLAG)


def _norm(node: Node) -> Bound | None:
    for bound in matches(idioms.L2_NORM, node):
        given, got = bound["x"].meta["val"], node.meta["val"]
        if given.dtype == got.dtype and equal_sizes(given.shape, got.shape):
            return bound
    return None


def _accepted(guards: Guards, judge: Judge, rule: Node, bound: Sequence[Bound]) -> list[Node]:
    """The calls that normalise query and key and do nothing else; raises Refused."""
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
        return [x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON) for x in given]

    if not judge.equal(region, normed, norms, RULE):
        raise Refused(rule, "run on random values its query and key are not l2-normalised")
    return region


def run(program: Program) -> Outcome:
    """Take the norms of every delta rule into it; report those that stay, with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    for rule in program.calls(readings.CHUNKED_DELTA_RULE, readings.RECURRENT_DELTA_RULE):
        flag = _place_of_flag(rule)
        bound = [_norm(n) for n in rule.args[:2] if isinstance(n, Node)]
        if rule.args[flag] or len(bound) != 2 or None in bound:
            continue
        try:
            region = _accepted(guards, judge, rule, bound)  # type: ignore[arg-type]
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(rule), refusal.node.name, refusal.reason))
            continue
        args = list(rule.args)
        args[:2] = [each["x"] for each in bound if each is not None]
        args[flag] = True
        rule.args = tuple(args)
        erase(program, region)
        outcome.matches.append(Match(RULE, module_path(rule), (), f"{len(region)} calls → 0"))
    return outcome
