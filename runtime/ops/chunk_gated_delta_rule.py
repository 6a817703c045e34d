"""Gated delta rule over whole sequences as one operator: two Triton launches on a GPU, plain torch elsewhere.

Formula: `gated_delta_rule`. Long prompts in half precision run flash-linear-attention's kernels where that is
installed, as they do in transformers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse.runtime.ops import chunk_gated_delta_rule_kernel, triton_kernel
from fxfuse.runtime.ops.chunk_gated_delta_rule_backward import chunk_gated_delta_rule_backward
from fxfuse.runtime.ops.chunk_gated_delta_rule_kernel import MAX_KEY_DIM
from fxfuse.runtime.ops.gated_delta_rule import LEAST_LOG_DECAY, Given, check, reference
from fxfuse.runtime.ops.listed_once import operator

FLA_TOKENS = 2048


def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`reference` by the Triton kernels, two launches."""
    return chunk_gated_delta_rule_kernel.launch(Given(*arguments))


def unsupported(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernels take these tensors, in the order of `Given`, on no device, or None."""
    key_dim = key.shape[-1]
    if key_dim > MAX_KEY_DIM:
        return f"key heads of {key_dim}: one program holds at most {MAX_KEY_DIM}"
    return triton_kernel.unsupported(query, key, *rest)


def refusal(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernels do not take these here, or None."""
    return unsupported(query, key, *rest) or triton_kernel.refusal(query, key, *rest)


@functools.cache
def _fla() -> Callable[..., Any] | None:
    """flash-linear-attention's function, None where it is not installed or cannot be imported."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        function: Callable[..., Any] = importlib.import_module(
            "fla.ops.gated_delta_rule"
        ).chunk_gated_delta_rule
    except (ImportError, AttributeError):
        return None
    return function


@functools.cache
def _fla_takes_groups() -> bool:
    """Whether value heads may be more than key heads: before release 0.5 it silently read wrong ones."""
    version = re.match(r"(\d+)\.(\d+)", importlib.import_module("fla").__version__)
    return version is not None and (int(version[1]), int(version[2])) >= (0, 5)


def suits_fla(given: Given) -> bool:
    """Whether flash-linear-attention's kernels run where they are installed: long prompts in half precision.

    It has more launches and writes the state of every chunk to memory, so that all chunks' outputs can be
    computed at once; for float32 it multiplies with fewer digits than the reference.
    """
    dtypes = {x.dtype for x in given[:3]}
    return given.value.shape[1] >= FLA_TOKENS and len(dtypes) == 1 and given.query.dtype != torch.float32


def by_fla(function: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor]:
    """`reference` by flash-linear-attention's `chunk_gated_delta_rule`."""
    given = Given(*arguments)
    state, query, key = given.initial_state, given.query, given.key
    if query.shape[2] < given.value.shape[2] and not _fla_takes_groups():
        query, key = (x.repeat_interleave(given.value.shape[2] // x.shape[2], dim=2) for x in (query, key))
    out, state = function(
        *(x.contiguous() for x in (query, key, given.value)),
        g=given.g.clamp(min=LEAST_LOG_DECAY).contiguous(),
        beta=given.beta.contiguous(),
        scale=given.key.shape[-1] ** -0.5,
        initial_state=None if state is None else state.float().contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=given.normalise,
        cu_seqlens=None if given.cu_seqlens is None else given.cu_seqlens.long(),
    )
    return out, state.to(torch.float32)


def _run(given: Given) -> tuple[Tensor, Tensor]:
    """The rule over [B, T, ...] as one node of a graph; shapes and dtypes as in `Given`."""
    check("chunk_gated_delta_rule", *given.tensors)  # type: ignore[arg-type]
    if refusal(*given.tensors) is not None:  # type: ignore[arg-type]
        return reference(*given)
    function = _fla() if suits_fla(given) else None
    return launch(*given) if function is None else by_fla(function, *given)


def _fake(given: Given) -> tuple[Tensor, Tensor]:
    check("chunk_gated_delta_rule", *given.tensors)  # type: ignore[arg-type]
    batch, length, heads, dv = given.value.shape
    sequences = batch if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    new = given.query.new_empty
    return new((batch, length, heads, dv)), new(
        (sequences, heads, given.key.shape[-1], dv), dtype=torch.float32
    )


chunk_gated_delta_rule = operator("chunk_gated_delta_rule", _run, _fake, Given)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.normalise, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)
    ctx.set_materialize_grads(False)  # no gradient is less work than one of zeros


def _backward(ctx, grad_out, grad_state):  # type: ignore[no-untyped-def]
    *saved, cu_seqlens = ctx.saved_tensors  # once: under activation checkpointing each look unpacks them
    *rest, state = chunk_gated_delta_rule_backward(grad_out, grad_state, *saved, ctx.normalise, cu_seqlens)
    return (*rest, None if saved[5] is None else state, None, None)


chunk_gated_delta_rule.register_autograd(_backward, setup_context=_save)
