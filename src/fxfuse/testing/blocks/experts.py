"""Experts of one token: its rows, sorted by expert, in one grouped product (Qwen3.5-MoE in transformers).

Or one row for each expert that was chosen, with a copy of that expert's weights.
"""

import random

import torch
from torch.fx import Node

from fxfuse.testing.blocks.block import Block, Sizes
from fxfuse.testing.speller import Speller
from fxfuse.testing.tensors import integer_tensor

WIDTH, HEIGHT = 8, 16  # torch's product wants multiples of 16 bytes


def _draw(rng: random.Random) -> Sizes:
    return {"batch": 1, "length": 1, "hidden": 8, "experts": rng.choice((5, 7)), "chosen": rng.choice((2, 3))}


def _write(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    chosen, experts = sizes["chosen"], sizes["experts"]
    row = s.reshape(s.linear(x, WIDTH, name="in_proj"), 1, WIDTH)
    rows = s.cast(s.cat([s.mul(row, n + 1) for n in range(chosen)], dim=-2), torch.bfloat16)
    weights = s.parameter("experts", integer_tensor((experts, HEIGHT, WIDTH), s.seed))
    ends = torch.arange(experts, dtype=torch.int32).clamp(max=chosen)
    product = torch.nn.functional.grouped_mm
    made = s.call(product, rows, s.transpose(s.cast(weights, torch.bfloat16), 1, 2), offs=s.input(ends))
    return [s.mul(s.reshape(made, 1, 1, chosen * HEIGHT), 2)]


def _write_chosen(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    chosen, experts = sizes["chosen"], sizes["experts"]
    row = s.reshape(s.linear(x, WIDTH, name="in_proj"), 1, WIDTH)
    rows = s.cat([s.mul(row, n + 1) for n in range(chosen)], dim=-2)
    weights = s.parameter("experts", integer_tensor((experts, HEIGHT, WIDTH), s.seed))
    ids = s.input(torch.arange(chosen).mul(3).add(s.seed).remainder(experts))
    made = s.spell("each_times_its_row", s.same(s.spell("chosen", weights, ids)), rows)
    return [s.mul(made, 2)]


BLOCKS = (
    Block("experts_of_one_token", "expert_rows", _draw, _write),
    Block("chosen_experts", "expert_rows", _draw, _write_chosen),
)
