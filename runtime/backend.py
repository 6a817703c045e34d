"""The torch.compile backend: capture, passes, live weights, inner compiler."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import RestartAnalysis
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxfuse.errors import FxfuseError, UnsupportedModelError, in_one_line
from fxfuse.passes import pipeline
from fxfuse.passes.program import Weight
from fxfuse.runtime import (
    capture,
    cuda_graphs,
    inner,
    leaves,
    one_row_speed,
    trained_as_it_was,
)
from fxfuse.runtime.filled_calls import filled_call
from fxfuse.runtime.launches import blocks_of
from fxfuse.runtime.options import Options
from fxfuse.runtime.original import as_it_was
from fxfuse.runtime.parameter_names import dotted_source, unique_names
from fxfuse.runtime.parts import Rewriting, Untraceable
from fxfuse.runtime.refusals import other_tensors, refusals_of
from fxfuse.runtime.report import GraphRecord, announce
from fxfuse.runtime.sessions import Session, session_of
from fxfuse.runtime.verify import verified

log = logging.getLogger("fxfuse")


def backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Backend "fxfuse" of torch.compile; `options` are those of `Options`.

    Raises OptionError for an unknown option. Whatever else goes wrong leaves the original computation in
    place with a warning, or raises under strict.
    """
    chosen = Options.of({**(options or {}), **({"mode": mode} if mode is not None else {})})
    session = session_of(example_inputs)
    original = as_it_was(graph_module)
    try:
        return _compiled(graph_module, original, list(example_inputs), chosen, session)
    except (FxfuseError, RestartAnalysis):  # the latter asks Dynamo to trace once more
        raise
    except Exception as error:
        if chosen.strict:
            raise
        reason = f"a graph runs as it was, because compiling it failed: {in_one_line(error)}"
        if any(isinstance(x, torch.SymInt) for x in example_inputs):
            reason += "; its sizes vary: with dynamic=False a graph is compiled for each of them"
        session.report.failures += 1
        session.report.note(reason)
        log.warning(reason, exc_info=log.isEnabledFor(logging.DEBUG))
        return original


# By this name torch finds it in its registry, and forgets weak references to parameters once it has compiled.
backend.__name__ = "fxfuse"
# Dynamo asks the backend of the graph it traces whether to keep the leaves.
backend.captures_leaves = True  # type: ignore[attr-defined]
leaves.install()


def _compiled(
    graph_module: GraphModule,
    original: Callable[..., Any],
    inputs: list[Any],
    options: Options,
    session: Session,
) -> Callable[..., Any]:
    started = time.perf_counter()
    leaves.install()  # for the graphs after this one: a family may have been loaded since the last
    chosen_inner, why = inner.available(options.inner, inputs)
    if why is not None:
        session.report.warn(why)
    target = options.target_for(inputs)
    on_cpu = target == "cpu" and chosen_inner == "inductor"
    passes = pipeline.selected(options.passes, chosen_inner, target)
    if on_cpu and not session.dry_run:
        passes = one_row_speed.asked_by(passes, options.passes, inputs)
    weights = _weights(graph_module, inputs, session)
    try:
        rewriting = Rewriting(
            graph_module,
            inputs,
            weights,
            passes,
            copy_weights=options.weights == "copy",
            round_beta=options.round_beta,
            by_layer=options.mode in (None, "default") and all(each.within_layers for each in passes),
        )
    except (FxfuseError, RestartAnalysis):
        raise
    except Exception as error:
        if not isinstance(error, Untraceable) and not any(map(is_traceable_wrapper_subclass, inputs)):
            raise
        _say_untraceable(inputs, options, session)
        return original
    outcomes, phase = rewriting.outcomes(), rewriting.phase()
    record = GraphRecord(phase, *rewriting.nodes(), chosen_inner, outcomes)
    record.plan_digest = rewriting.plan().digest if rewriting.filled else ""
    record.pictures = rewriting.pictures(phase)
    if options.strict:
        _raise_on_miss(record)
    if session.dry_run:
        record.launches = (
            [block for part in rewriting.parts() for block in blocks_of(part.rewritten.graph)]
            if target == "cuda"
            else []
        )
        session.report.graphs.append(record)
        return original
    beside = inner.kernels_compiled_beside() if on_cpu else nullcontext()
    if not any(outcome.matches for outcome in outcomes.values()):
        trains = chosen_inner == "inductor" and inner.needs_gradients(inputs)
        how = "it is compiled as it is" if trains else "it runs as it was"
        with beside:
            run = trained_as_it_was.compiled(graph_module, inputs, options.mode) if trains else original
        session.report.warn(f"nothing matched in a {record.phase} graph: {how}{_first_reason(record)}")
        record.compile_seconds = time.perf_counter() - started
        session.report.graphs.append(record)
        call = _counted(run, record)
        if options.verify and trains:
            return verified(call, original, record, options.strict, session.report)
        return call

    mode = options.mode
    if not inner.needs_gradients(inputs):
        mode = cuda_graphs.mode_for(mode, phase, inputs, rewriting.uses[0].part.rewritten.graph)
    if mode != options.mode and phase == "decode":
        session.report.note(cuda_graphs.NOT_RECORDED.format(options.mode))
    with beside:
        run = rewriting.compiled(lambda graph, values: inner.compile_graph(chosen_inner, mode, graph, values))
    position = {node: i for i, node in enumerate(capture.placeholders(graph_module))}
    call = filled_call(
        run,
        [(filled, [position[member] for member in filled.members]) for filled in rewriting.filled],
        {position[node]: weight.name for node, weight in weights.items()},
        [dotted_source(node) for node in position],
        record,
        session,
        None if options.strict else original,
    )
    record.compile_seconds = time.perf_counter() - started
    session.report.graphs.append(record)  # not before: where compiling fails, nothing was rewritten
    announce(record, options.report)
    if options.verify:
        return verified(call, original, record, options.strict, session.report)
    return call


