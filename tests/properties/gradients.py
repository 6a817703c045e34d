"""Graphs whose inputs and parameters need gradients: outputs and gradients are those of the untouched graph.

Odd seeds are mutants of one block, even ones random programs; all go through Dynamo.
"""

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from near_misses import MUTANTS_EACH, original, passes_of, poisoned
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves
from whole_graphs import PREFILL

from fxfuse import Report
from fxfuse.runtime.sessions import report_of
from fxfuse.testing.mutants import CHANGES, near_miss
from fxfuse.testing.programs import EXACT, random_program
from fxfuse.testing.tensors import integer_tensor

# Where memory is shared, a gradient may go astray; in half of the draws these come first.
SHARING = (
    "turned in place",
    "a view of what is detached",
    "a copy that is written",
    "a result that is stored",
    "outputs in one memory",
    "a constant that is written",
    "a mutation in between",
)
# Of the largest gradient: sums of many products, added up in another order.
TOLERANCE = 1e-4


@dataclass
class Tally:
    """How many graphs, by kind of change, how many were rewritten, and what went wrong.

    `untrainable` could not be differentiated as they were, which says nothing about a rewrite.
    """

    graphs: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    rewritten: int = 0
    untrainable: int = 0
    undone: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def drawn(seed: int) -> tuple[str, str, GraphModule, tuple[Tensor, ...]]:
    """The kind, what was changed, the graph and its inputs; raises ValueError where no change was found."""
    rng = random.Random(seed)
    if seed % 2 == 0:
        blocks = rng.choice((EXACT, PREFILL))
        program = random_program(rng, blocks=blocks, seed=seed, length=rng.choice((1, 4)))
        return "a program", ", ".join(program.blocks), program.module, program.inputs
    name, module, inputs, values = original(seed // MUTANTS_EACH)
    kinds = rng.sample(list(CHANGES), len(CHANGES))
    if rng.random() < 0.5:
        kinds.sort(key=lambda kind: kind not in SHARING)
    kinds.remove("an autocast region")  # its rounding is no matter of gradients
    mutant = near_miss(module, inputs, rng, kinds, values)
    return mutant.kind, f"{name}, {mutant.change}", mutant.module, inputs


def trained(module: nn.Module, call: Callable[..., Any], inputs: Sequence[Tensor], seed: int) -> list[Any]:
    """Outputs, inputs as the graph leaves them, and the gradients of all floating inputs and parameters."""
    leaves = [copy.deepcopy(x).requires_grad_(x.is_floating_point()) for x in inputs]
    given = [leaf.clone() for leaf in leaves]  # what is a leaf cannot be written in place
    with torch.enable_grad():
        outputs = [y for y in tree_leaves(call(*given)) if isinstance(y, Tensor)]
        products = [
            (y * integer_tensor(y.shape, seed + i, dtype=y.dtype)).sum().double()
            for i, y in enumerate(outputs)
            if y.requires_grad
        ]
        wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        gradients: Sequence[Any] = [None] * len(wanted)
        if products:
            gradients = torch.autograd.grad(sum(products), wanted, allow_unused=True)  # type: ignore[arg-type]
    return [*(y.detach() for y in (*outputs, *given)), *gradients]


def judge(seed: int, tally: Tally, passes: tuple[str, ...] | None = None) -> None:
    """Compile one graph and compare; whatever goes wrong is noted with the command that repeats it."""
    again = f"    python tests/properties/nightly.py replay gradients {seed}"
    with poisoned():
        try:
            kind, change, module, inputs = drawn(seed)
        except ValueError:
            return
        rng = random.Random(~seed)
        share = rng.choice((0.0, 0.0, 0.5, 1.0))  # mostly frozen: linears of trained weights stay as they are
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and rng.random() < share)
        mine = copy.deepcopy(module)
        try:
            expected = trained(module, module.forward, inputs, seed)
        except RuntimeError:
            tally.untrainable += 1
            return
        tally.graphs += 1
        tally.kinds[kind] += 1
        block = original(seed // MUTANTS_EACH)[0] if seed % 2 else "projections"
        options = {"inner": "eager", "passes": passes_of(seed, block, passes), "report": "off"}
        torch._dynamo.reset()
        try:
            compiled = torch.compile(mine, backend="fxfuse", options=options, dynamic=False)
            why = _difference(expected, trained(mine, compiled, inputs, seed))
            _note(report_of(mine.parameters()), tally, f"{kind} ({change})", again)
        except Exception as error:
            why = f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if why is not None:
        tally.wrong.append(f"{kind} ({change}): {why}\n{again}")


def _note(report: Report | None, tally: Tally, what: str, again: str) -> None:
    """What the backend said: whether something matched, and which passes or graphs failed."""
    if report is None:  # of a graph without parameters, which nobody asks for its report
        return
    tally.rewritten += bool(report.matched)
    failed = [miss.reason for miss in report.misses if "undone" in miss.reason]
    failed += [note for note in report.notes if "failed" in note]
    tally.undone += [f"{what}: {reason}\n{again}" for reason in failed]


def _difference(expected: Sequence[Any], got: Sequence[Any]) -> str | None:
    for number, (e, g) in enumerate(zip(expected, got, strict=True)):
        if e is None or g is None:
            if e is not g:
                return f"{number}: a gradient that is {'missing' if g is None else 'too many'}"
            continue
        if e.dtype != g.dtype or e.shape != g.shape:
            return f"{number}: {g.dtype} {tuple(g.shape)} instead of {e.dtype} {tuple(e.shape)}"
        if not e.is_floating_point():
            if not torch.equal(e, g):
                return f"{number}: other values"
            continue
        scale = float(e.nan_to_num(0, 0, 0).abs().max()) if e.numel() else 0.0
        if not torch.allclose(e, g, rtol=0, atol=TOLERANCE * scale, equal_nan=True):
            off = float((e.double() - g.double()).abs().nan_to_num(torch.inf).max())
            return f"{number} (outputs, inputs, gradients): largest difference {off:.3g} at scale {scale:.3g}"
    return None


def run(seeds: Sequence[int], passes: tuple[str, ...] | None = None) -> Tally:
    tally = Tally()
    for seed in seeds:
        judge(seed, tally, passes)
    return tally


def replay(seed: int) -> str:
    kind, change, module, _ = drawn(seed)
    tally = Tally()
    judge(seed, tally)
    return f"{kind}: {change}\n{module.code}\n{tally}"
