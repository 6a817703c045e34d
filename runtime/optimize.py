"""optimize() and deoptimize(): the compiled call of a model, put in place and taken away again."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from fxfuse.errors import OptionError, UnsupportedModelError, raised_on_purpose
from fxfuse.passes.pipeline import Passes
from fxfuse.runtime import backend, leaves, live_weights, quantized_modules, unread_logs, warm_up
from fxfuse.runtime.decoder_stack import inner_model
from fxfuse.runtime.hooks import Hooks, Present
from fxfuse.runtime.options import Options
from fxfuse.runtime.report import Report, grouped

log = logging.getLogger("fxfuse")

# Prompts and tokens, over either cache, with and without gradients: more than torch's 8 for one function.
RECOMPILE_LIMIT = 64
NOTHING_CAPTURED = (
    "torch.compile captured no graph: the model runs as it was (its forward may be kept from compiling, by "
    "torch.compiler.disable say)"
)
HOOKED = (
    "accelerate's hooks move weights at every call of {}: these run as they were; load the model without "
    "offloading, or onto one device, to have them rewritten"
)
MODE_LOST = (
    "generate() asked torch.compile for mode={0!r}, which is lost: optimize() has compiled the model "
    "already; model.optimize(mode={0!r}) has it, and generate(disable_compile=True) does not ask for it"
)
NO_MEMORY = (
    "the model is on the meta device: it runs as it was until it has weights, which "
    "fxfuse.load_state_dict(model, folder) gives it"
)
TRACED = "while torch.jit.trace or make_fx traces the model, it runs as it was, and that is what they see"
# Sets of hooks that a model is compiled for.
MOST_HOOKINGS = 4
NOT_CAPTURED = "torch.compile cannot capture a call, which runs as it was: {}"
# Of an exception of torch's that is part of a note.
MOST_LETTERS = 300
HOOKS_CHANGE = (
    f"hooks were added to the model or removed more than {MOST_HOOKINGS} times: with those it has not been "
    "compiled with, it runs as it was; keep the hooks and turn them on and off inside, or remove them"
)
COMPILED_ALREADY = (
    "optimize() has compiled this model already: compile what is around it without fullgraph=True, or call "
    "model.deoptimize() first"
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
        from fxfuse.runtime.explain import explain  # which needs this module

        explain(model, passes=passes, weights=weights, inner=inner, target=target, strict=True)
    if state is not None:
        deoptimize(model)
    leaves.install()
    if options.inner == "inductor" and all(p.device.type == "cpu" for p in model.parameters()):
        warm_up.begin()
    state = State(options, dynamic, Report(model=ref(model)), model._compiled_call_impl)
    session = backend.Session(state.report, model)
    model._compiled_call_impl = entry = _entry(session, options, dynamic)
    state.entry = ref(entry)
    _states[model] = state
    hooked = [name or kind for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked and state.report.note(text := HOOKED.format(", ".join(grouped(hooked)))):
        log.warning("%s", text)
    for text in quantized_modules.notes(model):
        state.report.note(text)
    return given


def compiled_call(model: nn.Module, options: Options, dynamic: bool | None) -> Callable[..., Any]:
    """What torch.compile makes of the model's call, with compiled graphs of its own.

    Dynamo keeps graphs and their guards by code object, and the outermost one of every transformers model is
    the same decorator: there, one model's graphs count towards the limit of another, and two threads in two
    models get in each other's way while they look for theirs. So each model is called from code of its own.
    """
    call, self = nn.Module._call_impl, model  # the name that Dynamo's sources begin with

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs)

    own = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, "forward", None, forward.__closure__
    )
    return torch.compile(
        own, backend=backend.backend, options=options.given(), dynamic=dynamic, **_graph_limit()
    )


def _graph_limit() -> dict[str, Any]:
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": RECOMPILE_LIMIT}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return {}  # torch 2.11 and 2.12 know one limit, that of the process


def _entry(session: backend.Session, options: Options, dynamic: bool | None) -> Callable[..., Any]:
    """The model's compiled call: says for whom graphs are compiled, and which sizes will vary."""
    model, report, mode = session.model, session.report, options.mode
    assert model is not None
    hooks = Hooks(model)
    compiled_for: dict[Present, Callable[..., Any]] = {}

    def as_it_was(why: str, *args: Any, **kwargs: Any) -> Any:
        result = nn.Module._call_impl(model, *args, **kwargs)
        if report.note(why):
            log.warning("%s", why)
        return result

    def fxfuse_call(*args: Any, **kwargs: Any) -> Any:
        if _has_no_memory(model):
            return as_it_was(NO_MEMORY, *args, **kwargs)
        if torch.jit.is_tracing() or is_fx_symbolic_tracing():  # which torch.compile raises at
            return as_it_was(TRACED, *args, **kwargs)
        compiled = compiled_for.get(present := hooks.present())
        if compiled is None:
            if len(compiled_for) == MOST_HOOKINGS:
                return as_it_was(HOOKS_CHANGE, *args, **kwargs)
            compiled = compiled_for[present] = compiled_call(model, options, dynamic)
        before = _progress(report)
        token = backend.current_session.set(session)
        try:
            vary = _varying(args, kwargs) if dynamic is None and not _trains(model) else nullcontext()
            with unread_logs.unwritten(), vary:
                result = compiled(*args, **kwargs)
        except TorchDynamoException as error:
            own = raised_on_purpose(error)
            if own is not None:
                raise own from None
            if options.strict or isinstance(error, BackendCompilerFailed) or _progress(report) != before:
                raise
            # Nothing has run. If something is wrong with the call itself, that is raised here.
            return as_it_was(NOT_CAPTURED.format(_first_lines(error)), *args, **kwargs)
        finally:
            backend.current_session.reset(token)
        nothing = not report.graphs and not report.failures
        if nothing and report.note(NOTHING_CAPTURED):
            log.warning(NOTHING_CAPTURED)
        asked = getattr(vars(model).get("_last_compile_config"), "mode", None)
        if asked not in (None, "default", mode) and report.note(MODE_LOST.format(asked)):
            log.warning(MODE_LOST.format(asked))
        return result

    # An outer torch.compile (transformers' automatic one) must not trace into this frame: ours wins.
    return torch.compiler.disable(fxfuse_call, reason=COMPILED_ALREADY)


