"""Attention of one query is two reductions, which Inductor vectorises and runs at the speed of memory.

Before: y = scaled_dot_product_attention(q, k, v, mask, scale=s)    q: [B, H, 1, D], k, v: [B, Hk, T, D]
After:  p = softmax((q.float() · k.float()).sum(-1) · s + mask)     over T, in fp32
        y = (p · v.float()).sum(-2)                                 in q's dtype again

The library's kernel is written for many queries: for one it took 2 to 12 times as long (docs/performance.md).
"""

import math
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes import regions
from fxfuse.passes.modes import PLAIN, modes
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.patterns.readings import SDPA

RULE = "one_query_attention"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def arguments(attention: Node) -> tuple[Any, ...]:
    """Query, key, value, mask, dropout and whether causal, with the defaults of those that are not given."""
    return (*attention.args, *(None, 0.0, False)[len(attention.args) - 3 :])


def has_one_query(attention: Node) -> bool:
    query, key, value, mask, dropout, causal = arguments(attention)
    q, k, v = (node.meta["val"] for node in (query, key, value))
    # `causal` counts positions from the first key on, which is hardly meant here
    if causal or dropout or not set(attention.kwargs) <= {"scale", "enable_gqa"}:
        return False
    if q.device.type != "cpu" or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return False
    if not q.dim() == k.dim() == v.dim() == 4 or not statically_known_true(q.shape[2] == 1):
        return False
    if any(statically_known_true(size == 0) for size in (*q.shape, *k.shape, *v.shape)):
        return False
    width = q.shape[3] if attention.kwargs.get("scale") is None else 1
    sizes = (q.shape[1], k.shape[1], v.shape[1], width)
    if not all(isinstance(size, int) for size in sizes) or k.shape[1] != v.shape[1]:
        return False
    if q.shape[1] != k.shape[1] and not attention.kwargs.get("enable_gqa"):
        return False
    if mask is None:
        return True
    m = mask.meta["val"]
    return 2 <= m.dim() <= 4 and bool(statically_known_true(m.shape[-2] == 1))


def _replace(program: Program, attention: Node) -> None:
    aten, graph = torch.ops.aten, program.graph
    query, key, value, mask, *_ = arguments(attention)
    q, k = query.meta["val"], key.meta["val"]
    scale = attention.kwargs.get("scale")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale

    call = partial(regions.call, program, attention)

    def wide(node: Node) -> Node:
        return node if q.dtype == torch.float32 else call(aten.to.dtype, node, torch.float32)

    def for_every_head(node: Node) -> Node:
        groups = q.shape[1] // k.shape[1]
        return node if groups == 1 else call(aten.repeat_interleave.self_int, node, groups, 1)

    with graph.inserting_before(attention):
        products = call(aten.mul.Tensor, wide(query), wide(for_every_head(key)))
        scores = call(aten.sum.dim_IntList, products, [-1])
        if scale != 1:
            scores = call(aten.mul.Tensor, scores, scale)
        if mask is not None:
            row = call(aten.select.int, mask, -2, 0)
            if mask.meta["val"].dtype == torch.bool:
                scores = call(aten.where.ScalarOther, row, scores, -math.inf)
            else:
                scores = call(aten.add.Tensor, scores, row)
        shares = call(aten.unsqueeze.default, call(aten._safe_softmax.default, scores, -1), -1)
        y = call(aten.sum.dim_IntList, call(aten.mul.Tensor, shares, wide(for_every_head(value))), [-2], True)
        if q.dtype != torch.float32:
            y = call(aten.to.dtype, y, q.dtype)
    attention.replace_all_uses_with(y)
    graph.erase_node(attention)


def run(program: Program) -> Outcome:
    """Rewrite the attention of every single query on a CPU; that of more queries is no candidate."""
    outcome = Outcome()
    mode = modes(program.graph, program.grad_enabled)
    for attention in program.calls(SDPA):
        if mode[attention] != PLAIN or not has_one_query(attention):
            continue
        where = module_path(attention) or attention.name
        _replace(program, attention)
        outcome.matches.append(Match(RULE, where, (), "attention of 1 query → 2 reductions"))
    return outcome
