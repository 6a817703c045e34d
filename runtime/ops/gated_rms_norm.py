"""Gated RMSNorm: y = x / sqrt(mean(x²) + ε) · w · silu(gate), in float32, rounded once.

Formula: the output norm of Gated DeltaNet (Yang et al. 2024); the weight is plain, not zero-centred.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.activations import row_offset, silu, wide
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.triton_kernel import as_rows, kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_FEATURES = 16384
TILE = 2048


def reference(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm in plain torch.

    Args:
        x, gate: [..., D] in any float dtypes and of any strides; weight: [D].

    Returns:
        [..., D] in the dtype of x, contiguous.
    """
    features = wide(x)
    normed = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + eps)
    return (normed * wide(weight) * F.silu(wide(gate))).to(x.dtype).contiguous()


def unsupported(x: Tensor, gate: Tensor, weight: Tensor) -> str | None:
    """Why the kernel takes these on no device, or None."""
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features: one program holds at most {MAX_FEATURES}"
    return triton_kernel.unsupported(x, gate, weight)


def refusal(*given: Tensor) -> str | None:
    """Why the kernel does not take these here, or None."""
    return unsupported(*given) or triton_kernel.refusal(*given)


@kernel
def _gated_rms_norm(  # type: ignore[no-untyped-def]
    x,
    gate,
    weight,
    out,
    rows,
    n1,
    n2,
    features,
    eps,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_stride_c,
    gate_stride_0,
    gate_stride_1,
    gate_stride_2,
    gate_stride_c,
    weight_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C).to(tl.int64)
    there = column < features
    mask = (row < rows)[:, None] & there[None, :]
    start = row_offset(row, n1, n2, x_stride_0, x_stride_1, x_stride_2)
    value = tl.load(x + start[:, None] + column[None, :] * x_stride_c, mask=mask, other=0.0).to(tl.float32)
    start = row_offset(row, n1, n2, gate_stride_0, gate_stride_1, gate_stride_2)
    z = tl.load(gate + start[:, None] + column[None, :] * gate_stride_c, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + column * weight_stride, mask=there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / features + eps)
    gated = value * inverse[:, None] * scale[None, :] * silu(z)
    tl.store(out + row[:, None] * features + column[None, :], gated.to(out.dtype.element_ty), mask=mask)


def launch(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference` by the Triton kernel."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, gate = as_rows(x), as_rows(gate)
    n0, n1, n2, features = x.shape
    width = power_of_2(features)
    block = max(1, TILE // width)
    _gated_rms_norm[(-(-n0 * n1 * n2 // block),)](
        x,
        gate,
        weight,
        out,
        n0 * n1 * n2,
        n1,
        n2,
        features,
        eps,
        *x.stride(),
        *gate.stride(),
        weight.stride(0),
        BLOCK_R=block,
        BLOCK_C=width,
        num_warps=min(16, max(4, width // 1024)),
    )
    return out


def _check(x: Tensor, gate: Tensor, weight: Tensor) -> None:
    check_tensors("gated_rms_norm", x=("[..., D]", x), gate=("[..., D]", gate), weight=("[D]", weight))
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ShapeError(
            "gated_rms_norm takes x and gate [..., D] and weight [D], "
            f"not {tuple(x.shape)}, {tuple(gate.shape)}, {tuple(weight.shape)}"
        )


@torch.library.custom_op("fxfuse::gated_rms_norm", mutates_args=())
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gated norm as one node of a graph; shapes and dtypes as in `reference`."""
    _check(x, gate, weight)
    return (launch if refusal(x, gate, weight) is None else reference)(x, gate, weight, eps)


@gated_rms_norm.register_fake
def _(x, gate, weight, eps):  # type: ignore[no-untyped-def]
    _check(x, gate, weight)
    return x.new_empty(x.shape)
