"""RMSNorm: y = x / sqrt(mean(x²) + ε) · w, or · (1 + w) for a zero-centred weight; also of x + residual.

Formula: Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019); zero-centred as in Qwen3-Next.
The product with the weight is taken in float32 and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.activations import row_offset, wide
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.triton_kernel import as_rows, kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_FEATURES = 16384
TILE = 2048  # elements that one program normalises where rows are short


def reference(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> Tensor:
    """The norm in plain torch, computed in float32.

    Args:
        x: [..., H] in any float dtype and of any strides; weight: [H].

    Returns:
        [..., H] in the dtype of x, contiguous.
    """
    features, scale = wide(x), wide(weight)
    normed = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + scale if zero_centred else scale)).to(x.dtype).contiguous()


def add_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum, rounded before it is normed as in a model's residual stream."""
    total = (x + residual).contiguous()
    return reference(total, weight, eps, zero_centred), total


def unsupported(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> str | None:
    """Why the kernel takes these on no device, or None."""
    if x.shape[-1] > MAX_FEATURES:
        return f"{x.shape[-1]} features: one program holds at most {MAX_FEATURES}"
    return triton_kernel.unsupported(x, weight, residual)


def refusal(*given: Tensor) -> str | None:
    """Why the kernel does not take these here, or None."""
    return unsupported(*given) or triton_kernel.refusal(*given)


@kernel
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    weight,
    out,
    total,
    rows,
    n1,
    n2,
    features,
    eps,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_stride_c,
    residual_stride_0,
    residual_stride_1,
    residual_stride_2,
    residual_stride_c,
    weight_stride,
    HAS_RESIDUAL: tl.constexpr,
    ZERO_CENTRED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C).to(tl.int64)
    there = column < features
    mask = (row < rows)[:, None] & there[None, :]
    start = row_offset(row, n1, n2, x_stride_0, x_stride_1, x_stride_2)
    value = tl.load(x + start[:, None] + column[None, :] * x_stride_c, mask=mask, other=0.0).to(tl.float32)
    dense = row[:, None] * features + column[None, :]
    if HAS_RESIDUAL:
        start = row_offset(row, n1, n2, residual_stride_0, residual_stride_1, residual_stride_2)
        place = residual + start[:, None] + column[None, :] * residual_stride_c
        value += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + dense, rounded, mask=mask)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / features + eps)
    scale = tl.load(weight + column * weight_stride, mask=there, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        scale += 1.0
    normed = value * inverse[:, None] * scale[None, :]
    tl.store(out + dense, normed.to(out.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centred: bool, total: Tensor | None
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype if total is None else total.dtype, device=x.device)
    view = as_rows(x)
    other = view if residual is None else as_rows(residual)
    n0, n1, n2, features = view.shape
    width = power_of_2(features)
    block = max(1, TILE // width)
    _rms_norm[(-(-n0 * n1 * n2 // block),)](
        view,
        other,
        weight,
        out,
        out if total is None else total,
        n0 * n1 * n2,
        n1,
        n2,
        features,
        eps,
        *view.stride(),
        *other.stride(),
        weight.stride(0),
        HAS_RESIDUAL=residual is not None,
        ZERO_CENTRED=zero_centred,
        BLOCK_R=block,
        BLOCK_C=width,
        num_warps=min(16, max(4, width // 1024)),
    )
    return out


def launch(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> Tensor:
    """`reference` by the Triton kernel."""
    return _launch(x, None, weight, eps, zero_centred, None)


def add_launch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    """`add_reference` by the Triton kernel, one launch."""
    total = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    return _launch(x, residual, weight, eps, zero_centred, total), total


def _check(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    check_tensors("rms_norm", x=("[..., H]", x), weight=("[H]", weight), residual=("[..., H]", residual))
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, weight, residual) if t is not None)
        raise ShapeError(
            f"rms_norm takes x [..., H], weight [H] and a residual of the shape of x, not {shapes}"
        )


@torch.library.custom_op("fxfuse::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centred: bool) -> Tensor:
    """The norm as one node of a graph; shapes and dtypes as in `reference`."""
    _check(x, weight)
    return (launch if refusal(x, weight) is None else reference)(x, weight, eps, zero_centred)


@rms_norm.register_fake
def _(x, weight, eps, zero_centred):  # type: ignore[no-untyped-def]
    _check(x, weight)
    return x.new_empty(x.shape)


@torch.library.custom_op("fxfuse::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centred: bool
) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual) as one node of a graph."""
    _check(x, weight, residual)
    run = add_launch if refusal(x, weight, residual) is None else add_reference
    return run(x, residual, weight, eps, zero_centred)


@add_rms_norm.register_fake
def _(x, residual, weight, eps, zero_centred):  # type: ignore[no-untyped-def]
    _check(x, weight, residual)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype)
