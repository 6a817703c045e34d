"""The call of an optimised model: compiled for each set of hooks, or the model as it was."""

import inspect
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from fxfuse.errors import raised_on_purpose
from fxfuse.runtime import unread_logs
from fxfuse.runtime.backend import backend
from fxfuse.runtime.hooks import Hooks, Present
from fxfuse.runtime.options import Options
from fxfuse.runtime.report import Report
from fxfuse.runtime.sessions import Session, compiling_for
from fxfuse.runtime.varying_lengths import varying

# Prompts and tokens, over either cache, with and without gradients: more than torch's 8 for one function.
RECOMPILE_LIMIT = 64
NOTHING_CAPTURED = (
    "torch.compile captured no graph: the model runs as it was (its forward may be kept from compiling, by "
    "torch.compiler.disable say)"
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


def optimized_call(session: Session, options: Options, dynamic: bool | None) -> Callable[..., Any]:
    """The model's compiled call: says for whom graphs are compiled, and which sizes will vary."""
    model, report, mode = session.model, session.report, options.mode
    assert model is not None
    hooks = Hooks(model)
    compiled_for: dict[Present, Callable[..., Any]] = {}

    def as_it_was(why: str, *args: Any, **kwargs: Any) -> Any:
        result = nn.Module._call_impl(model, *args, **kwargs)
        report.warn(why)
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
        with compiling_for(session):
            try:
                vary = varying(args, kwargs) if dynamic is None and not _trains(model) else nullcontext()
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
        if not report.graphs and not report.failures:
            report.warn(NOTHING_CAPTURED)
        asked = getattr(vars(model).get("_last_compile_config"), "mode", None)
        if asked not in (None, "default", mode):
            report.warn(MODE_LOST.format(asked))
        return result

    # An outer torch.compile (transformers' automatic one) must not trace into this frame: ours wins.
    return torch.compiler.disable(fxfuse_call, reason=COMPILED_ALREADY)


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
    return torch.compile(own, backend=backend, options=options.given(), dynamic=dynamic, **_graph_limit())


def _graph_limit() -> dict[str, Any]:
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": RECOMPILE_LIMIT}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return {}  # torch 2.11 and 2.12 know one limit, that of the process


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
