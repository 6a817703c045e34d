"""Mutants of graphs that match, one change each: a rewrite of them changes no bit, or does not take place."""

import copy
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from equality import difference
from spelled_blocks import SHIPPED, spelled
from torch import Tensor
from torch.fx import GraphModule

from fxfuse import rewrite
from fxfuse.passes.pipeline import PASSES
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.mutants import CHANGES, Mutant, near_miss, values_of

ALL = tuple(each.name for each in PASSES)
# One mutant in so many goes through Dynamo, the others through the tracing that passes match on.
DYNAMO_EVERY = 10
# Mutants of one graph: to write it and to run it costs as much as to rewrite it.
MUTANTS_EACH = 8
# These few graphs allow; in half of the draws they come first.
SELDOM = (
    "a permuted cat",
    "another part",
    "an unequal split",
    "exchanged sizes",
    "another dim",
    "a bias on one",
    "a tied or aliased weight",
    "another parameter",
)


@dataclass
class Tally:
    """What came out: graphs by kind of change and by block, how many still matched, what went wrong."""

    graphs: int = 0
    through_dynamo: int = 0
    still_matched: int = 0
    undone: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    matched: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


@lru_cache(2)
def original(number: int) -> tuple[str, GraphModule, tuple[Tensor, ...], dict[str, Any]]:
    """The block, a graph that spells it, its inputs, and the values of its nodes."""
    name = SHIPPED[number % len(SHIPPED)]
    module, inputs, _, _ = spelled(BLOCKS[name], number)
    return name, module, inputs, values_of(module, inputs)


def mutant_of(seed: int) -> tuple[str, Mutant, tuple[Tensor, ...]]:
    """The block, the mutant and the inputs of a seed."""
    rng = random.Random(seed)
    name, module, inputs, values = original(seed // MUTANTS_EACH)
    kinds = rng.sample(list(CHANGES), len(CHANGES))
    if rng.random() < 0.5:
        kinds.sort(key=lambda kind: kind not in SELDOM)
    return name, near_miss(module, inputs, rng, kinds, values), inputs


def judge(seed: int, tally: Tally, passes: tuple[str, ...] = ALL) -> None:
    """Rewrite one mutant and compare; whatever goes wrong is noted with the command that repeats it."""
    name, mutant, inputs = mutant_of(seed)
    tally.graphs += 1
    tally.kinds[mutant.kind] += 1
    tally.blocks[name] += 1
    exact = BLOCKS[name].exact
    what = f"{name}, {mutant.kind} ({mutant.change})"
    again = f"    python tests/properties/nightly.py replay near_misses {seed}"
    if seed % DYNAMO_EVERY == 0:
        tally.through_dynamo += 1
        torch._dynamo.reset()
        options = {"inner": "eager", "passes": passes, "report": "off"}
        own = copy.deepcopy(mutant.module)  # a mutant may write to its weights
        compiled = torch.compile(own, backend="fxfuse", options=options, dynamic=False)
        why = difference(mutant.module, compiled, inputs, exact=exact)
    else:
        weights = "copy" if seed % 3 == 0 else "auto"
        rewritten = rewrite(mutant.module, inputs, passes=passes, weights=weights, dynamic=False)
        tally.still_matched += bool(rewritten.report.matched)
        tally.matched[name] += bool(rewritten.report.matched)
        undone = [miss.reason for miss in rewritten.report.misses if "undone" in miss.reason]
        tally.undone += [f"{what}: {reason}\n{again}" for reason in undone]
        why = difference(mutant.module, rewritten.graph_module, inputs, exact=exact)
    if why is not None:
        tally.wrong.append(f"{what}: {why}\n{again}")


def run(seeds: range, passes: tuple[str, ...] = ALL) -> Tally:
    tally = Tally()
    for seed in seeds:
        judge(seed, tally, passes)
    return tally


def replay(seed: int) -> str:
    name, mutant, inputs = mutant_of(seed)
    tally = Tally()
    judge(seed, tally)
    rewritten = rewrite(mutant.module, inputs, passes=ALL, dynamic=False)
    graphs = f"{mutant.module.code}\n{rewritten.graph_module.code}"
    return f"{name}, {mutant.kind}: {mutant.change}\n{graphs}\n{tally}"
