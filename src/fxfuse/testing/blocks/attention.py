"""Attention: norms, rotation and cache in front of it, heads that share a key, a single query."""

import random

import torch
from torch.fx import Node

from fxfuse.testing.blocks.block import Block, Sizes, base, normal, projected
from fxfuse.testing.blocks.norms import zero_centred
from fxfuse.testing.speller import Speller

CACHED = 11


def _draw(rng: random.Random) -> Sizes:
    return base(
        rng,
        heads=rng.choice((2, 1)),
        ratio=rng.choice((3, 2)),
        head=rng.choice((8, 16)),
        rotary=rng.choice((4, 8)),
        gated=rng.choice((1, 0)),
    ) | {"length": rng.choice((1, 4, 5))}


def _angles(s: Speller, sizes: Sizes) -> list[Node]:
    """cos and sin [1 or B, T, R], each half of R alike."""
    steps = normal(s, "angles", 1 if s.seed % 2 else sizes["batch"], sizes["length"], sizes["rotary"] // 2)
    both = torch.cat([steps, steps], dim=-1)
    return [s.unsqueeze(s.input(t), 1) for t in (both.cos(), both.sin())]


def _rotated(s: Speller, x: Node, cos: Node, sin: Node, rotary: int) -> Node:
    """The first `rotary` channels rotated by halves, the others as they are."""
    width = s.shape(x)[-1]
    if rotary == width:
        return s.rotate(x, cos, sin)
    turning, rest = s.split(x, [rotary, width - rotary])
    return s.cat([s.rotate(turning, cos, sin), rest])


def _write_prologue(s: Speller, sizes: Sizes, x: Node, cached: bool) -> list[Node]:
    batch, length = s.sizes(x, 2)
    few, ratio, head = sizes["heads"], sizes["ratio"], sizes["head"]
    many = few * ratio
    if sizes["gated"]:
        both = s.reshape(s.linear(x, many * 2 * head, name="q_proj"), batch, length, many, 2 * head)
        q, gate = s.split(both, [head, head])
    else:
        q, gate = s.reshape(s.linear(x, many * head, name="q_proj"), batch, length, many, head), None
    k = s.reshape(s.linear(x, few * head, name="k_proj"), batch, length, few, head)
    v = s.reshape(s.linear(x, few * head, name="v_proj"), batch, length, few, head)
    q, k = zero_centred(s, q, "q_norm"), zero_centred(s, k, "k_norm")
    q, k, v = (s.transpose(t, 1, 2) for t in (q, k, v))
    cos, sin = _angles(s, sizes)
    q, k = (_rotated(s, t, cos, sin, sizes["rotary"]) for t in (q, k))
    if cached:
        keys, values = (s.input(normal(s, n, sizes["batch"], few, CACHED, head)) for n in ("keys", "values"))
        positions = s.input(torch.arange(sizes["length"]) + 3)
        k, v = s.spell("write_at", keys, positions, k), s.spell("write_at", values, positions, v)
    k, v = s.repeat_heads(k, ratio), s.repeat_heads(v, ratio)
    y = s.transpose(s.attend(q, k, v, by_hand=True), 1, 2)
    if gate is not None:
        y = s.spell("times_sigmoid", y, gate)
    return [projected(s, y, sizes)]


def _draw_one(rng: random.Random) -> Sizes:
    return _draw(rng) | {"length": 1, "mask": rng.choice((0, 1, 2))}


def _mask(s: Speller, sizes: Sizes) -> Node | None:
    """None, which keys may be seen, or what is added to their scores: [B, 1, 1, L]."""
    drawn = normal(s, "mask", sizes["batch"], 1, 1, CACHED)
    drawn[..., 0] = 1
    return (None, s.input(drawn > -0.5), s.input(drawn))[sizes["mask"]] if sizes["mask"] else None


def _keys_and_values(s: Speller, sizes: Sizes, heads: int) -> list[Node]:
    shape = (sizes["batch"], heads, CACHED, sizes["head"])
    return [s.input(normal(s, name, *shape)) for name in ("keys", "values")]


def _query(s: Speller, sizes: Sizes, x: Node) -> Node:
    batch, length = s.sizes(x, 2)
    heads = sizes["heads"] * sizes["ratio"]
    q = s.linear(x, heads * sizes["head"], name="q_proj")
    return s.transpose(s.reshape(q, batch, length, heads, sizes["head"]), 1, 2)


def _write_shared(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    q = _query(s, sizes, x)
    k, v = (s.repeat_heads(t, sizes["ratio"]) for t in _keys_and_values(s, sizes, sizes["heads"]))
    return [projected(s, s.transpose(s.attend(q, k, v, _mask(s, sizes), by_hand=True), 1, 2), sizes)]


def _write_one_query(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    q = _query(s, sizes, x)
    k, v = _keys_and_values(s, sizes, sizes["heads"] * sizes["ratio"])
    return [projected(s, s.transpose(s.attend(q, k, v, _mask(s, sizes)), 1, 2), sizes)]


BLOCKS = (
    Block(
        "attention_with_a_cache",
        "qk_norm_rope_gate",
        _draw,
        lambda s, sizes, x: _write_prologue(s, sizes, x, True),
        exact=False,
    ),
    Block(
        "attention_without_a_cache",
        "qk_norm_rope_gate",
        _draw,
        lambda s, sizes, x: _write_prologue(s, sizes, x, False),
        exact=False,
    ),
    Block("heads_that_share_a_key", "grouped_query_attention", _draw_one, _write_shared, exact=False),
    Block("one_query", "one_query_attention", _draw_one, _write_one_query, exact=False),
)
