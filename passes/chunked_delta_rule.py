"""The chunked delta rule keeps only its loop as an operator: Inductor fuses what each chunk does by itself.

Before: out, state = chunk_gated_delta_rule(q, k, v, g, β, state)
After:  out, state = delta_rule_chunks(*prepared(pieces(q, k, v, g, β)), state)    both as nodes of the graph

On request, `passes=["default", "chunked_delta_rule"]`: prompts are faster, and compiling takes longer.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.passes.modes import PLAIN, modes
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.patterns.readings import CHUNKED_DELTA_RULE
from fxfuse.runtime.ops import gated_delta_rule

RULE = "chunked_delta_rule"


def _inlined(program: Program, before: Node, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What `function` computes of nodes and constants, as nodes in front of `before`."""
    given = [arg for arg in args if isinstance(arg, Node)]

    def call(*values: Any) -> Any:
        replaced = iter(values)
        return function(*[next(replaced) if isinstance(arg, Node) else arg for arg in args])

    with program.fake_mode, torch.no_grad():
        traced = make_fx(call, pre_dispatch=True)(*[node.meta["val"] for node in given])
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    with program.graph.inserting_before(before):
        result = program.graph.graph_copy(traced.graph, copies)
    stack = before.meta.get("nn_module_stack", {})
    for node in copies.values():
        if node not in given:
            node.meta["nn_module_stack"] = stack
    return result


def _rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, normalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = gated_delta_rule.pieces(q, k, v, g, beta, normalise, gated_delta_rule.CHUNK)
    chunk = gated_delta_rule.prepared(tokens)
    out, final = torch.ops.fxfuse.delta_rule_chunks(*chunk, gated_delta_rule.initial(q, v, state))
    return out[:, :, : v.shape[1]].transpose(1, 2).to(q.dtype).contiguous(), final


def run(program: Program) -> Outcome:
    """Open up every chunked delta rule on a CPU that computes no gradients."""
    outcome = Outcome()
    mode = modes(program.graph, program.grad_enabled)
    for rule in program.calls(CHUNKED_DELTA_RULE):
        if rule.args[0].meta["val"].device.type != "cpu" or mode[rule] != PLAIN:  # type: ignore[union-attr]
            continue
        parts = _inlined(program, rule, _rule, rule.args)
        for user in list(rule.users):
            assert user.target is getitem
            user.replace_all_uses_with(parts[user.args[1]])
            program.graph.erase_node(user)
        where = module_path(rule) or rule.name
        program.graph.erase_node(rule)
        outcome.matches.append(Match(RULE, where, (), "1 operator → its loop alone"))
    return outcome
