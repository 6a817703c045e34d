"""explain(): what optimize() would do, found on tensors without memory; nothing is changed or computed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxfuse.errors import UnsupportedModelError, raised_on_purpose
from fxfuse.passes.pipeline import Passes
from fxfuse.runtime import leaves, quantized_modules, unread_logs
from fxfuse.runtime.measure import check_named
from fxfuse.runtime.optimized_call import compiled_call
from fxfuse.runtime.options import Options
from fxfuse.runtime.refusals import refusals_of
from fxfuse.runtime.report import Report
from fxfuse.runtime.sessions import Session, compiling_for

PROMPT = 17
AFTER_A_CALL = (
    "its quantised linears may compute with values, which a dry run has not: call it after optimize() "
    "without strict, and read model.optimization_report"
)
OF_ONE_CALL = "give the keyword arguments of one call that it can answer: explain(model, inputs={...})"


def explain(
    model: nn.Module,
    *,
    inputs: Mapping[str, torch.Tensor] | None = None,
    passes: Passes = "default",
    weights: str = "auto",
    inner: str = "inductor",
    target: str = "auto",
    strict: bool = False,
) -> Report:
    """The report that optimize() would give for a prefill and the decoding of one token, under no_grad.

    Args:
        model: a model, also one on the meta device, which is taken for one on the CPU.
        inputs: keyword arguments of one call, for a model that is not a language model; by default a prompt
            of 17 tokens with a cache, then one token; both stacks of an encoder-decoder get that prompt.
        passes, weights, inner, target, strict: as in `fxfuse.optimize`. For the target "cuda" the cache is a
            static one, and the report has the kernels of each kind of block (`GraphRecord.launches`); no such
            device is needed.

    Raises UnsupportedModelError under strict where anything would be left alone, and OptionError for inputs
    without names.
    """
    if inputs is not None:
        check_named(inputs)
    options = Options.of(
        {"passes": passes, "weights": weights, "inner": inner, "target": target, "strict": strict}
    )
    leaves.install()
    report = Report(notes=quantized_modules.notes(model))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _without_memory(model, mode)
    session = Session(report, twin, dry_run=True, refusals=refusals_of(model))
    run = compiled_call(twin, options, dynamic=False)
    try:
        with compiling_for(session), unread_logs.unwritten(), mode, torch.no_grad():
            _calls(run, twin, inputs, static=target == "cuda")
    except Exception as error:
        own = raised_on_purpose(error)
        if own is not None:
            raise own from None
        advice = AFTER_A_CALL if report.notes else OF_ONE_CALL if inputs is None else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be captured: {error}" + (f"; {advice}" if advice else "")
        ) from error
    return report


def _calls(run: Any, twin: nn.Module, inputs: Mapping[str, torch.Tensor] | None, static: bool) -> None:
    if inputs is not None:
        run(**{name: torch.empty_like(value) for name, value in inputs.items()})
        return
    device = next(twin.parameters()).device
    prompt = torch.ones(1, PROMPT, dtype=torch.long, device=device)
    two_stacks = getattr(getattr(twin, "config", None), "is_encoder_decoder", False)
    given: dict[str, Any] = {"decoder_input_ids": prompt} if two_stacks else {}
    if static and not two_stacks:
        given["past_key_values"] = _static_cache(twin)
    out = run(input_ids=prompt, use_cache=True, **given)
    cache = getattr(out, "past_key_values", None)
    if cache is not None:
        token = (
            {"encoder_outputs": (out.encoder_last_hidden_state,), "decoder_input_ids": prompt[:, :1]}
            if two_stacks
            else {"input_ids": prompt[:, :1]}
        )
        run(**token, past_key_values=cache, use_cache=True)


def _static_cache(model: nn.Module) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config.get_text_config(), max_cache_len=2 * PROMPT)  # type: ignore[union-attr, operator]


def _without_memory(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same module tree, hooks included, over fake tensors of the same shapes, dtypes and devices."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        with mode if tensor.is_meta else nullcontext():
            fake = (
                torch.empty_like(tensor, device="cpu")
                if tensor.is_meta
                else mode.from_tensor(tensor.detach())
            )
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        for name, value in vars(tensor).items():  # the scales of a quantised weight, for one
            if not hasattr(fake, name):
                setattr(fake, name, value)
        memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)
