"""A sum and the RMSNorm of it become one call with two results.

Before: h = x + residual; y = rms_norm(h, w, eps, zero_centred)
After:  y, h = add_rms_norm(x, residual, w, eps, zero_centred)
"""

import operator
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, call, erase
from fxfuse.passes.storage_writes import equal_sizes

RULE = "add_rms_norm"
NORM = "fxfuse.rms_norm.default"


def is_plain_sum(node: object) -> bool:
    """Two tensors of one shape and dtype, added as they are."""
    if not isinstance(node, Node) or str(node.target) != "aten.add.Tensor" or node.kwargs:
        return False
    values = [n.meta.get("val") for n in node.args if isinstance(n, Node)]
    tensors = [v for v in values if isinstance(v, Tensor)]
    if len(node.args) != 2 or len(tensors) != 2:
        return False
    return tensors[0].dtype == tensors[1].dtype and equal_sizes(tensors[0].shape, tensors[1].shape)


def run(program: Program) -> Outcome:
    """Join every norm with the sum that it reads, unless the sum is read before the norm."""
    outcome, guards = Outcome(), Guards(program)
    found: dict[Node, Node] = {}
    for norm in program.calls(NORM):
        total = norm.args[0]
        if not is_plain_sum(total):
            continue
        assert isinstance(total, Node)
        reason = _reason(guards, found, total, norm)
        if reason is None:
            found[total] = norm
        else:
            outcome.misses.append(Miss(RULE, module_path(norm), reason[0].name, reason[1]))
    for total, norm in found.items():
        x, residual = total.args
        with program.graph.inserting_before(norm):
            target = torch.ops.fxfuse.add_rms_norm.default
            both = call(program, norm, target, x, residual, *norm.args[1:])
            normed, summed = (call(program, norm, operator.getitem, both, i) for i in range(2))
        norm.replace_all_uses_with(normed)
        total.replace_all_uses_with(summed)
        erase(program, [total, norm])
        outcome.matches.append(Match(RULE, module_path(normed), (), "sum and norm → 1"))
    return outcome


def _reason(guards: Guards, found: Mapping[Node, Node], total: Node, norm: Node) -> tuple[Node, str] | None:
    if total in found:
        return total, "its sum is normed twice"
    early = next((user for user in total.users if guards.position[user] < guards.position[norm]), None)
    if early is not None:
        return early, f"the sum is read by {early.name} before the norm"
    return guards.reason([total, norm], [total, norm], {total.meta["val"].dtype})
