"""The delta rule over whole sequences reads the key head of each group: queries and keys are not repeated.

Before: out, state = chunk_gated_delta_rule(repeat(q, r), repeat(k, r), v, g, β, state)   q, k: [B, T, Hk, dk]
After:  out, state = chunk_gated_delta_rule(q, k, v, g, β, state)                         v: [B, T, r·Hk, dv]
"""

from torch.fx import Node

from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, erase
from fxfuse.patterns import readings

RULE = "grouped_delta_rule"


def _repeat(node: object) -> tuple[Node, int] | None:
    """What a query or key repeats for each value head of its group, and how often."""
    if not isinstance(node, Node) or str(node.target) != readings.REPEATED_HEADS:
        return None
    source, times, dim = (*node.args, node.kwargs.get("dim"))[:3]
    if not isinstance(source, Node) or not isinstance(times, int) or dim not in (2, -2):
        return None
    return source, times


def run(program: Program) -> Outcome:
    """Let every chunked delta rule read its queries and keys as they were before they were repeated."""
    outcome, guards = Outcome(), Guards(program)
    repeats: list[Node] = []
    for rule in program.calls(readings.CHUNKED_DELTA_RULE):
        query, key = (_repeat(arg) for arg in rule.args[:2])
        if query is None or key is None or query[1] != key[1]:
            continue
        given: list[Node] = [arg for arg in rule.args[:2] if isinstance(arg, Node)]
        dtypes = {node.meta["val"].dtype for node in given}
        region = sorted({*given, rule}, key=guards.position.__getitem__)
        reason = guards.reason(region, [rule, *given], dtypes)
        if reason is not None:
            outcome.misses.append(Miss(RULE, module_path(rule), reason[0].name, reason[1]))
            continue
        rule.args = (query[0], key[0], *rule.args[2:])
        repeats += given
        outcome.matches.append(Match(RULE, module_path(rule), (), f"heads repeated {query[1]} times → once"))
    erase(program, repeats)
    return outcome
