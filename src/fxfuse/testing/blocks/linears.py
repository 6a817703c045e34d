"""Linears of one input, a projection whose parts are interleaved head by head, and a linear over one row."""

import random

from torch.fx import Node

from fxfuse.testing.blocks.block import Block, Sizes, base
from fxfuse.testing.speller import Speller


def _draw_projections(rng: random.Random) -> Sizes:
    return base(rng, count=rng.choice((2, 3, 4)), bias=rng.choice((0, 1)), unit=rng.choice((4, 3, 5)))


def _write_projections(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    if sizes["unit"] == 5 and not s.dynamic:  # a matrix of rows, as mixtures of experts have it
        x = s.reshape(x, sizes["batch"] * sizes["length"], sizes["hidden"])
    widths = [sizes["unit"] * (n + 1) for n in range(sizes["count"])]
    order = list(range(sizes["count"]))
    if not s.plain:
        s.rng.shuffle(order)
    made = {n: s.linear(x, widths[n], bias=bool(sizes["bias"]), name=f"proj_{n}") for n in order}
    return [s.mul(made[n], n + 2) for n in sorted(made)]


def _draw_interleaved(rng: random.Random) -> Sizes:
    heads = rng.choice((2, 3))
    return base(
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


def _draw_one_row(rng: random.Random) -> Sizes:
    return base(rng, bias=rng.choice((0, 1)), outputs=rng.choice((5, 16))) | {"batch": 1, "length": 1}


def _write_one_row(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    return [s.mul(s.linear(x, sizes["outputs"], bias=bool(sizes["bias"]), name="head"), 2)]


BLOCKS = (
    Block(
        "projections",
        "same_input_linears",
        _draw_projections,
        _write_projections,
        whole=lambda sizes: f"{sizes['count']} linears",
    ),
    Block("interleaved_heads", "layout_chains", _draw_interleaved, _write_interleaved),
    Block("one_row", "one_row_linears", _draw_one_row, _write_one_row),
)
