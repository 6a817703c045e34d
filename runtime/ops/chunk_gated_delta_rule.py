"""Gated delta rule over whole sequences as one operator: two Triton launches on a GPU, plain torch elsewhere.

Formula: `gated_delta_rule`. Long prompts in half precision run flash-linear-attention's kernels where that is
installed, as they do in transformers.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.chunk_gated_delta_rule_kernel import MAX_KEY_DIM, launch
from fxfuse.runtime.ops.gated_delta_rule import check, reference

FLA_TOKENS = 2048


def unsupported(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernels take these arguments, in the order of `reference`, on no device, or None."""
    key_dim = key.shape[-1]
    if key_dim > MAX_KEY_DIM:
        return f"key heads of {key_dim}: one program holds at most {MAX_KEY_DIM}"
    return triton_kernel.unsupported(query, key, *rest)


def refusal(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernels do not take these arguments here, or None."""
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


def suits_fla(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether flash-linear-attention's kernels run where they are installed: long prompts in half precision.

    It has more launches and writes the state of every chunk to memory, so that all chunks' outputs can be
    computed at once; for float32 it multiplies with fewer digits than the reference.
    """
    dtypes = {query.dtype, key.dtype, value.dtype}
    return value.shape[1] >= FLA_TOKENS and len(dtypes) == 1 and query.dtype != torch.float32


def by_fla(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalise: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference` by flash-linear-attention's `chunk_gated_delta_rule`."""
    out, state = function(
        *(x.contiguous() for x in (query, key, value)),
        g=g.contiguous(),
        beta=beta.contiguous(),
        scale=key.shape[-1] ** -0.5,
        initial_state=None if initial_state is None else initial_state.float().contiguous(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalise,
        cu_seqlens=cu_seqlens,
    )
    return out, state.to(torch.float32)


@torch.library.custom_op("fxfuse::chunk_gated_delta_rule", mutates_args=())
def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalise: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule over [B, T, ...] as one node of a graph; shapes and dtypes as in `reference`."""
    check("chunk_gated_delta_rule", query, key, value, g, beta, initial_state, cu_seqlens)
    given = (query, key, value, g, beta, initial_state)
    if refusal(*given, cu_seqlens) is not None:
        out, state = reference(*given, normalise, cu_seqlens)
        return out, state.clone() if state is initial_state else state
    function = _fla() if suits_fla(query, key, value) else None
    if function is not None:
        return by_fla(function, *given, normalise, cu_seqlens)
    return launch(*given, normalise, cu_seqlens)


@chunk_gated_delta_rule.register_fake
def _(query, key, value, g, beta, initial_state, normalise, cu_seqlens=None):  # type: ignore[no-untyped-def]
    check("chunk_gated_delta_rule", query, key, value, g, beta, initial_state, cu_seqlens)
    batch, length, heads, dv = value.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = query.new_empty((batch, length, heads, dv))
    return out, query.new_empty((sequences, heads, key.shape[-1], dv), dtype=torch.float32)


@torch.library.custom_op("fxfuse::chunk_gated_delta_rule_backward", mutates_args=())
def chunk_gated_delta_rule_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalise: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, g, beta and the initial state: autograd over the reference, recomputed.

    The last one is an empty tensor where there was no initial state.
    """
    given = [query, key, value, g, beta, *([] if initial_state is None else [initial_state])]

    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, *state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return reference(q, k, v, g, b, state[0] if state else None, normalise, cu_seqlens)

    # An operator's kernel runs below autograd; torch.func brings its own.
    outs, pull = torch.func.vjp(forward, *given)[:2]
    cotangents = tuple(
        torch.zeros_like(o) if d is None else d for o, d in zip(outs, (grad_out, grad_state), strict=True)
    )
    grads = [x.contiguous() for x in pull(cotangents)]
    return tuple(grads if initial_state is not None else [*grads, query.new_empty(0)])  # type: ignore[return-value]


@chunk_gated_delta_rule_backward.register_fake
def _(grad_out, grad_state, query, key, value, g, beta, initial_state, normalise, cu_seqlens=None):  # type: ignore[no-untyped-def]
    state = query.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return (*(x.new_empty(x.shape) for x in (query, key, value, g, beta)), state)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.normalise, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)


def _backward(ctx, grad_out, grad_state):  # type: ignore[no-untyped-def]
    *saved, cu_seqlens = ctx.saved_tensors  # once: under activation checkpointing each look unpacks them
    *rest, state = chunk_gated_delta_rule_backward(grad_out, grad_state, *saved, ctx.normalise, cu_seqlens)
    return (*rest, None if saved[5] is None else state, None, None)


chunk_gated_delta_rule.register_autograd(_backward, setup_context=_save)
