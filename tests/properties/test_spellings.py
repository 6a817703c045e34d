"""Every spelling is the same block, and every pattern that ships matches it."""

import random

import pytest
import torch
from equality import TOLERANCE
from spelled_blocks import RULES, SHIPPED, is_whole, measure, spelled, table

from fxfuse import rewrite
from fxfuse.testing import spellings
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.speller import Speller

EACH = [(operation, name) for operation, variants in spellings.TABLE.items() for name in variants]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_spelling_computes_what_the_plain_one_does(name: str) -> None:
    """What it returns, and what it writes to its inputs."""
    block = BLOCKS[name]
    for seed in range(12):
        module, inputs, sizes, _ = spelled(block, seed)
        plain, again = block.module(sizes, Speller(random.Random(), plain=True, seed=seed))
        for a, b in zip((*module(*inputs), *inputs), (*plain(*again), *again), strict=True):
            scale = float(b.abs().max()) if b.is_floating_point() else 1.0
            same = torch.allclose(a.float(), b.float(), rtol=1e-4, atol=TOLERANCE * max(scale, 0.1))
            assert torch.equal(a, b) if block.exact else same


def test_each_spelling_is_written_by_some_block() -> None:
    """No entry of the table is dead."""
    unused = set(EACH)
    for seed in range(60):
        for block in BLOCKS.values():
            unused -= set(spelled(block, seed)[3].used)
        if not unused:
            return
    assert unused == set()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_sample_of_spellings_is_matched(name: str) -> None:
    share = measure(BLOCKS[name], range(6))
    assert share.missed == [], f"{table([share])}\n{share.reasons}"


@pytest.mark.slow
@pytest.mark.parametrize("operation", spellings.TABLE)
def test_each_spelling_alone_is_matched(operation: str) -> None:
    """Of every block that uses the operation, with the rest spelled plainly."""
    missed = []
    for variant in spellings.TABLE[operation]:
        for name in SHIPPED:
            block, rng = BLOCKS[name], random.Random(1)
            sizes = block.draw(rng)
            speller = Speller(rng, only={operation: variant}, plain=True, seed=1)
            module, inputs = block.module(sizes, speller)
            if (operation, variant) in speller.used:
                report = rewrite(module, inputs, passes=block.passes, dynamic=False).report
                if not is_whole(block, sizes, report):
                    missed.append((variant, name, [miss.reason for miss in report.misses]))
    assert missed == []


@pytest.mark.parametrize("name", SHIPPED)
def test_without_passes_nothing_is_matched(name: str) -> None:
    """The measure is no constant."""
    assert measure(BLOCKS[name], range(2), passes=()).matched == 0


def test_every_pass_has_a_block_and_every_block_a_pass() -> None:
    assert {block.rule for block in BLOCKS.values()} == RULES


def test_rows_of_one_size_are_told_apart() -> None:
    """b and a of linears of their own, as wide as each other: the first order that is tried is wrong."""
    share = measure(BLOCKS["decoded_token"], range(9, 10))
    assert share.matched == 1, share.reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_nearly_all_of_many_spellings_are_matched(name: str) -> None:
    share = measure(BLOCKS[name], range(1000, 1400))
    assert share.share >= 0.99, f"{table([share])}\n{share.reasons}"
