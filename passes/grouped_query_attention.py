"""Attention of one token over keys and values that are repeated for every query head reads them as they lie.

Before: y = sdpa(q, repeat(k, r), repeat(v, r), mask)            q: [B, r·h, 1, D], k: [B, h, L, D]
After:  y = reshape(sdpa(reshape(q, [B, h, r, D]), k, v, mask), [B, r·h, 1, D])

The query heads of a group become rows of one head: no kernel of attention has to know about groups, and the
cache is read once.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase
from fxfuse.patterns import readings

RULE = "grouped_query_attention"


def _sources(node: Node, heads: int) -> Iterator[tuple[Node, int]]:
    """Tensors with fewer heads that a tensor with `heads` heads may repeat, and how often."""
    while str(node.target) in readings.REPEATS and isinstance(node.args[0], Node):
        node = node.args[0]
        shape = node.meta["val"].shape
        if len(shape) == 4 and isinstance(shape[1], int) and shape[1] < heads and heads % shape[1] == 0:
            yield node, heads // shape[1]


def _repeated(
    guards: Guards, judge: Judge, node: Node, attention: Node
) -> tuple[Node, int, list[Node]] | None:
    """What a key or value repeats, how often, and by which calls."""
    heads = node.meta["val"].shape[1]
    if not isinstance(heads, int):
        return None
    for source, ratio in _sources(node, heads):
        region = behind([node], {source})

        def repeat(values: Mapping[Node, Any], source: Node = source, ratio: int = ratio) -> Sequence[Tensor]:
            return [values[source].repeat_interleave(ratio, dim=1)]

        dtype = node.meta["val"].dtype
        if guards.reason(region, [node], {dtype}, at=attention) is None and judge.equal(
            region, [node], repeat, f"repeat {ratio}"
        ):
            return source, ratio, region
    return None


def mask_is_by_row(attention: Node) -> str | None:
    """A mask that differs between query heads or has rows cannot serve the heads as rows."""
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    if not isinstance(mask, Node):
        return None
    shape = mask.meta["val"].shape
    if len(shape) < 2 or not all(statically_known_true(size == 1) for size in shape[-3:-1]):
        return f"its mask is {list(shape)}: one for each head or row"
    return None


def is_causal(attention: Node) -> str | None:
    flag = attention.args[5] if len(attention.args) > 5 else attention.kwargs.get("is_causal", False)
    return "it is causal" if flag else None


def run(program: Program) -> Outcome:
    """Rewrite every attention of one token over repeated keys; report what stays with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    found: list[tuple[Node, Node, Node, int, list[Node]]] = []
    for attention in program.calls(readings.SDPA):
        query, key, value = attention.args[:3]
        shape = query.meta["val"].shape  # type: ignore[union-attr]
        if len(shape) != 4 or not statically_known_true(shape[2] == 1):
            continue
        try:
            keys, values = (_repeated(guards, judge, n, attention) for n in (key, value))  # type: ignore[arg-type]
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(attention), refusal.node.name, refusal.reason))
            continue
        if keys is None or values is None or keys[1] != values[1]:
            continue
        reason = mask_is_by_row(attention) or is_causal(attention)
        if reason is not None:
            outcome.misses.append(Miss(RULE, module_path(attention), attention.name, reason))
            continue
        found.append((attention, keys[0], values[0], keys[1], [*keys[2], *values[2]]))
    for attention, key, value, ratio, region in found:
        _replace(program, attention, key, value, ratio)
        erase(program, region)
        detail = f"read {ratio} times → once"
        outcome.matches.append(Match(RULE, module_path(attention), (), detail))
    return outcome


def _replace(program: Program, attention: Node, key: Node, value: Node, ratio: int) -> None:
    reshape: Any = torch.ops.aten.reshape.default
    query: Node = attention.args[0]  # type: ignore[assignment]
    heads, dim = query.meta["val"].shape[1::2]
    with program.graph.inserting_before(attention):
        rows = call(program, attention, reshape, query, [-1, heads // ratio, ratio, dim])
    attention.args = (rows, key, value, *attention.args[3:])
    attention.kwargs = {k: v for k, v in attention.kwargs.items() if k != "enable_gqa"}
    width = attention.meta.pop("val").shape[-1]
    with program.graph.inserting_after(attention):
        apart = call(program, attention, reshape, attention, [-1, heads, 1, width])
    attention.replace_all_uses_with(apart, delete_user_cb=lambda user: user is not apart)
