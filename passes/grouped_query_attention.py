"""Attention of one token over keys and values that are repeated for every query head reads them as they lie.

Before: y = sdpa(q, repeat(k, r), repeat(v, r), mask)            q: [B, r·h, 1, D], k: [B, h, L, D]
        y = softmax(q @ repeat(k, r).mT * scale + mask) @ repeat(v, r)
After:  y = reshape(sdpa(reshape(q, [B, h, r, D]), k, v, mask), [B, r·h, 1, D])
        p = softmax(rows(q @ k.mT) * scale + mask); y = rows(p @ v)

The query heads of a group become rows of one head: no kernel of attention has to know about groups, and the
cache is read once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.judge import Judge
from fxfuse.passes.linear_spellings import turned
from fxfuse.passes.modes import PLAIN
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase
from fxfuse.passes.storage_writes import equal_sizes, is_idle_view
from fxfuse.patterns import ops, readings

RULE = "grouped_query_attention"


@dataclass(frozen=True)
class Shared:
    """What a key or value repeats, how often, and by which calls."""

    source: Node
    ratio: int
    region: list[Node]


def _sources(node: Node, heads: int) -> Iterator[tuple[Node, int]]:
    """Tensors with fewer heads that a tensor with `heads` heads may repeat, and how often."""
    while (str(node.target) in readings.REPEATS or is_idle_view(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
        shape = node.meta["val"].shape
        if len(shape) == 4 and isinstance(shape[1], int) and 0 < shape[1] < heads and heads % shape[1] == 0:
            yield node, heads // shape[1]


def _repeated(guards: Guards, judge: Judge, node: Node, reader: Node) -> Shared | None:
    """What a key or value repeats, None for nothing; raises Refused for what a guard says."""
    heads = node.meta["val"].shape[1]
    if not isinstance(heads, int):
        return None
    refused: tuple[Node, str] | None = None
    for source, ratio in _sources(node, heads):
        region = behind([node], {source})

        def repeat(values: Mapping[Node, Any], source: Node = source, ratio: int = ratio) -> Sequence[Tensor]:
            return [values[source].repeat_interleave(ratio, dim=1)]

        if not judge.equal(region, [node], repeat, f"repeat {ratio}"):
            continue
        reason = guards.reason(region, [node], {node.meta["val"].dtype}, at=reader, kept=True)
        if reason is None:
            return Shared(source, ratio, region)
        refused = refused or reason
    if refused is not None:
        raise Refused(*refused)
    return None


def _shared(guards: Guards, judge: Judge, node: Node, attention: Node) -> Shared | None:
    """The same, where attention itself repeats a key or value, too."""
    heads, own = (n.meta["val"].shape[1] for n in (attention.args[0], node))  # type: ignore[union-attr]
    if _are_one_number([heads, own]):
        return _repeated(guards, judge, node, attention)
    shares = attention.kwargs.get("enable_gqa") and all(type(n) is int for n in (heads, own))
    if not shares or guards.modes[attention] != PLAIN:
        return None
    found = _repeated(guards, judge, node, attention)
    found = found or Shared(node, 1, [])
    return Shared(found.source, found.ratio * (heads // own), found.region)


def _are_one_number(sizes: Sequence[Any]) -> bool:
    return all(type(size) is int and size == sizes[0] for size in sizes)


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


def drops_out(attention: Node) -> str | None:
    share = attention.args[4] if len(attention.args) > 4 else attention.kwargs.get("dropout_p", 0.0)
    return "its dropout would draw other numbers" if share else None


def _is_one_token(query: Any) -> bool:
    value = query.meta.get("val") if isinstance(query, Node) else None
    return isinstance(value, Tensor) and value.dim() == 4 and statically_known_true(value.shape[2] == 1)


def run(program: Program) -> Outcome:
    """Rewrite every attention of one token over repeated keys; report what stays with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    found: list[tuple[Node, Shared, Shared]] = []
    for attention in program.calls(readings.SDPA):
        query, key, value = attention.args[:3]
        if not _is_one_token(query):
            continue
        try:
            keys, values = (_shared(guards, judge, n, attention) for n in (key, value))  # type: ignore[arg-type]
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(attention), refusal.node.name, refusal.reason))
            continue
        if keys is None or values is None or keys.ratio != values.ratio:
            continue
        reason = mask_is_by_row(attention) or is_causal(attention) or drops_out(attention)
        if reason is not None:
            outcome.misses.append(Miss(RULE, module_path(attention), attention.name, reason))
            continue
        found.append((attention, keys, values))
    products = _products(program, guards, judge, outcome)
    for attention, keys, values in found:
        _replace(program, attention, keys.source, values.source, keys.ratio)
        erase(program, [*keys.region, *values.region])
        outcome.matches.append(Match(RULE, module_path(attention), (), f"read {keys.ratio} times → once"))
    for product in products:  # of scores and of values, counted once
        if not _reads_scores_of(product, products):
            detail = f"read {products[product].ratio} times → once"
            outcome.matches.append(Match(RULE, module_path(product), (), detail))
    for product, shared in products.items():
        _replace_product(program, product, shared)
    return outcome


def _reads_scores_of(product: Node, products: Collection[Node]) -> bool:
    """Whether a product's row is what was made, element by element, of another one's result."""
    waiting: list[Any] = [product.args[0]]
    sizes, seen = waiting[0].meta["val"].shape, set()
    while waiting:
        node = waiting.pop()
        if node in products:
            return True
        value = node.meta.get("val")
        if node not in seen and isinstance(value, Tensor) and equal_sizes(value.shape, sizes):
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _products(program: Program, guards: Guards, judge: Judge, outcome: Outcome) -> dict[Node, Shared]:
    """Matrix products of one row for each head with keys or values that are repeated."""
    found: dict[Node, Shared] = {}
    for product in program.calls(ops.MATMUL):
        row, other = product.args[:2]
        value = other.meta.get("val") if isinstance(other, Node) else None
        if not _is_one_token(row) or not isinstance(value, Tensor) or value.dim() != 4:
            continue
        heads = [row.meta["val"].shape[1], value.shape[1]]  # type: ignore[union-attr]
        if guards.modes[product] != PLAIN or not _are_one_number(heads):
            continue
        try:
            shared = _repeated(guards, judge, turned(other) or other, product)  # type: ignore[arg-type]
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, module_path(product), refusal.node.name, refusal.reason))
            continue
        if shared is not None:
            found[product] = shared
    return found


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


def _replace_product(program: Program, product: Node, shared: Shared) -> None:
    aten, ratio = torch.ops.aten, shared.ratio
    row, other = product.args[:2]
    heads = row.meta["val"].shape[1]  # type: ignore[union-attr]
    source, plain = shared.source, turned(other)
    with program.graph.inserting_before(product):
        if plain is not None:
            source = call(program, product, aten.transpose.int, source, 2, 3)
        rows = call(program, product, aten.squeeze.dim, row, 2)
        rows = call(program, product, aten.unflatten.int, rows, 1, [heads // ratio, ratio])
        new = call(program, product, aten.matmul.default, rows, source)
        new = call(program, product, aten.flatten.using_ints, new, 1, 2)
        new = call(program, product, aten.unsqueeze.default, new, 2)
    new.meta["val"] = product.meta["val"]  # which the next product may read
    product.replace_all_uses_with(new)
    erase(program, [*shared.region, *([other] if plain is not None else []), product])  # type: ignore[list-item]
