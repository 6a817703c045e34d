"""Blocks of language models, written with a speller: the same mathematics, spelled anew each time.

    block = BLOCKS["projections"]
    sizes = block.draw(rng)
    module, inputs = block.module(sizes, Speller(rng))

Sizes are small, head ratios odd, values small integers. `exact` blocks only move data and multiply matrices,
so that on integers every correct rewrite of them is bit-equal.
"""

from fxfuse.testing.blocks import attention, caches, convolutions, delta_rule, experts, gates, linears, norms
from fxfuse.testing.blocks.block import Block, Sizes

__all__ = ["BLOCKS", "Block", "Sizes"]

BLOCKS: dict[str, Block] = {
    block.name: block
    for each in (linears, norms, gates, convolutions, delta_rule, attention, caches, experts)
    for block in each.BLOCKS
}