def _say_untraceable(inputs: list[Any], options: Options, session: Session) -> None:
    kinds = sorted({type(x).__name__ for x in inputs if is_traceable_wrapper_subclass(x)})
    reason = (
        f"a graph runs as it was: its weights are of the tensor subclass {', '.join(kinds)}, "
        "whose parts cannot be traced; load the model without it (torchao, or DTensor of a "
        "sharded model) to have it rewritten"
        if kinds
        else "a graph runs as it was: a transform of torch.func makes tensors in it that cannot be traced; "
        "compile the model itself, not the transformed function, to have it rewritten"
    )
    if options.strict:
        raise UnsupportedModelError(reason)
    session.report.warn(reason)
    session.report.failures += 1


def _weights(graph_module: GraphModule, inputs: list[Any], session: Session) -> dict[Node, Weight]:
    """The parameters among the inputs of Dynamo's graph."""
    parameters = {
        node: value
        for node, value in zip(capture.placeholders(graph_module), inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }
    known = {} if session.model is None else {id(p): name for name, p in session.model.named_parameters()}
    names = unique_names(
        {node: known.get(id(value)) for node, value in parameters.items()}, taken=known.values()
    )
    refused = session.refusals
    if refused is None:
        refused = refusals_of(
            session.model,
            {names[node]: value for node, value in parameters.items()},
            other_tensors(map(dotted_source, capture.placeholders(graph_module)), inputs),
        )
    return {
        node: Weight(names[node], value.requires_grad, refused.get(names[node]))
        for node, value in parameters.items()
    }


def _counted(run: Callable[..., Any], record: GraphRecord) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        record.calls += 1
        return run(*args)

    return call


def _raise_on_miss(record: GraphRecord) -> None:
    misses = [m for outcome in record.outcomes.values() for m in outcome.misses if not m.chosen]
    if misses:
        m = misses[0]
        raise UnsupportedModelError(
            f"{m.where or m.node}: {m.reason} ({len(misses)} left alone in a {record.phase} graph; "
            "strict=False leaves them as they are)"
        )
    if not any(outcome.candidates for outcome in record.outcomes.values()):
        raise UnsupportedModelError(
            f"nothing to rewrite in a {record.phase} graph of {record.nodes_before} nodes; strict=False "
            "leaves it as it is"
        )


def _first_reason(record: GraphRecord) -> str:
    misses = [m for outcome in record.outcomes.values() for m in outcome.misses]
    return f" ({misses[0].where}: {misses[0].reason})" if misses else ""
