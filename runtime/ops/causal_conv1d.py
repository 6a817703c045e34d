"""Causal depthwise convolution: y[t] = f(bias + Σ_j w[j] · x[t − K + 1 + j]), f = silu or nothing, in
float32.

Formula: the short convolution of Mamba (Gu, Dao 2023), as in Gated DeltaNet. Left of the first token stand
the columns of an earlier state, or zeros; packed sequences do not see each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.activations import silu, wide
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

BLOCK_T = 16
BLOCK_C = 128


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    apply_silu: bool,
) -> Tensor:
    """The convolution in plain torch.

    Args:
        x: [B, C, T] in any float dtype and of any strides; weight: [C, K]; bias: [C] or None.
        initial_state: [B, C, S], the columns before the first token, S >= K - 1; or None for zeros.
        seq_idx: [B, T] integers or None; a token sees only the tokens before it with its own number. Where
            it is given the state is seen by no token.

    Returns:
        [B, C, T] in the dtype of x, of the strides of a contiguous [B, T, C].
    """
    batch, channels, length = x.shape
    taps = weight.shape[1]
    if length == 0:
        return _empty(x)
    history = wide(x).new_zeros(batch, channels, taps - 1)
    if initial_state is not None and seq_idx is None:
        history = wide(initial_state)[..., initial_state.shape[-1] - taps + 1 :].to(history.dtype)
    padded = torch.cat([history, wide(x)], dim=-1)
    kernel_weight, start = wide(weight), None if bias is None else wide(bias)
    if seq_idx is None:
        out = F.conv1d(padded, kernel_weight.unsqueeze(1).to(padded.dtype), start, groups=channels)
    else:
        windows = padded.unfold(-1, taps, 1)
        numbers = torch.cat([seq_idx.new_full((batch, taps - 1), -1), seq_idx], dim=1).unfold(-1, taps, 1)
        own = (numbers == seq_idx.unsqueeze(-1)).unsqueeze(1)
        out = (windows * own * kernel_weight[:, None, :]).sum(-1)
        out = out if start is None else out + start[:, None]
    out = F.silu(out) if apply_silu else out
    return _empty(x).copy_(out)


def _empty(x: Tensor) -> Tensor:
    batch, channels, length = x.shape
    return x.new_empty(batch, length, channels).transpose(1, 2)


@kernel
def _causal_conv1d(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    initial_state,
    seq_idx,
    out,
    channels,
    length,
    state_length,
    x_stride_b,
    x_stride_c,
    x_stride_t,
    weight_stride_c,
    weight_stride_k,
    bias_stride,
    state_stride_b,
    state_stride_c,
    state_stride_t,
    seq_stride_b,
    seq_stride_t,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_SEQ: tl.constexpr,
    SILU: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK_T)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    t = (tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    there = c < channels
    tokens = x + batch * x_stride_b + c[None, :] * x_stride_c
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c * bias_stride, mask=there, other=0.0).to(tl.float32)[None, :]
    if HAS_SEQ:
        numbers = seq_idx + batch * seq_stride_b
        number = tl.load(numbers + t * seq_stride_t, mask=t < length, other=-1)
    for j in tl.static_range(TAPS):
        source = t + (j - TAPS + 1)
        seen = (source >= 0) & (source < length)
        if HAS_SEQ:
            seen = seen & (tl.load(numbers + source * seq_stride_t, mask=seen, other=-1) == number)
        place = tokens + source[:, None] * x_stride_t
        value = tl.load(place, mask=seen[:, None] & there[None, :], other=0.0).to(tl.float32)
        if HAS_STATE:
            before = initial_state + batch * state_stride_b + c[None, :] * state_stride_c
            place = before + (state_length + source)[:, None] * state_stride_t
            value += tl.load(place, mask=(source < 0)[:, None] & there[None, :], other=0.0).to(tl.float32)
        taps = weight + c * weight_stride_c + tl.full((), j, tl.int64) * weight_stride_k
        tap = tl.load(taps, mask=there, other=0.0)
        total += value * tap.to(tl.float32)[None, :]
    if SILU:
        total = silu(total)
    place = out + (batch * length + t[:, None]) * channels + c[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(t < length)[:, None] & there[None, :])


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    apply_silu: bool,
) -> Tensor:
    """`reference` by the Triton kernel, one launch."""
    out = torch.empty(x.shape[0], x.shape[2], x.shape[1], dtype=x.dtype, device=x.device).transpose(1, 2)
    batch, channels, length = x.shape
    state = None if seq_idx is not None else initial_state
    width = min(power_of_2(channels), BLOCK_C)
    _causal_conv1d[(batch * -(-length // BLOCK_T), -(-channels // width))](
        x,
        weight,
        weight if bias is None else bias,
        x if state is None else state,
        x if seq_idx is None else seq_idx,
        out,
        channels,
        length,
        0 if state is None else state.shape[-1],
        *x.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        *((0, 0, 0) if state is None else state.stride()),
        *((0, 0) if seq_idx is None else seq_idx.stride()),
        HAS_BIAS=bias is not None,
        HAS_STATE=state is not None,
        HAS_SEQ=seq_idx is not None,
        SILU=apply_silu,
        TAPS=weight.shape[1],
        BLOCK_T=BLOCK_T,
        BLOCK_C=width,
        num_warps=4,
    )
    return out


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None
) -> None:
    check_tensors(
        "causal_conv1d",
        x=("[B, C, T]", x),
        weight=("[C, K]", weight),
        bias=("[C]", bias),
        initial_state=("[B, C, S]", initial_state),
    )
    batch, channels, length = x.shape
    problems = []
    if weight.shape[0] != channels or weight.shape[1] < 1:
        problems.append(f"weight {tuple(weight.shape)} is not [C, K] with K >= 1")
    elif initial_state is not None and (
        initial_state.shape[:2] != (batch, channels) or initial_state.shape[2] < weight.shape[1] - 1
    ):
        problems.append(f"initial_state {tuple(initial_state.shape)} is not [B, C, S] with S >= K - 1")
    if bias is not None and bias.shape != (channels,):
        problems.append(f"bias {tuple(bias.shape)} is not [C]")
    if seq_idx is not None and (seq_idx.shape != (batch, length) or seq_idx.is_floating_point()):
        problems.append(f"seq_idx {tuple(seq_idx.shape)}, {seq_idx.dtype}, is not [B, T] of integers")
    if problems:
        raise ShapeError(f"causal_conv1d with x [B, C, T] {tuple(x.shape)}: {'; '.join(problems)}")


@torch.library.custom_op("fxfuse::causal_conv1d", mutates_args=())
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    apply_silu: bool,
) -> Tensor:
    """The convolution as one node of a graph; shapes and dtypes as in `reference`."""
    _check(x, weight, bias, initial_state, seq_idx)
    refused = triton_kernel.refusal(x, weight, bias, initial_state, seq_idx)
    run = launch if refused is None else reference
    return run(x, weight, bias, initial_state, seq_idx, apply_silu)


@causal_conv1d.register_fake
def _(x, weight, bias, initial_state, seq_idx, apply_silu):  # type: ignore[no-untyped-def]
    _check(x, weight, bias, initial_state, seq_idx)
    return _empty(x)
