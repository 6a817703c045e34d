"""Every spelling is the same block, and every pattern that ships matches it."""

import random

import pytest
import torch
from spelled_blocks import RULES, SHIPPED, is_whole, measure, spelled, table

from fxfuse import rewrite
from fxfuse.testing import spellings
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.speller import Speller

EACH = [(operation, name) for operation, variants in spellings.TABLE.items() for name in variants]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_spelling_computes_what_the_plain_one_does(name: str) -> None:
    block = BLOCKS[name]
    for seed in range(12):
        module, inputs, sizes, _ = spelled(block, seed)
        plain, again = block.module(sizes, Speller(random.Random(), plain=True, seed=seed))
        for a, b in zip(module(*inputs), plain(*again), strict=True):
            assert torch.equal(a, b) if block.exact else torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_each_spelling_is_written_by_some_block() -> None:
    """No entry of the table is dead."""
    used = set()
    for block in BLOCKS.values():
        for seed in range(60):
            used |= set(spelled(block, seed)[3].used)
    assert set(EACH) - used == set()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_sample_of_spellings_is_matched(name: str) -> None:
    share = measure(BLOCKS[name], range(12))
    assert share.matched == share.drawn, f"{table([share])}\n{share.reasons}"


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
                report = rewrite(module, inputs, passes=(block.rule,), dynamic=False).report
                if not is_whole(block, sizes, report):
                    missed.append((variant, name, [miss.reason for miss in report.misses]))
    assert missed == []


@pytest.mark.parametrize("name", SHIPPED)
def test_without_passes_nothing_is_matched(name: str) -> None:
    """The measure is no constant."""
    assert measure(BLOCKS[name], range(2), passes=()).matched == 0


def test_blocks_name_rules_that_ship_or_are_written_down_as_missing() -> None:
    assert {block.name for block in BLOCKS.values() if block.rule not in RULES} <= {
        "l2norm",
        "gates",
        "attention",
        "rotary",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_nearly_all_of_many_spellings_are_matched(name: str) -> None:
    share = measure(BLOCKS[name], range(1000, 1400))
    assert share.share >= 0.99, f"{table([share])}\n{share.reasons}"
