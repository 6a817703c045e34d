"""The passes, in order, each of them all or nothing."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from fxfuse.errors import OptionError
from fxfuse.passes import (
    add_rms_norm,
    cache_lengths,
    causal_conv1d,
    causal_conv1d_update,
    depthwise_convs,
    expert_rows,
    gated_rms_norm,
    gdn_decode,
    gdn_gates,
    grouped_delta_rule,
    grouped_query_attention,
    l2_norm,
    layout_chains,
    one_query_attention,
    one_row_linears,
    qk_norm_rope_gate,
    recurrent_gated_delta_rule,
    rms_norm,
    same_input_linears,
    sigmoid_gate,
    swiglu,
)
from fxfuse.passes.normalise import fold_idle_dropout, normalise
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.output_layout import restore_output_layout
from fxfuse.passes.program import Program, module_path
from fxfuse.patterns import ops

log = logging.getLogger("fxfuse")


@dataclass(frozen=True)
class Pass:
    """A rewrite by name: `run` changes the program it is given and says what it did.

    A pass that is `for_inductor` writes what a compiler makes fast and an interpreter slow. One with a
    `target` writes what is fast on that kind of device only: calls of kernels on "cuda", say.
    """

    name: str
    run: Callable[[Program], Outcome]
    for_inductor: bool = False
    target: str | None = None
    within_layers: bool = False


Passes = str | Sequence[str | Pass]

PASSES: tuple[Pass, ...] = (
    Pass("same_input_linears", same_input_linears.run, within_layers=True),
    Pass("gdn_decode", gdn_decode.run, target="cuda"),
    Pass("recurrent_gated_delta_rule", recurrent_gated_delta_rule.run, target="cuda"),
    Pass("l2_norm", l2_norm.run, target="cuda"),
    Pass("cache_lengths", cache_lengths.run, target="cuda"),
    Pass("qk_norm_rope_gate", qk_norm_rope_gate.run, target="cuda"),
    Pass("grouped_query_attention", grouped_query_attention.run, target="cuda"),
    Pass("grouped_delta_rule", grouped_delta_rule.run, target="cuda"),
    Pass("causal_conv1d_update", causal_conv1d_update.run, target="cuda"),
    Pass("causal_conv1d", causal_conv1d.run, target="cuda"),
    Pass("gdn_gates", gdn_gates.run, target="cuda"),
    Pass("gated_rms_norm", gated_rms_norm.run, target="cuda"),
    Pass("rms_norm", rms_norm.run, target="cuda"),
    Pass("add_rms_norm", add_rms_norm.run, target="cuda"),
    Pass("swiglu", swiglu.RULE.run, target="cuda"),
    Pass("sigmoid_gate", sigmoid_gate.run, target="cuda"),
    Pass("layout_chains", layout_chains.run, within_layers=True),
    Pass("depthwise_convs", depthwise_convs.run, for_inductor=True, target="cpu", within_layers=True),
    Pass("one_query_attention", one_query_attention.run, for_inductor=True, target="cpu", within_layers=True),
    Pass("expert_rows", expert_rows.run, for_inductor=True, target="cpu", within_layers=True),
    Pass("one_row_linears", one_row_linears.run, for_inductor=True, target="cpu", within_layers=True),
)


def selected(names: Passes, inner: str, target: str = "cpu") -> tuple[Pass, ...]:
    """The passes of that name in the pipeline's order, then those given themselves, in theirs.

    "default" stands for all that suit inner backend and target. Raises OptionError, with the known names, for
    a name that no pass has.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    known = {p.name: p for p in PASSES}
    unknown = [name for name in wanted if isinstance(name, str) and name not in known and name != "default"]
    if unknown:
        raise OptionError(f"unknown pass {unknown[0]!r}: known are 'default', {', '.join(map(repr, known))}")
    suited = [p for p in PASSES if p.target in (None, target) and (inner == "inductor" or not p.for_inductor)]
    default = suited if "default" in wanted else []
    chosen = [p for p in PASSES if p.name in wanted or p in default]
    return (*chosen, *(p for p in wanted if isinstance(p, Pass)))


def apply(program: Program, passes: Sequence[Pass]) -> tuple[Program, dict[str, Outcome]]:
    """`without_code`, and code for the result, so that its graph module can be called."""
    rewritten, outcomes = without_code(program, passes)
    rewritten.write_code()
    return rewritten, outcomes


def without_code(program: Program, passes: Sequence[Pass]) -> tuple[Program, dict[str, Outcome]]:
    """Normalise and run the passes; the program given stays as it is.

    A pass that raises, or leaves a graph that does not hold together, is undone and reported as a miss; if
    the normal form fails so, no pass runs.
    """
    given, outcomes = program, {}
    program, outcome, draft = _attempt("normalise", _normalised, program)
    if outcome.misses:
        outcomes["normalise"] = outcome
        passes = ()
    for each in passes:
        program, outcomes[each.name], draft = _attempt(each.name, each.run, program, draft)
    if program is given:
        program = program.copy()
    elif any(outcome.matches for outcome in outcomes.values()):
        program, outcome, _ = _attempt(
            "output_layout", lambda p: restore_output_layout(p, _as_eager_lays_it_out(given)), program
        )
        if outcome.misses:  # what cannot be laid out as it was stays as it was
            outcomes = {name: Outcome(misses=each.misses) for name, each in outcomes.items()}
            program, outcomes["output_layout"] = given.copy(), outcome
    return program, outcomes


def _as_eager_lays_it_out(program: Program) -> Program:
    """Without idle dropouts: they hand on their input, and the fake kernel that tracing asks makes a copy."""
    if not program.calls(ops.DROPOUT):
        return program
    program = program.copy()
    fold_idle_dropout(program)
    return program


def _normalised(program: Program) -> Outcome:
    for node in program.graph.nodes:
        turns = isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags
        if turns and node.target is not torch.ops.aten.detach_.default:  # whose sizes stay
            reason = (
                f"{node.name} changes the sizes of a tensor in place: no pass knows what it is from there on"
            )
            return Outcome(misses=[Miss("normalise", module_path(node), node.name, reason)])
    normalise(program)
    return Outcome(matches=[Match("normalise", "", (), "")])


def _attempt(
    name: str, run: Callable[[Program], Outcome], program: Program, draft: Program | None = None
) -> tuple[Program, Outcome, Program | None]:
    """The program after `run`, and what it did; where it fails, the program as it was, and the reason.

    Last comes a copy of that program where there is one that nothing has changed, to be the next `draft`: to
    copy a graph costs more than most passes that find nothing in it.
    """
    attempt = draft or program.copy()
    try:
        outcome = run(attempt)
        if outcome.matches:
            attempt.graph.lint()
            attempt.refresh()
            return attempt, outcome, None
    except Exception as error:
        log.warning("pass %s was undone: %s: %s", name, type(error).__name__, error)
        reason = f"the pass failed and was undone: {type(error).__name__}: {error}"
        return program, Outcome(misses=[Miss(name, "", "", reason)]), None
    return program, outcome, attempt if attempt.is_copy_of(program) else None
