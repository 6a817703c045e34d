"""Mutants of graphs that match, one change each: a rewrite of them changes no bit, or does not take place."""

import copy
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import traced_mutants
from equality import difference
from spelled_blocks import SHIPPED, spelled
from torch import Tensor
from torch.fx import GraphModule
from traced_mutants import Traced, TracedMutant

from fxfuse import rewrite
from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Miss
from fxfuse.passes.pipeline import PASSES
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.mutants import CHANGES, Mutant, near_miss, values_of

ALL = tuple(each.name for each in PASSES)
# One mutant in so many goes through Dynamo, one through rewrite(), the others are made of a traced graph.
DYNAMO_EVERY = 10
REWRITE_EVERY = 20
# Mutants of one graph: to write it and to trace it costs as much as to rewrite it.
MUTANTS_EACH = 16
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

# Sizes that change in place: such a graph is left alone, and so gives the same bits.
LEFT_ALONE = "turned in place"


@dataclass
class Tally:
    """What came out: graphs by kind of change and by block, how many still matched, what went wrong."""

    graphs: int = 0
    roads: Counter[str] = field(default_factory=Counter)
    undone: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    blocks: Counter[str] = field(default_factory=Counter)
    matched: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    undrawn: list[str] = field(default_factory=list)

    @property
    def still_matched(self) -> int:
        """Of those that did not go through Dynamo, whose report is elsewhere."""
        return sum(self.matched.values())


