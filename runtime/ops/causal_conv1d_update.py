"""More tokens of a causal depthwise convolution, whose state of last columns moves on in place.

The state [B, C, S] holds the last S columns of the input; transformers keeps S = K, of which the first is
never read again. Formula: as in `causal_conv1d`, whose kernel runs where the tokens are many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import causal_conv1d, triton_kernel
from fxfuse.runtime.ops.activations import silu, wide
from fxfuse.runtime.ops.arguments import check_tensors, check_written
from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

BLOCK_C = 128
MAX_LENGTH = 8  # tokens that the kernel is unrolled over


def reference(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, apply_silu: bool) -> Tensor:
    """The step in plain torch.

    Args:
        x: [B, C, T] in any float dtype and of any strides; weight: [C, K]; bias: [C] or None.
        conv_state: [B, C, S], S >= K - 1, of any strides; becomes the last S columns of state and x.

    Returns:
        [B, C, T] in the dtype of x, of the strides of a contiguous [B, T, C].
    """
    channels, length = x.shape[1:]
    columns = torch.cat([conv_state, x], dim=-1)
    window = wide(columns)[..., conv_state.shape[-1] - weight.shape[1] + 1 :]
    out = _empty(x)
    if length:
        start = None if bias is None else wide(bias)
        y = F.conv1d(window, wide(weight).unsqueeze(1).to(window.dtype), start, groups=channels)
        out.copy_(F.silu(y) if apply_silu else y)
    conv_state.copy_(columns[..., columns.shape[-1] - conv_state.shape[-1] :])
    return out


def _empty(x: Tensor) -> Tensor:
    batch, channels, length = x.shape
    return x.new_empty(batch, length, channels).transpose(1, 2)


@kernel
def _causal_conv1d_update(  # type: ignore[no-untyped-def]
    x,
    conv_state,
    weight,
    bias,
    out,
    channels,
    x_stride_b,
    x_stride_c,
    x_stride_t,
    state_stride_b,
    state_stride_c,
    state_stride_s,
    weight_stride_c,
    weight_stride_k,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    LENGTH: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    there = c < channels
    tokens = x + batch * x_stride_b + c * x_stride_c
    state = conv_state + batch * state_stride_b + c * state_stride_c
    for t in tl.static_range(LENGTH):
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        if HAS_BIAS:
            total += tl.load(bias + c * bias_stride, mask=there, other=0.0).to(tl.float32)
        for j in tl.static_range(TAPS):
            if t + j + 1 < TAPS:
                place = state + tl.full((), COLUMNS + t + j + 1 - TAPS, tl.int64) * state_stride_s
            else:
                place = tokens + tl.full((), t + j + 1 - TAPS, tl.int64) * x_stride_t
            value = tl.load(place, mask=there, other=0.0).to(tl.float32)
            taps = weight + c * weight_stride_c + tl.full((), j, tl.int64) * weight_stride_k
            tap = tl.load(taps, mask=there, other=0.0)
            total += value * tap.to(tl.float32)
        if SILU:
            total = silu(total)
        place = out + (batch * LENGTH + t) * channels + c
        tl.store(place, total.to(out.dtype.element_ty), mask=there)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    source = LENGTH - COLUMNS + s
    mask = there[:, None] & (s < COLUMNS)[None, :]
    kept = tl.load(
        state[:, None] + (COLUMNS + source)[None, :] * state_stride_s,
        mask=mask & (source < 0)[None, :],
        other=0.0,
    ).to(tl.float32)
    kept += tl.load(
        tokens[:, None] + source[None, :] * x_stride_t, mask=mask & (source >= 0)[None, :], other=0.0
    ).to(tl.float32)
    # A column may be read and written by different threads: all reads come first.
    tl.debug_barrier()
    tl.store(state[:, None] + s[None, :] * state_stride_s, kept.to(conv_state.dtype.element_ty), mask=mask)


def launch(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, apply_silu: bool) -> Tensor:
    """`reference` by a Triton kernel: one launch, and a copy of the last columns where tokens are many."""
    if x.shape[2] > MAX_LENGTH:
        return _launch_many(x, conv_state, weight, bias, apply_silu)
    out = torch.empty(x.shape[0], x.shape[2], x.shape[1], dtype=x.dtype, device=x.device).transpose(1, 2)
    batch, channels, length = x.shape
    width = min(power_of_2(channels), BLOCK_C)
    columns = conv_state.shape[-1]
    if columns == 0 and length == 0:
        return out
    _causal_conv1d_update[(batch, -(-channels // width))](
        x,
        conv_state,
        weight,
        weight if bias is None else bias,
        out,
        channels,
        *x.stride(),
        *conv_state.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        SILU=apply_silu,
        LENGTH=length,
        TAPS=weight.shape[1],
        COLUMNS=columns,
        BLOCK_S=power_of_2(columns),
        BLOCK_C=width,
        num_warps=4,
    )
    return out


def _launch_many(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, apply_silu: bool
) -> Tensor:
    out = causal_conv1d.launch(x, weight, bias, conv_state, None, apply_silu)
    columns = x if x.shape[2] >= conv_state.shape[2] else torch.cat([conv_state, x], dim=-1)
    conv_state.copy_(columns[..., columns.shape[2] - conv_state.shape[2] :])
    return out


def _check(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(
        "causal_conv1d_update",
        x=("[B, C, T]", x),
        conv_state=("[B, C, S]", conv_state),
        weight=("[C, K]", weight),
        bias=("[C]", bias),
    )
    batch, channels, _ = x.shape
    problems = []
    if weight.shape[0] != channels or weight.shape[1] < 1:
        problems.append(f"weight {tuple(weight.shape)} is not [C, K] with K >= 1")
    elif conv_state.shape[:2] != (batch, channels) or conv_state.shape[2] < weight.shape[1] - 1:
        problems.append(f"conv_state {tuple(conv_state.shape)} is not [B, C, S] with S >= K - 1")
    if bias is not None and bias.shape != (channels,):
        problems.append(f"bias {tuple(bias.shape)} is not [C]")
    if problems:
        raise ShapeError(f"causal_conv1d_update with x [B, C, T] {tuple(x.shape)}: {'; '.join(problems)}")


@torch.library.custom_op("fxfuse::causal_conv1d_update", mutates_args=("conv_state",))
def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, apply_silu: bool
) -> Tensor:
    """The step as one node of a graph, the state in place; shapes and dtypes as in `reference`."""
    _check(x, conv_state, weight, bias)
    check_written("causal_conv1d_update", conv_state=conv_state)
    refused = triton_kernel.refusal(x, conv_state, weight, bias)
    return (launch if refused is None else reference)(x, conv_state, weight, bias, apply_silu)


@causal_conv1d_update.register_fake
def _(x, conv_state, weight, bias, apply_silu):  # type: ignore[no-untyped-def]
    _check(x, conv_state, weight, bias)
    return _empty(x)
