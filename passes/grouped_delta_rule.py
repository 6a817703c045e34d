"""The delta rule over whole sequences reads the key head of each group: queries and keys are not repeated.

Before: out, state = chunk_gated_delta_rule(repeat(q, r), repeat(k, r), v, g, β, state)   q, k: [B, T, Hk, dk]
After:  out, state = chunk_gated_delta_rule(q, k, v, g, β, state)                         v: [B, T, r·Hk, dv]
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, erase
from fxfuse.patterns import ops, readings

RULE = "grouped_delta_rule"


def repeats(node: Node) -> Iterator[tuple[Node, int]]:
    """What a query or key [B, T, H, d] may repeat for each value head of its group, and how often."""
    spelled = _repeat_by_name(node)
    if spelled is not None:
        yield spelled
    heads, source = node.meta["val"].shape[2], node
    while str(source.target) in readings.REPEATS | ops.LAYOUT and isinstance(source.args[0], Node):
        source = source.args[0]
        few = source.meta["val"].shape[2] if source.meta["val"].dim() == 4 else heads
        if isinstance(few, int) and isinstance(heads, int) and 0 < few < heads and heads % few == 0:
            yield source, heads // few


def _repeat_by_name(node: Node) -> tuple[Node, int] | None:
    if str(node.target) != readings.REPEATED_HEADS:
        return None
    given, times, dim = (*node.args, node.kwargs.get("dim"))[:3]
    alike = isinstance(given, Node) and isinstance(times, int) and dim in (2, -2)
    return (given, times) if alike else None  # type: ignore[return-value]


def _repeat(judge: Judge, node: object) -> tuple[Node, int, list[Node]] | None:
    """What a query or key repeats for each value head of its group, how often, and by which calls."""
    if not isinstance(node, Node) or node.meta["val"].dim() != 4:
        return None
    spelled = _repeat_by_name(node)
    if spelled is not None:
        return (*spelled, [node])
    for source, times in repeats(node):
        region = behind([node], {source})

        def repeated(values: Mapping[Node, Any], read: Node = source, times: int = times) -> Sequence[Tensor]:
            return [values[read].repeat_interleave(times, dim=2)]

        if judge.equal(region, [node], repeated, f"repeat {times}"):
            return source, times, region
    return None


def run(program: Program) -> Outcome:
    """Let every chunked delta rule read its queries and keys as they were before they were repeated."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    repeats: list[Node] = []
    for rule in program.calls(readings.CHUNKED_DELTA_RULE):
        try:
            query, key = (_repeat(judge, arg) for arg in rule.args[:2])
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(rule), refusal.node.name, refusal.reason))
            continue
        if query is None or key is None or query[1] != key[1]:
            continue
        given: list[Node] = [arg for arg in rule.args[:2] if isinstance(arg, Node)]
        dtypes = {node.meta["val"].dtype for node in given}
        region = sorted({*query[2], *key[2], rule}, key=guards.position.__getitem__)
        reason = guards.reason(region, [rule, *given], dtypes)
        if reason is not None:
            outcome.misses.append(Miss(RULE, module_path(rule), reason[0].name, reason[1]))
            continue
        rule.args = (query[0], key[0], *rule.args[2:])
        repeats += [n for n in region if n is not rule]
        outcome.matches.append(Match(RULE, module_path(rule), (), f"heads repeated {query[1]} times → once"))
    erase(program, repeats)
    return outcome
