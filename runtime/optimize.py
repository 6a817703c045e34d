"""optimize() and deoptimize(): the compiled call of a model, put in place and taken away again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from fxfuse.errors import OptionError, UnsupportedModelError
from fxfuse.passes.pipeline import Passes
from fxfuse.runtime import leaves, live_weights, quantized_modules, warm_up
from fxfuse.runtime.decoder_stack import inner_model
from fxfuse.runtime.explain import explain
from fxfuse.runtime.grouped_names import grouped
from fxfuse.runtime.optimized_call import optimized_call
from fxfuse.runtime.options import Options
from fxfuse.runtime.report import Report
from fxfuse.runtime.sessions import Session, report_of

HOOKED = (
    "accelerate's hooks move weights at every call of {}: these run as they were; load the model without "
    "offloading, or onto one device, to have them rewritten"
)


@dataclass
class State:
    """What optimize() keeps about a model, away from the model."""

    options: Options
    dynamic: bool | None
    report: Report
    call_before: Callable[..., Any] | None
    entry: Callable[[], Callable[..., Any] | None] = lambda: None  # weak: the entry holds the model


_states: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()


def optimize(
    model: nn.Module,
    *,
    passes: Passes = "default",
    weights: str = "auto",
    inner: str = "inductor",
    target: str = "auto",
    mode: str | None = None,
    dynamic: bool | None = None,
    round_beta: bool = False,
    strict: bool = False,
    verify: bool = False,
    report: str = "auto",
    **unknown: Any,
) -> nn.Module:
    """Rewrite the model's computation in place; returns the same model.

    Of a wrapped model (PEFT, a value head, DDP, torch.compile) the transformers model inside is rewritten.
    Nothing is compiled or moved before the first call. Calling it again with the same options changes
    nothing, with others it starts anew. The keywords are those of `fxfuse.runtime.options.Options`; `dynamic`
    is torch.compile's, where None lets lengths vary from the first graph on.

    Raises OptionError for an unknown option, pass or value, UnsupportedModelError under strict where anything
    would be left alone; the model is then as it was. What is no language model (its forward takes no
    `input_ids`) cannot be asked before: there the first call raises.
    """
    options = Options.of(
        {
            "passes": passes,
            "weights": weights,
            "inner": inner,
            "target": target,
            "mode": mode,
            "round_beta": round_beta,
            "strict": strict,
            "verify": verify,
            "report": report,
            **unknown,
        }
    )
    if dynamic not in (None, True, False):
        raise OptionError(f"dynamic={dynamic!r}: allowed are None, True, False")
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"optimize() takes a torch.nn.Module, not a {type(model).__name__}")
    given, model = model, inner_model(model)
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(f"{kind} is TorchScript: give the nn.Module that it was made from")
    state = _states.get(model) if is_optimized(model) else None
    if state is not None and (state.options, state.dynamic) == (options, dynamic):
        return given
    if strict and "input_ids" in inspect.signature(model.forward).parameters:
        explain(model, passes=passes, weights=weights, inner=inner, target=target, strict=True)
    if state is not None:
        deoptimize(model)
    leaves.install()
    if options.inner == "inductor" and all(p.device.type == "cpu" for p in model.parameters()):
        warm_up.begin()
    state = State(options, dynamic, Report(model=ref(model)), model._compiled_call_impl)
    session = Session(state.report, model)
    model._compiled_call_impl = entry = optimized_call(session, options, dynamic)
    state.entry = ref(entry)
    _states[model] = state
    hooked = [name or kind for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        state.report.warn(HOOKED.format(", ".join(grouped(hooked))))
    for text in quantized_modules.notes(model):
        state.report.note(text)
    return given


def is_optimized(model: nn.Module) -> bool:
    """Whether the model's call is ours now; a copy of an optimised model is a plain model."""
    model = inner_model(model)
    state = _states.get(model)
    call = model._compiled_call_impl
    return state is not None and call is not None and call is state.entry()


def deoptimize(model: nn.Module) -> nn.Module:
    """Undo optimize(), and any packing of torch.compile(model, backend="fxfuse"); returns the same model.

    The original forward, the same Parameter objects with their bits and strides, each in memory of its own.
    A call that the caller has compiled since stays.
    """
    given, model = model, inner_model(model)
    ours = is_optimized(model)
    state = _states.pop(model, None)
    if state is not None and ours:
        model._compiled_call_impl = state.call_before
    live_weights.unpack(model.parameters())
    return given


@contextmanager
def optimized(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """The model, optimised inside the with block and as it was after it."""
    optimize(model, **options)
    try:
        yield model
    finally:
        deoptimize(model)


def optimization_report(model: nn.Module) -> Report | None:
    """The report of an optimised model, or of graphs that torch.compile(backend="fxfuse") made for it."""
    model = inner_model(model)
    state = _states.get(model)
    return state.report if state is not None else report_of(model.parameters())
