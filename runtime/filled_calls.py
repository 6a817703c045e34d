"""The call of a compiled graph: its fused weights are filled in, or the graph as it was is run instead."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxfuse.errors import in_one_line
from fxfuse.runtime import live_weights
from fxfuse.runtime.parts import Filled
from fxfuse.runtime.refusals import other_tensors, refusals_of
from fxfuse.runtime.report import GraphRecord, Report
from fxfuse.runtime.sessions import Session, remember

ALIASED = (
    "tensors taken from the parameters before the first call, such as a state dict, no longer share their "
    "memory: writing to one does not change the model"
)
PACKED = "now lie in fused memory"


def filled_call(
    run: Callable[..., Any],
    filled: Sequence[tuple[Filled, Sequence[int]]],
    named: Mapping[int, str],
    sources: Sequence[str],
    record: GraphRecord,
    session: Session,
    original: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """`run` with its fused inputs filled in, or `original` where they cannot be, for want of memory say.

    `filled` has each of them with the positions of its members among the arguments, `named` what the
    parameters are called, by position, and `sources` where every argument came from.
    """
    slots: list[live_weights.SharedSlot | live_weights.CopiedSlot] = [
        live_weights.SharedSlot()
        if each.fused.shares_memory
        else live_weights.CopiedSlot(each.fused, each.names)
        for each, _ in filled
    ]
    model = weakref.ref(session.model) if session.model is not None else lambda: None

    def refused(args: Sequence[Any]) -> dict[int, str]:
        root = model()  # one graph may serve several of its modules, so that names are those of the call
        known = {} if root is None else {id(p): name for name, p in root.named_parameters()}
        names = {i: known.get(id(args[i])) or f"{name} ({i})" for i, name in named.items()}
        found = refusals_of(root, {name: args[i] for i, name in names.items()}, other_tensors(sources, args))
        return {i: f"{name}: {found[name]}" for i, name in names.items() if name in found}

    weights = live_weights.LiveWeights(slots, [positions for _, positions in filled], refused, list(named))
    members = {i for each, positions in filled if each.fused.shares_memory for i in positions}
    # Dynamo keeps compiled calls for as long as the code of a model's class: they may not hold the model.
    report, anonymous = session.report, session.anonymous

    def call(*args: Any) -> Any:
        aliased = weights.packs == 0 and any(live_weights.has_aliases(args[i]) for i in members)
        try:
            tensors = weights.fused(args)
        except Exception as error:
            if original is None:
                raise
            refusal = isinstance(error, live_weights.Refused)
            why = str(error) if refusal else f"packing failed: {in_one_line(error)}"
            report.warn(f"a graph runs as it was, because {why}")
            return original(*args)
        record.calls += 1
        if weights.packs != record.packs:
            record.packs = weights.packs
            report.packed_bytes = max(
                report.packed_bytes, live_weights.packed_bytes(args[i] for i in members)
            )
            report.count_copies(weights.copies)
            if aliased:
                report.note(ALIASED)
            if anonymous:
                remember(report, args)  # which may be others than those the graph was compiled for
                if report.packed_bytes:
                    _say_packed(report)
        return run(*args, *tensors)

    return call


def _say_packed(report: Report) -> None:
    if not any(PACKED in note for note in report.notes):  # with what was packed first
        report.warn(
            f"{report.packed_bytes / 1e6:.1f} MB of the caller's parameters {PACKED}: same objects, names "
            "and values; fxfuse.deoptimize(model) gives each its own memory again"
        )
