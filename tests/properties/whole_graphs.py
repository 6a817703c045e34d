"""Random programs of several blocks, rewritten as a whole: seven things that have to hold for each."""

import copy
import random
from collections import Counter
from dataclasses import dataclass, field, replace

from equality import difference
from spelled_blocks import SHIPPED
from torch import Tensor, nn

from fxfuse import rewrite
from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.program import Program
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.programs import ONE_TOKEN, RandomProgram, random_program
from fxfuse.testing.tensors import integer_like_

FUSING = ("same_input_linears", "layout_chains")
ALL = tuple(each.name for each in pipeline.PASSES)
# Blocks of one token, and those of sequences of any length.
DECODING = tuple(
    name
    for name in SHIPPED
    if BLOCKS[name].draw(random.Random(0)).get("length") == 1 and name not in ONE_TOKEN
)
PREFILL = tuple(name for name in SHIPPED if name not in (*DECODING, *ONE_TOKEN))


@dataclass
class Tally:
    """How many programs, what matched in them, and what went wrong, with the command that repeats it."""

    programs: int = 0
    matched: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def passes_of(seed: int) -> tuple[str, ...]:
    """Half of the programs are of matrices and moved data, the others of any blocks, under all passes."""
    return FUSING if seed % 4 < 2 else ALL


def program_of(seed: int) -> RandomProgram:
    rng, dynamic = random.Random(seed), seed % 2 == 0
    if passes_of(seed) == FUSING:
        return random_program(rng, seed=seed, dynamic=dynamic)
    length = rng.choice((1, 4))
    blocks = (*DECODING, *PREFILL) if length == 1 else PREFILL
    return random_program(rng, blocks=blocks, seed=seed, dynamic=dynamic, length=length)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _counts(report: object) -> Counter[str]:
    graphs = report.graphs  # type: ignore[attr-defined]
    return Counter(
        {rule: len(o.matches) for graph in graphs for rule, o in graph.outcomes.items() if o.matches}
    )


def equal(drawn: RandomProgram, passes: tuple[str, ...]) -> tuple[str | None, Counter[str]]:
    """The rewritten graph gives the same bits, and its graph is well formed."""
    rewritten = rewrite(drawn.module, drawn.inputs, passes=passes, dynamic=False)
    rewritten.graph_module.graph.lint()
    undone = [miss.reason for miss in rewritten.report.misses if "undone" in miss.reason]
    if undone:
        return undone[0], Counter()
    why = difference(drawn.module, rewritten.graph_module, drawn.inputs, exact=is_exact(drawn))
    return why, _counts(rewritten.report)


def is_exact(drawn: RandomProgram) -> bool:
    return all(BLOCKS[name].exact for name in drawn.blocks)


def idempotent(drawn: RandomProgram, passes: tuple[str, ...]) -> str | None:
    """A second run over its own result finds nothing."""
    once = rewrite(drawn.module, drawn.inputs, passes=passes, dynamic=False)
    again = rewrite(once.graph_module, drawn.inputs, passes=passes, dynamic=False)
    return f"a second run matches {dict(_counts(again.report))}" if again.report.matched else None


def static_is_dynamic(drawn: RandomProgram, passes: tuple[str, ...]) -> str | None:
    """Sizes that may vary change no value, and lose no match of linears and chains.

    Other passes ask for heads and their sizes, which vary here like all sizes of all inputs.
    """
    static, varying = (
        rewrite(drawn.module, drawn.inputs, passes=passes, dynamic=dynamic) for dynamic in (False, True)
    )
    why = difference(drawn.module, varying.graph_module, drawn.inputs, exact=is_exact(drawn))
    counts = [_counts(each.report) for each in (static, varying)]
    if why is None and passes == FUSING and counts[0] != counts[1]:
        return f"static {dict(counts[0])}, dynamic {dict(counts[1])}"
    return why


