"""How often each pattern matches what it should, over random spellings."""

import random
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxfuse import Report, rewrite
from fxfuse.passes.pipeline import PASSES
from fxfuse.testing.blocks import BLOCKS, Block, Sizes
from fxfuse.testing.speller import Speller

RULES = {each.name for each in PASSES}
SHIPPED = tuple(block.name for block in BLOCKS.values() if block.rule in RULES)


@dataclass
class Share:
    """What came out for one block: how many of how many, and what the misses have in common."""

    block: str
    rule: str
    drawn: int = 0
    matched: int = 0
    missed: list[int] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        return self.matched / max(self.drawn, 1)


def spelled(
    block: Block, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[GraphModule, tuple[Tensor, ...], Sizes, Speller]:
    rng = random.Random(seed)
    sizes = block.draw(rng)
    speller = Speller(rng, seed=seed, dtype=dtype)
    module, inputs = block.module(sizes, speller)
    return module, inputs, sizes, speller


def is_whole(block: Block, sizes: Sizes, report: Report) -> bool:
    """Whether the block's rule matched once, with all of its parts."""
    outcomes = [graph.outcomes[block.rule] for graph in report.graphs if block.rule in graph.outcomes]
    matches = [match for outcome in outcomes for match in outcome.matches]
    return len(matches) == 1 and matches[0].detail.startswith(block.whole(sizes))


def dtype_of(seed: int) -> torch.dtype:
    """Every third example is one in bfloat16, where casts are casts."""
    return torch.bfloat16 if seed % 3 == 2 else torch.float32


def measure(block: Block, seeds: range, passes: tuple[str, ...] | None = None) -> Share:
    """The share of spellings that the block's rule matches; `passes=()` is the check of the check."""
    share = Share(block.name, block.rule)
    for seed in seeds:
        module, inputs, sizes, _ = spelled(block, seed, dtype_of(seed))
        chosen = block.passes if passes is None else passes
        report = rewrite(module, inputs, passes=chosen, dynamic=False).report
        share.drawn += 1
        if is_whole(block, sizes, report):
            share.matched += 1
        else:
            share.missed.append(seed)
            share.reasons.update({miss.reason for miss in report.misses} or {"no candidate was seen"})
    return share


def table(shares: list[Share]) -> str:
    lines = [
        "| block | pass | spellings | matched | share | seeds that missed |",
        "|---|---|---|---|---|---|",
    ]
    for s in shares:
        seeds = ", ".join(map(str, s.missed[:4]))
        lines.append(f"| {s.block} | {s.rule} | {s.drawn:,} | {s.matched:,} | {s.share:.2%} | {seeds} |")
    return "\n".join(lines)


def replay(name: str, seed: int) -> str:
    """The graph that a seed spells, and what the pass said of it."""
    block = BLOCKS[name]
    module, inputs, sizes, _ = spelled(block, seed, dtype_of(seed))
    rewritten = rewrite(module, inputs, passes=block.passes, dynamic=False)
    verdict = "matched" if is_whole(block, sizes, rewritten.report) else "MISSED"
    return f"{name} {sizes}: {verdict}\n{module.code}\n{rewritten.graph_module.code}\n{rewritten.report}"
