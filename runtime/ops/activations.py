"""Scalar functions of the kernels, and the dtype that the references compute in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.runtime.ops.triton_kernel import kernel

if TYPE_CHECKING:
    import triton.language as tl


def wide(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@kernel
def row_offset(row, n1, n2, stride_0, stride_1, stride_2):  # type: ignore[no-untyped-def]
    """Offset of row number `row`, in 64 bits, of a block [n0, n1, n2] of rows."""
    outer = row // n2
    return outer // n1 * stride_0 + outer % n1 * stride_1 + row % n2 * stride_2


@kernel
def sigmoid(x):  # type: ignore[no-untyped-def]
    return 1.0 / (1.0 + tl.exp(-x))


@kernel
def silu(x):  # type: ignore[no-untyped-def]
    return x / (1.0 + tl.exp(-x))


@kernel
def softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)) = max(x, 0) + log1p(exp(-|x|)), to float32's relative precision for every x.

    log1p(e) = 2 artanh(s) with s = e / (2 + e) <= 1/3, by its series: fast logarithms are only good to an
    absolute error near 1, which would drift the decay of a state over many steps.
    """
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    t = s * s
    series = 1.0 / 11 + t * (1.0 / 13 + t * (1.0 / 15))
    series = 1.0 / 5 + t * (1.0 / 7 + t * (1.0 / 9 + t * series))
    return tl.maximum(x, 0.0) + 2.0 * s * (1.0 + t * (1.0 / 3 + t * series))
