"""The two gates that a gated delta rule reads become one call.

Before: g = -exp(A_log) * softplus(a + dt_bias); β = sigmoid(b); delta_rule(q, k, v, g, β, …)
After:  g, β = gdn_gates(a, b, A_log, dt_bias)
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase
from fxfuse.passes.storage_writes import equal_sizes
from fxfuse.patterns import idioms, ops, readings
from fxfuse.patterns.matcher import Bound, matches
from fxfuse.runtime.ops.limits import unsupported

RULE = "gdn_gates"
ARGUMENTS = ("a", "b", "A_log", "dt_bias")


def _of_token(gate: Node) -> Node:
    """The gate [B, HV] of one token, before it was given a dimension of time; else the gate as it is."""
    given = str(gate.target) == ops.UNSQUEEZE and gate.args[1] == 1 and gate.meta["val"].dim() == 3
    return gate.args[0] if given else gate  # type: ignore[return-value]


def _gates(decay: Node, rate: Node) -> Bound | None:
    signs = (idioms.LOG_DECAY, -idioms.LOG_DECAY)  # −softplus(x) = log σ(−x) has one of its own
    for first in (bound for formula in signs for bound in matches(formula, _of_token(decay))):
        for second in matches(idioms.RATE, _of_token(rate)):
            if equal_sizes(first["a"].meta["val"].shape, second["b"].meta["val"].shape):
                return {**first, **second}
    return None


def _operator_on(bound: Bound, outputs: Sequence[Node]) -> Any:
    def run(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        gates = torch.ops.fxfuse.gdn_gates(*(values[bound[name]] for name in ARGUMENTS))
        return [y if _of_token(n) is n else y.unsqueeze(1) for n, y in zip(outputs, gates, strict=True)]

    return run


def _accepted(guards: Guards, judge: Judge, rule: Node, decay: Node, rate: Node, bound: Bound) -> list[Node]:
    """The calls that compute the gates and nothing else; raises Refused."""
    limit = unsupported(RULE, *(bound[name].meta["val"] for name in ARGUMENTS))
    if limit is not None:
        raise Refused(decay, limit)
    region = behind([decay, rate], set(bound.values()))
    dtypes = {bound["b"].meta["val"].dtype, torch.float32}
    reason = guards.reason(region, [decay, rate], dtypes, at=rule)
    if reason is not None:
        raise Refused(*reason)
    shared = next((u for n in (decay, rate) for u in n.users if u is not rule), None)
    if shared is not None:
        raise Refused(shared, f"a gate is used by {shared.name}, too")
    along = (bound["a"], bound["b"])
    if not judge.equal(region, [decay, rate], _operator_on(bound, [decay, rate]), RULE, along=along):
        raise Refused(decay, "run on random values they are no gates of the delta rule")
    return region


def run(program: Program) -> Outcome:
    """Rewrite the gates of every delta rule; report those that stay, with the node and the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    found: list[tuple[Node, Bound, list[Node]]] = []
    for rule in program.calls(readings.CHUNKED_DELTA_RULE, readings.RECURRENT_DELTA_RULE):
        decay, rate = rule.args[3:5]
        if not isinstance(decay, Node) or not isinstance(rate, Node):
            continue
        bound = _gates(decay, rate)
        if bound is None:
            continue
        try:
            found.append((rule, bound, _accepted(guards, judge, rule, decay, rate, bound)))
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(rule), refusal.node.name, refusal.reason))
    for rule, bound, region in found:
        with program.graph.inserting_before(rule):
            target: Any = torch.ops.fxfuse.gdn_gates.default
            gates = call(program, rule, target, *(bound[name] for name in ARGUMENTS), program.round_beta)
            new = [call(program, rule, operator.getitem, gates, i) for i in range(2)]
            read: Any = rule.args[3:5]
            for i, gate in enumerate(read):
                if _of_token(gate) is not gate:
                    new[i] = call(program, rule, torch.ops.aten.unsqueeze.default, new[i], 1)
        rule.args = (*rule.args[:3], *new, *rule.args[5:])
        erase(program, region)
        outcome.matches.append(Match(RULE, module_path(rule), (), f"{len(region)} calls → 1"))
    return outcome
