"""The kernel of `silu_mul` and `sigmoid_gate_mul`: x · f(gate), one shape and any strides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops.activations import row_offset, sigmoid
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.triton_kernel import as_rows, kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

TILE = 2048  # elements of one program
COLUMNS = 1024  # of them in one row, at most


@kernel
def _gate_product(  # type: ignore[no-untyped-def]
    x,
    gate,
    out,
    rows,
    n1,
    n2,
    features,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    x_stride_c,
    gate_stride_0,
    gate_stride_1,
    gate_stride_2,
    gate_stride_c,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    mask = (row < rows)[:, None] & (column < features)[None, :]
    start = row_offset(row, n1, n2, x_stride_0, x_stride_1, x_stride_2)
    value = tl.load(x + start[:, None] + column[None, :] * x_stride_c, mask=mask, other=0.0).to(tl.float32)
    start = row_offset(row, n1, n2, gate_stride_0, gate_stride_1, gate_stride_2)
    g = tl.load(gate + start[:, None] + column[None, :] * gate_stride_c, mask=mask, other=0.0).to(tl.float32)
    weight = sigmoid(g)
    if SILU:
        weight *= g
    place = out + row[:, None] * features + column[None, :]
    tl.store(place, (value * weight).to(out.dtype.element_ty), mask=mask)


def launch(x: Tensor, gate: Tensor, silu: bool, dtype: torch.dtype) -> Tensor:
    """x · silu(gate) or x · sigmoid(gate), [..., C], in the given dtype, contiguous; one launch."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    x, gate = as_rows(x), as_rows(gate)
    n0, n1, n2, features = x.shape
    width = min(power_of_2(features), COLUMNS)
    block = TILE // width
    _gate_product[(-(-n0 * n1 * n2 // block), -(-features // width))](
        x,
        gate,
        out,
        n0 * n1 * n2,
        n1,
        n2,
        features,
        *x.stride(),
        *gate.stride(),
        SILU=silu,
        BLOCK_R=block,
        BLOCK_C=width,
        num_warps=4,
    )
    return out


def check(name: str, x: Tensor, gate: Tensor) -> None:
    """Raise where the shapes differ: the kernel would read past the end of one of them."""
    check_tensors(name, x=("[...]", x), gate=("[...]", gate))
    if x.shape != gate.shape:
        raise ShapeError(f"{name} takes tensors of one shape, not {tuple(x.shape)} and {tuple(gate.shape)}")
