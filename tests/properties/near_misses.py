"""Mutants of graphs that match, one change each: a rewrite of them changes no bit, or does not take place."""

import copy
import random
from collections import Counter
from dataclasses import dataclass, field

import torch
from equality import difference
from spelled_blocks import SHIPPED, spelled

from fxfuse import rewrite
from fxfuse.passes.pipeline import PASSES
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.mutants import Mutant, near_miss

ALL = tuple(each.name for each in PASSES)
# One mutant in so many goes through Dynamo, the others through the tracing that passes match on.
DYNAMO_EVERY = 10


@dataclass
class Tally:
    """What came out: graphs by kind of change, how many still matched, and the seeds that went wrong."""

    graphs: int = 0
    through_dynamo: int = 0
    still_matched: int = 0
    undone: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def mutant_of(seed: int) -> tuple[str, Mutant, tuple[torch.Tensor, ...]]:
    """The block, the mutant and the inputs of a seed."""
    rng = random.Random(seed)
    name = rng.choice(SHIPPED)
    module, inputs, _, _ = spelled(BLOCKS[name], seed)
    return name, near_miss(module, inputs, rng), inputs


def judge(seed: int, tally: Tally, passes: tuple[str, ...] = ALL) -> None:
    """Rewrite one mutant and compare; whatever goes wrong is noted with the command that repeats it."""
    name, mutant, inputs = mutant_of(seed)
    tally.graphs += 1
    tally.kinds[mutant.kind] += 1
    exact = BLOCKS[name].exact
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
        tally.undone.update(m.reason for m in rewritten.report.misses if "undone" in m.reason)
        why = difference(mutant.module, rewritten.graph_module, inputs, exact=exact)
    if why is not None:
        tally.wrong.append(
            f"{name}, {mutant.kind} ({mutant.change}): {why}\n"
            f"    python tests/properties/nightly.py replay near_misses {seed}"
        )


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