@lru_cache(2)
def original(number: int) -> tuple[str, GraphModule, tuple[Tensor, ...], dict[str, Any]]:
    """The block, a graph that spells it, its inputs, and the values of its nodes."""
    name = SHIPPED[number % len(SHIPPED)]
    module, inputs, _, _ = spelled(BLOCKS[name], number)
    otherwise = laid_out(inputs, number // len(SHIPPED))
    try:
        return name, module, otherwise, values_of(module, otherwise)
    except RuntimeError:  # a view of what does not lie in a row
        return name, module, inputs, values_of(module, inputs)


@lru_cache(2)
def traced_original(number: int) -> tuple[str, Traced]:
    """The same as traced."""
    name, module, inputs, _ = original(number)
    return name, traced_mutants.of(module, inputs)


def laid_out(inputs: Sequence[Tensor], draw: int) -> tuple[Tensor, ...]:
    """The inputs, every other time laid out otherwise: turned, as part of more, or one row for all."""
    way = (None, "turned", None, "a part", None, "one row")[draw % 6]
    return tuple(_laid_out(x, way) for x in inputs)


def _laid_out(x: Tensor, way: str | None) -> Tensor:
    if way is None or x.dim() < 2:
        return x
    if way == "turned":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if way == "a part":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x[:1].expand_as(x) if x.is_floating_point() else x


def _kinds(rng: random.Random) -> list[str]:
    kinds = rng.sample(list(CHANGES), len(CHANGES))
    if rng.random() < 0.4:
        kinds.sort(key=lambda kind: kind not in SELDOM)
    return kinds


def road_of(seed: int) -> str:
    """Which way a mutant takes to the passes."""
    if seed % DYNAMO_EVERY == 0:
        return "dynamo"
    return "rewrite" if seed % REWRITE_EVERY == 5 else "traced"


def mutant_of(seed: int) -> tuple[str, Mutant, tuple[Tensor, ...]]:
    """The block, the mutant and the inputs of a seed whose road is not "traced"."""
    rng = random.Random(seed)
    name, module, inputs, values = original(seed // MUTANTS_EACH)
    return name, near_miss(module, inputs, rng, _kinds(rng), values), inputs


def traced_mutant_of(seed: int) -> tuple[str, TracedMutant]:
    rng = random.Random(seed)
    name, base = traced_original(seed // MUTANTS_EACH)
    return name, traced_mutants.mutant_of(base, rng, _kinds(rng), copy_weights=seed % 3 == 0)


def passes_of(seed: int, name: str, chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """Mostly those that run together for one target, now and then all of them at once."""
    if chosen is not None:
        return chosen
    rule = next(each for each in PASSES if each.name == BLOCKS[name].rule)
    if random.Random(~seed).random() < 0.1:
        return ALL
    target = rule.target or ("cuda", "cpu")[seed % 2]
    suited = pipeline.selected("default", "inductor", target)
    return tuple(each.name for each in PASSES if each in suited or each is rule)


def judge(seed: int, tally: Tally, passes: tuple[str, ...] | None = None) -> None:
    """Rewrite one mutant and compare; whatever goes wrong is noted with the command that repeats it."""
    with poisoned():
        try:
            _judge(seed, tally, passes)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            again = f"    python tests/properties/nightly.py replay near_misses {seed}"
            tally.wrong.append(f"raised {type(error).__name__}: {reason}\n{again}")
        if torch.is_autocast_enabled("cpu"):  # a graph that raised has left it on
            torch.set_autocast_enabled("cpu", False)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written yet reads as NaN: a mutant may read it, and must not vary."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _judge(seed: int, tally: Tally, passes: tuple[str, ...] | None) -> None:
    road = road_of(seed)
    mutant: Mutant | TracedMutant
    try:
        if road == "traced":
            name, mutant = traced_mutant_of(seed)
        else:
            name, mutant, inputs = mutant_of(seed)
    except ValueError as error:
        tally.undrawn.append(f"{seed}: {error}")
        return
    chosen = passes_of(seed, name, passes)
    tally.graphs += 1
    tally.roads[road] += 1
    tally.kinds[mutant.kind] += 1
    tally.blocks[name] += 1
    # Dynamo turns an input itself, so that its graph may be rewritten
    left_alone = mutant.kind == LEFT_ALONE and road != "dynamo"
    limits: Any = {"exact": BLOCKS[name].exact or left_alone}
    if mutant.kind == "an autocast region":
        limits["reference"] = traced_mutants.without_autocast(mutant)
    what = f"{name}, {mutant.kind} ({mutant.change})"
    again = f"    python tests/properties/nightly.py replay near_misses {seed}"
    misses: list[Miss] = []
    if isinstance(mutant, TracedMutant):
        outcomes, before, after = traced_mutants.rewritten(mutant, pipeline.selected(chosen, "eager"))
        tally.matched[name] += any(outcome.matches for outcome in outcomes.values())
        misses = [miss for outcome in outcomes.values() for miss in outcome.misses]
        why = difference(before, after, mutant.tensors, **limits)
    elif road == "rewrite":
        weights = "copy" if seed % 3 == 0 else "auto"
        rewritten = rewrite(mutant.module, inputs, passes=chosen, weights=weights, dynamic=False)
        tally.matched[name] += bool(rewritten.report.matched)
        misses = rewritten.report.misses
        why = difference(mutant.module, rewritten.graph_module, inputs, **limits)
    else:
        torch._dynamo.reset()
        options = {"inner": "eager", "passes": chosen, "report": "off"}
        own = copy.deepcopy(mutant.module)  # a mutant may write to its weights
        compiled = torch.compile(own, backend="fxfuse", options=options, dynamic=False)
        why = difference(mutant.module, compiled, inputs, **limits)
    undone = [miss.reason for miss in misses if "undone" in miss.reason]
    tally.undone += [f"{what}: {reason}\n{again}" for reason in undone]
    if why is not None:
        tally.wrong.append(f"{what}: {why}\n{again}")


def run(seeds: Iterable[int], passes: tuple[str, ...] | None = None) -> Tally:
    tally = Tally()
    for seed in seeds:
        judge(seed, tally, passes)
    return tally


def replay(seed: int) -> str:
    tally = Tally()
    judge(seed, tally)
    if road_of(seed) == "traced":
        name, mutant = traced_mutant_of(seed)
        chosen = pipeline.selected(passes_of(seed, name, None), "eager")
        graphs = [mutant.program.graph, pipeline.without_code(mutant.program, chosen)[0].graph]
        return f"{name}, {mutant.kind}: {mutant.change}\n{graphs[0]}\n{graphs[1]}\n{tally}"
    name, written, inputs = mutant_of(seed)
    made = rewrite(written.module, inputs, passes=passes_of(seed, name, None), dynamic=False)
    graphs = f"{written.module.code}\n{made.graph_module.code}"
    return f"{name}, {written.kind}: {written.change}\n{graphs}\n{tally}"
