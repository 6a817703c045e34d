"""Blocks of language models, written with a speller: the same mathematics, spelled anew each time.

    block = BLOCKS["projections"]
    sizes = block.draw(rng)
    module, inputs = block.module(sizes, Speller(rng))

Sizes are small, head ratios odd, values small integers. `exact` blocks only move data and multiply matrices,
so that on integers every correct rewrite of them is bit-equal.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfuse.testing.speller import Speller
from fxfuse.testing.tensors import integer_tensor

__all__ = ["BLOCKS", "Block", "Sizes"]

Sizes = dict[str, int]


@dataclass(frozen=True)
class Block:
    """One piece of a model.

    Attributes:
        name: of the block.
        rule: of the pass that should match it, once.
        draw: sizes of one example.
        write: takes a speller, the sizes and the hidden states [B, T, hidden]; returns the outputs.
        exact: whether a correct rewrite gives the same bits on small integers.
        matches: how often the rule should match.
    """

    name: str
    rule: str
    draw: Callable[[random.Random], Sizes]
    write: Callable[[Speller, Sizes, Node], Sequence[Node]]
    exact: bool = True
    matches: int = 1

    def hidden_states(self, sizes: Sizes, seed: int = 0) -> Tensor:
        shape = (sizes["batch"], sizes["length"], sizes["hidden"])
        if self.exact:
            return integer_tensor(shape, seed)
        # Small values in every other example: there the epsilon of a norm counts.
        scale = 1e-3 if seed % 2 else 1.0
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale

    def module(self, sizes: Sizes, speller: Speller) -> tuple[GraphModule, tuple[Tensor, ...]]:
        """The block as a graph module, and inputs for it."""
        x = speller.input(self.hidden_states(sizes, speller.seed))
        module = speller.module(*self.write(speller, sizes, x))
        return module, tuple(speller.inputs)


def _base(rng: random.Random, **more: int) -> Sizes:
    return {
        "batch": rng.choice((2, 3)),
        "length": rng.choice((5, 3, 7)),
        "hidden": rng.choice((8, 6, 12)),
        **more,
    }


def _seeded(s: Speller, name: str, *shape: int) -> Tensor:
    """Values of a parameter that is no integer matter: numbers around 1."""
    generator = torch.Generator().manual_seed(s.seed_of(name))
    return 1 + 0.3 * torch.randn(shape, generator=generator)


# Linears of one input


def _draw_projections(rng: random.Random) -> Sizes:
    return _base(rng, count=rng.choice((2, 3, 4)), bias=rng.choice((0, 1)), unit=rng.choice((4, 3, 5)))


def _write_projections(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    if sizes["unit"] == 5 and not s.dynamic:  # a matrix of rows, as mixtures of experts have it
        x = s.reshape(x, sizes["batch"] * sizes["length"], sizes["hidden"])
    widths = [sizes["unit"] * (n + 1) for n in range(sizes["count"])]
    order = list(range(sizes["count"]))
    if not s.plain:
        s.rng.shuffle(order)
    made = {n: s.linear(x, widths[n], bias=bool(sizes["bias"]), name=f"proj_{n}") for n in order}
    return [s.mul(made[n], n + 2) for n in sorted(made)]


# The projection of grouped heads, its parts interleaved head by head


def _draw_interleaved(rng: random.Random) -> Sizes:
    heads = rng.choice((2, 3))
    return _base(
        rng, heads=heads, ratio=rng.choice((2, 1, 3)), key=rng.choice((3, 4)), value=rng.choice((2, 5))
    )


def _write_interleaved(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    heads, key, ratio, value = sizes["heads"], sizes["key"], sizes["ratio"], sizes["value"]
    parts = [key, key, ratio * value, ratio * value]
    y = s.linear(x, heads * sum(parts), name="in_proj_qkvz")
    batch, length = s.sizes(x, 2)
    q, k, v, z = s.split(s.reshape(y, batch, length, heads, sum(parts)), parts)
    q, k = s.reshape(q, batch, length, heads * key), s.reshape(k, batch, length, heads * key)
    v = s.reshape(v, batch, length, heads * ratio * value)
    z = s.reshape(z, batch, length, heads * ratio, value)
    mixed = s.cat([q, k, v])
    return [s.mul(s.transpose(mixed, 1, 2), 2), s.mul(z, 3)]


# A linear over one row


def _draw_one_row(rng: random.Random) -> Sizes:
    return _base(rng, bias=rng.choice((0, 1)), outputs=rng.choice((5, 16))) | {"batch": 1, "length": 1}


def _write_one_row(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    return [s.mul(s.linear(x, sizes["outputs"], bias=bool(sizes["bias"]), name="head"), 2)]


# Norms, gates and attention


def _norm(s: Speller, x: Node, eps: float) -> Node:
    """x in fp32, divided by the root of its mean square over the last dimension."""
    wide = s.cast(x, torch.float32)
    scale = s.rsqrt(s.add(s.mean(s.square(wide)), eps))
    return s.mul(wide, scale)


def _write_rms_norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    weight = s.parameter("norm.weight", _seeded(s, "norm.weight", sizes["hidden"]) - 1)
    scaled = s.mul(_norm(s, x, 1e-6), s.add(s.cast(weight, torch.float32), 1.0))
    return [s.mul(s.cast(scaled, torch.float32, x), 2)]


def _write_plain_rms_norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    weight = s.parameter("norm.weight", _seeded(s, "norm.weight", sizes["hidden"]))
    return [s.mul(s.mul(weight, s.cast(_norm(s, x, 1e-6), torch.float32, x)), 2)]


def _write_gated_rms_norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    gate = s.input(torch.randn(s.shape(x), generator=torch.Generator().manual_seed(s.seed + 1)))
    weight = s.parameter("norm.weight", _seeded(s, "norm.weight", sizes["hidden"]))
    normed = s.mul(weight, s.cast(_norm(s, x, 1e-6), torch.float32, x))
    gated = s.mul(normed, s.silu(s.cast(gate, torch.float32)))
    return [s.mul(s.cast(gated, torch.float32, x), 2)]


def _write_l2norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    return [s.mul(s.mul(x, s.rsqrt(s.add(s.sum(s.square(x)), 1e-6))), 2)]


def _write_swiglu(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    gate = s.linear(x, 2 * sizes["hidden"], name="gate_proj")
    up = s.linear(x, 2 * sizes["hidden"], name="up_proj")
    return [s.linear(s.mul(s.silu(gate), up), sizes["hidden"], name="down_proj")]


def _write_gates(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    heads = sizes["hidden"]
    b = s.linear(x, heads, name="in_proj_b")
    a = s.linear(x, heads, name="in_proj_a")
    a_log = s.parameter("A_log", _seeded(s, "A_log", heads))
    dt_bias = s.parameter("dt_bias", _seeded(s, "dt_bias", heads))
    decay = s.exp(s.cast(a_log, torch.float32))
    g = s.mul(s.neg(decay), s.softplus(s.add(s.cast(a, torch.float32), dt_bias)))
    return [s.mul(s.sigmoid(b), 2), s.mul(g, 2)]


def _draw_attention(rng: random.Random) -> Sizes:
    return _base(rng, heads=rng.choice((2, 1)), ratio=rng.choice((3, 2)), head=rng.choice((8, 16)))


def _heads(s: Speller, y: Node, x: Node, count: int, head: int) -> Node:
    batch, length = s.sizes(x, 2)
    return s.transpose(s.reshape(y, batch, length, count, head), 1, 2)


def _write_attention(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    heads, ratio, head = sizes["heads"], sizes["ratio"], sizes["head"]
    q = _heads(s, s.linear(x, heads * ratio * head, name="q_proj"), x, heads * ratio, head)
    k = s.repeat_heads(_heads(s, s.linear(x, heads * head, name="k_proj"), x, heads, head), ratio)
    v = s.repeat_heads(_heads(s, s.linear(x, heads * head, name="v_proj"), x, heads, head), ratio)
    out = s.call(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    return [s.mul(out, 2)]


def _rotated(s: Speller, x: Node, cos: Node, sin: Node, part: int) -> Node:
    """The first `part` channels rotated by halves, the others as they are."""
    width = s.shape(x)[-1]
    turning, rest = s.split(x, [part, width - part]) if part < width else (x, None)
    first, second = s.split(turning, [part // 2, part // 2])
    half_turned = s.cat([s.neg(second), first])
    turned = s.add(s.mul(turning, cos), s.mul(half_turned, sin))
    return turned if rest is None else s.cat([turned, rest])


def _write_rotary(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    heads, head, part = sizes["heads"] * sizes["ratio"], sizes["head"], sizes["head"] // 4
    angles = torch.arange(sizes["length"])[None, None, :, None] * torch.rand(
        1, 1, 1, part, generator=torch.Generator().manual_seed(s.seed)
    )
    cos, sin = s.input(angles.cos()), s.input(angles.sin())
    q = _heads(s, s.linear(x, heads * head, name="q_proj"), x, heads, head)
    k = _heads(s, s.linear(x, sizes["heads"] * head, name="k_proj"), x, sizes["heads"], head)
    return [s.mul(_rotated(s, q, cos, sin, part), 2), s.mul(_rotated(s, k, cos, sin, part), 2)]


BLOCKS: dict[str, Block] = {
    block.name: block
    for block in (
        Block("projections", "same_input_linears", _draw_projections, _write_projections),
        Block("interleaved_heads", "layout_chains", _draw_interleaved, _write_interleaved),
        Block("one_row", "one_row_linears", _draw_one_row, _write_one_row),
        Block("zero_centred_rms_norm", "rms_norm", _base, _write_rms_norm, exact=False),
        Block("plain_rms_norm", "rms_norm", _base, _write_plain_rms_norm, exact=False),
        Block("gated_rms_norm", "gated_rms_norm", _base, _write_gated_rms_norm, exact=False),
        Block("l2norm", "l2norm", _base, _write_l2norm, exact=False),
        Block("swiglu", "swiglu", _base, _write_swiglu, exact=False),
        Block("gates", "gates_alone", _base, _write_gates, exact=False),
        Block("attention", "repeat_kv", _draw_attention, _write_attention, exact=False),
        Block("rotary", "partial_rotary", _draw_attention, _write_rotary, exact=False),
    )
}