def loaded_before_or_after(drawn: RandomProgram, passes: tuple[str, ...]) -> str | None:
    """fuse(load(W)) = load(plan(W))."""
    fused = rewrite(drawn.module, drawn.inputs, passes=passes, dynamic=False)
    other = integer_like_(copy.deepcopy(drawn.module), seed=99)
    weights = {name: tensor.detach() for name, tensor in _tensors(other).items()}
    fused.graph_module.load_state_dict(fused.plan.apply(weights))
    first = rewrite(other, drawn.inputs, passes=passes, dynamic=False)
    why = difference(first.graph_module, fused.graph_module, drawn.inputs, exact=True)
    return why or difference(other, fused.graph_module, drawn.inputs, exact=is_exact(drawn))


def _run(program: Program, drawn: RandomProgram, inputs: list[Tensor]) -> object:
    state = program.plan().apply({name: t.detach() for name, t in _tensors(drawn.module).items()})
    given = _tensors(drawn.module)
    fused = [state[each.transform.target.name] for each in program.fused]
    return program.graph_module(*given.values(), *inputs, *fused)


def commute(drawn: RandomProgram, passes: tuple[str, ...]) -> str | None:
    """The passes in the other order compute the same."""
    program = traced(drawn.module, _tensors(drawn.module), drawn.inputs, Options(), dynamic=False)
    chosen = pipeline.selected(passes, "inductor")
    for order in (chosen, chosen[::-1]):
        after, _ = pipeline.apply(program, order)
        why = difference(
            drawn.module,
            lambda *x, after=after: _run(after, drawn, list(x)),
            drawn.inputs,
            exact=is_exact(drawn),
        )
        if why is not None:
            return f"{[each.name for each in order]}: {why}"
    return None


def undone_on_failure(drawn: RandomProgram, passes: tuple[str, ...], rng: random.Random) -> str | None:
    """A pass that fails when it has rewritten the graph leaves what the others make, as if it was not."""
    program = traced(drawn.module, _tensors(drawn.module), drawn.inputs, Options(), dynamic=False)
    before = str(program.graph)
    chosen = pipeline.selected(passes, "inductor")
    broken = rng.choice(chosen)

    def fails(attempt: Program) -> Outcome:
        broken.run(attempt)
        (output,) = attempt.graph.find_nodes(op="output")
        output.args = ((),)
        raise RuntimeError("injected")

    with_failure = tuple(replace(each, run=fails) if each is broken else each for each in chosen)
    after, outcomes = pipeline.apply(program, with_failure)
    without, _ = pipeline.apply(program, tuple(each for each in chosen if each is not broken))
    if str(program.graph) != before:
        return f"the failing pass {broken.name} changed the program that it was given"
    if broken.name not in outcomes:  # no pass runs on what is turned in place
        return None if str(after.graph) == before else "a graph that no pass has seen was changed"
    if "injected" not in outcomes[broken.name].misses[0].reason:
        return f"the failure of {broken.name} is not in the report"
    if str(after.graph) != str(without.graph):
        return f"the failing pass {broken.name} left something behind"
    return None


def judge(seed: int, tally: Tally, passes: tuple[str, ...] | None = None) -> None:
    """All of it for one program."""
    drawn = program_of(seed)
    passes = passes_of(seed) if passes is None else passes
    tally.programs += 1
    why, counts = equal(drawn, passes)
    tally.matched += counts
    found = {"equal": why}
    if passes:
        found |= {
            "idempotent": idempotent(drawn, passes),
            "static = dynamic": static_is_dynamic(drawn, passes) if seed % 2 == 0 else None,
            "load, plan": loaded_before_or_after(drawn, passes),
            "commute": commute(drawn, passes),
            "undone": undone_on_failure(drawn, passes, random.Random(seed)),
        }
    for name, reason in found.items():
        if reason is not None:
            tally.wrong.append(
                f"{name}: {reason}\n    python tests/properties/nightly.py replay whole_graphs {seed}"
            )


def run(seeds: range, passes: tuple[str, ...] | None = None) -> Tally:
    tally = Tally()
    for seed in seeds:
        judge(seed, tally, passes)
    return tally


def replay(seed: int) -> str:
    drawn, tally = program_of(seed), Tally()
    judge(seed, tally)
    rewritten = rewrite(drawn.module, drawn.inputs, passes=passes_of(seed), dynamic=False)
    return f"{drawn!r}\n{rewritten.graph_module.code}\n{rewritten.report}\n" + "\n".join(tally.wrong)
