"""The lengths of a cache's layers, read for positions and counted up."""

import random

import torch
from torch.fx import Node

from fxfuse.testing.blocks.block import Block, Sizes, base
from fxfuse.testing.speller import Speller


def _draw(rng: random.Random) -> Sizes:
    return base(rng, layers=rng.choice((2, 3, 1)))


def _write_lengths(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    step, read = sizes["length"], []
    for n in range(sizes["layers"]):
        length = s.input(torch.tensor(n + 4))
        positions = s.add(s.call(torch.arange, step), length)
        s.spell("count_up", length, step)
        read.append(s.mul(positions, 2))
    return [s.mul(x, 2), *read]


BLOCKS = (
    Block(
        "cache_lengths",
        "cache_lengths",
        _draw,
        _write_lengths,
        whole=lambda sizes: f"{sizes['layers']} counts" if sizes["layers"] > 1 else "count",
    ),
)