def _progress(report: Report) -> tuple[int, int, int]:
    """What changes as soon as a graph is compiled or runs."""
    return len(report.graphs), report.failures, report.calls


def _first_lines(error: Exception) -> str:
    """What Dynamo says, and its explanation where there is one, without the advice that follows."""
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return " ".join(line for line in lines if line)[:MOST_LETTERS]


def _trains(model: nn.Module) -> bool:
    """Whether a backward may follow: Inductor fails on some of a length that varies (order of strides)."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


def _has_no_memory(model: nn.Module) -> bool:
    """Whether the model is on the meta device, and not because accelerate's hooks bring its weights in."""
    first = next(model.parameters(), None)
    return first is not None and first.is_meta and not hasattr(model, "_hf_hook")


def _lengths(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """Where a call's tensors have the length of a sequence as a size."""
    for value in (*args, *kwargs.values()):
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        if value.dim() >= 2 and value.shape[-1] > 1:
            yield value, value.dim() - 1
    for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
        if type(layer).__name__ != "DynamicLayer":
            continue
        for tensor in (layer.keys, layer.values):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[2] > 1:
                yield tensor, 2


@contextmanager
def _cache_length(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
    """Lets the length of a static cache vary in a prompt's graph: generate() makes a larger one when needed.

    Not for a decoded token, where this would cost more time than the second graph that it saves.
    """
    tokens = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
    tokens = args[0] if tokens is None and args else tokens
    is_prompt = isinstance(tokens, torch.Tensor) and tokens.dim() > 1 and tokens.shape[1] > 1
    layers = getattr(kwargs.get("past_key_values"), "layers", ()) if is_prompt else ()
    static = [layer for layer in layers if type(layer).__name__ == "StaticLayer"]
    if not static:
        yield
        return
    config: Any = torch.compiler.config
    try:
        with config.patch(dynamic_sources=r".*\.max_cache_len$"):
            yield
    finally:
        for layer in static:  # Dynamo marks what such a prompt has made: the token's graph would vary, too
            for tensor in (layer.keys, layer.values):
                if isinstance(tensor, torch.Tensor):
                    vars(tensor).pop("_dynamo_propagated_dynamic_indices", None)


@contextmanager
def _varying(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
    """Say that lengths vary before the first graph, which saves compiling one for the first length only.

    Nothing of it stays on the caller's tensors: another compilation would take it for its own.
    """
    marked: list[tuple[torch.Tensor, set[str]]] = []
    for tensor, dim in _lengths(args, kwargs):
        before = set(vars(tensor))
        if not any(map(_is_mark, before)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
            marked.append((tensor, before))
    try:
        with _cache_length(args, kwargs):
            yield
    finally:
        for tensor, before in marked:
            for name in filter(_is_mark, vars(tensor).keys() - before):
                vars(tensor).pop(name, None)


def _is_mark(attribute: str) -> bool:
    return attribute.startswith(("_dynamo_", "_has_dynamo_"))


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
    return state.report if state is not None else backend.report_of(model.parameters())
