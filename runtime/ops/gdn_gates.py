"""Gates of Gated DeltaNet, log decay g = −exp(A_log) · softplus(a + dt_bias) and rate β = sigmoid(b).

Formula: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024). transformers' eager code takes the sigmoid
in the dtype of b; `round_beta` reproduces that rounding, which is otherwise left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.activations import row_offset, sigmoid, softplus, wide
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.triton_kernel import as_rows, kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_HEADS = 16384
TILE = 1024


def reference(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, round_beta: bool
) -> tuple[Tensor, Tensor]:
    """The gates in plain torch.

    Args:
        a, b: [..., HV] in any float dtype and of any strides; A_log, dt_bias: [HV], best kept in float32.
        round_beta: round β to the dtype of b.

    Returns:
        g, β: [..., HV] in float32, contiguous.
    """
    g = -wide(A_log).exp() * F.softplus(wide(a) + wide(dt_bias))
    beta = torch.sigmoid(wide(b))
    if round_beta:
        beta = beta.to(b.dtype)
    dtype = wide(a).dtype
    return g.to(dtype).contiguous(), beta.to(dtype).contiguous()


def unsupported(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> str | None:
    """Why the kernel takes these on no device, or None."""
    if a.shape[-1] > MAX_HEADS:
        return f"{a.shape[-1]} heads: one program holds at most {MAX_HEADS}"
    return triton_kernel.unsupported(a, b, A_log, dt_bias)


def refusal(*given: Tensor) -> str | None:
    """Why the kernel does not take these here, or None."""
    return unsupported(*given) or triton_kernel.refusal(*given)


@kernel
def _gdn_gates(  # type: ignore[no-untyped-def]
    a,
    b,
    A_log,
    dt_bias,
    g,
    beta,
    rows,
    n1,
    n2,
    heads,
    a_stride_0,
    a_stride_1,
    a_stride_2,
    a_stride_h,
    b_stride_0,
    b_stride_1,
    b_stride_2,
    b_stride_h,
    A_log_stride,
    dt_bias_stride,
    ROUND_BETA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.arange(0, BLOCK_H).to(tl.int64)
    there = head < heads
    mask = (row < rows)[:, None] & there[None, :]
    start = row_offset(row, n1, n2, a_stride_0, a_stride_1, a_stride_2)
    step = tl.load(a + start[:, None] + head[None, :] * a_stride_h, mask=mask, other=0.0).to(tl.float32)
    start = row_offset(row, n1, n2, b_stride_0, b_stride_1, b_stride_2)
    rate = tl.load(b + start[:, None] + head[None, :] * b_stride_h, mask=mask, other=0.0).to(tl.float32)
    speed = tl.exp(tl.load(A_log + head * A_log_stride, mask=there, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + head * dt_bias_stride, mask=there, other=0.0).to(tl.float32)
    rate = sigmoid(rate)
    if ROUND_BETA:
        rate = rate.to(b.dtype.element_ty).to(tl.float32)
    place = row[:, None] * heads + head[None, :]
    tl.store(g + place, -speed[None, :] * softplus(step + bias[None, :]), mask=mask)
    tl.store(beta + place, rate, mask=mask)


def launch(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, round_beta: bool) -> tuple[Tensor, Tensor]:
    """`reference` by the Triton kernel, one launch."""
    g, beta = (torch.empty(a.shape, dtype=torch.float32, device=a.device) for _ in range(2))
    a, b = as_rows(a), as_rows(b)
    n0, n1, n2, heads = a.shape
    width = power_of_2(heads)
    block = max(1, TILE // width)
    _gdn_gates[(-(-n0 * n1 * n2 // block),)](
        a,
        b,
        A_log,
        dt_bias,
        g,
        beta,
        n0 * n1 * n2,
        n1,
        n2,
        heads,
        *a.stride(),
        *b.stride(),
        A_log.stride(0),
        dt_bias.stride(0),
        ROUND_BETA=round_beta,
        BLOCK_R=block,
        BLOCK_H=width,
        num_warps=4,
    )
    return g, beta


def _check(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> None:
    check_tensors(
        "gdn_gates",
        a=("[..., HV]", a),
        b=("[..., HV]", b),
        A_log=("[HV]", A_log),
        dt_bias=("[HV]", dt_bias),
    )
    if a.shape != b.shape or not A_log.shape == dt_bias.shape == a.shape[-1:]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (a, b, A_log, dt_bias))
        raise ShapeError(f"gdn_gates takes a and b [..., HV], A_log and dt_bias [HV], not {shapes}")


@torch.library.custom_op("fxfuse::gdn_gates", mutates_args=())
def gdn_gates(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, round_beta: bool = False
) -> tuple[Tensor, Tensor]:
    """(g, β) as one node of a graph; shapes and dtypes as in `reference`."""
    _check(a, b, A_log, dt_bias)
    run = launch if refusal(a, b, A_log, dt_bias) is None else reference
    return run(a, b, A_log, dt_bias, round_beta)


@gdn_gates.register_fake
def _(a, b, A_log, dt_bias, round_beta=False):  # type: ignore[no-untyped-def]
    _check(a, b, A_log, dt_bias)
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(a.shape, dtype=dtype), a.new_empty(a.shape, dtype=dtype)
