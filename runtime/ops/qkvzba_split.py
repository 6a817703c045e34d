"""The projection's row taken apart into contiguous tensors: q|k|v, z, b and a, by one copy.

This package's own kernels do not need it: they read the row in place, through the views of
`gdn_decode.views_of_row`. It runs only before what takes dense tensors alone, such as another library's
kernels after Qwen3-Next's interleaved projection; as one launch instead of four copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.activations import row_offset
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.gdn_decode import views_of_row
from fxfuse.runtime.ops.triton_kernel import as_rows, kernel

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024


def reference(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, dk: int, dv: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The split in plain torch.

    Args:
        qkvz: [..., 2·Hk·dk + 2·HV·dv]; ba: [..., 2·HV]; any strides; they may be slices of one row.
        interleaved: as in `views_of_row`.

    Returns:
        mixed_qkv [..., 2·Hk·dk + HV·dv], all q | all k | all v; z [..., HV, dv]; b, a [..., HV]; contiguous.
    """
    parts = views_of_row(qkvz, ba, key_heads, value_heads, dk, dv, interleaved)
    mixed = torch.cat([parts.query.flatten(-2), parts.key.flatten(-2), parts.value.flatten(-3)], dim=-1)
    dense = (parts.z.flatten(-3, -2), parts.b.flatten(-2), parts.a.flatten(-2))
    return (mixed, *(x.clone(memory_format=torch.contiguous_format) for x in dense))  # type: ignore[return-value]


@kernel
def _qkvzba_split(  # type: ignore[no-untyped-def]
    qkvz,
    ba,
    mixed,
    z,
    b,
    a,
    n1,
    n2,
    key_heads,
    qkvz_stride_0,
    qkvz_stride_1,
    qkvz_stride_2,
    qkvz_stride_c,
    ba_stride_0,
    ba_stride_1,
    ba_stride_2,
    ba_stride_c,
    RATIO: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    qkvz += row_offset(row, n1, n2, qkvz_stride_0, qkvz_stride_1, qkvz_stride_2)
    ba += row_offset(row, n1, n2, ba_stride_0, ba_stride_1, ba_stride_2)
    keys = key_heads * KEY_DIM
    group: tl.constexpr = RATIO * VALUE_DIM
    values = key_heads * group
    channels = 2 * keys + values
    heads = key_heads * RATIO

    # Columns of the outputs laid end to end, mixed | z | b | a, and where in the row each comes from.
    source = column
    if INTERLEAVED:
        width: tl.constexpr = 2 * KEY_DIM + 2 * group
        in_q = column // KEY_DIM * width + column % KEY_DIM
        k = column - keys
        in_k = k // KEY_DIM * width + KEY_DIM + k % KEY_DIM
        v = column - 2 * keys
        in_v = v // group * width + 2 * KEY_DIM + v % group
        g = column - channels
        in_z = g // group * width + 2 * KEY_DIM + group + g % group
        source = tl.where(column < keys, in_q, tl.where(column < 2 * keys, in_k, in_v))
        source = tl.where(column < channels, source, in_z)
    value = tl.load(qkvz + source * qkvz_stride_c, mask=column < channels + values)
    tl.store(mixed + row * channels + column, value, mask=column < channels)
    gate = column - channels
    tl.store(z + row * values + gate, value, mask=(gate >= 0) & (gate < values))

    head = gate - values
    in_b, in_a = head, head
    if INTERLEAVED:
        in_b = head // RATIO * (2 * RATIO) + head % RATIO
        rest = head - heads
        in_a = rest // RATIO * (2 * RATIO) + RATIO + rest % RATIO
    is_b = (head >= 0) & (head < heads)
    is_a = (head >= heads) & (head < 2 * heads)
    value = tl.load(ba + tl.where(is_b, in_b, in_a) * ba_stride_c, mask=is_b | is_a)
    tl.store(b + row * heads + head, value, mask=is_b)
    tl.store(a + row * heads + head - heads, value, mask=is_a)


def launch(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, dk: int, dv: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference` by the Triton kernel, one launch."""
    outs = _empty(qkvz, ba, key_heads, value_heads, dk, dv)
    qkvz, ba = as_rows(qkvz), as_rows(ba)
    n0, n1, n2, width = qkvz.shape
    _qkvzba_split[(n0 * n1 * n2, -(-(width + ba.shape[-1]) // BLOCK))](
        qkvz,
        ba,
        *outs,
        n1,
        n2,
        key_heads,
        *qkvz.stride(),
        *ba.stride(),
        RATIO=value_heads // key_heads,
        KEY_DIM=dk,
        VALUE_DIM=dv,
        INTERLEAVED=interleaved,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return outs


def _empty(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, dk: int, dv: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lead = qkvz.shape[:-1]
    return (
        qkvz.new_empty(*lead, 2 * key_heads * dk + value_heads * dv),
        qkvz.new_empty(*lead, value_heads, dv),
        ba.new_empty(*lead, value_heads),
        ba.new_empty(*lead, value_heads),
    )


def _check(qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, dk: int, dv: int) -> None:
    check_tensors("qkvzba_split", qkvz=("[..., F]", qkvz), ba=("[..., 2·HV]", ba))
    width = 2 * key_heads * dk + 2 * value_heads * dv
    if key_heads < 1 or value_heads % key_heads or qkvz.shape[-1] != width:
        raise ShapeError(
            f"qkvzba_split: {qkvz.shape[-1]} features are not q, k, v and z of {key_heads} key heads of {dk} "
            f"and {value_heads} value heads of {dv}"
        )
    if ba.shape != (*qkvz.shape[:-1], 2 * value_heads):
        raise ShapeError(f"qkvzba_split: ba {tuple(ba.shape)} is not b and a of {value_heads} heads")


@torch.library.custom_op("fxfuse::qkvzba_split", mutates_args=())
def qkvzba_split(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, dk: int, dv: int, interleaved: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mixed_qkv, z, b, a) as one node of a graph; shapes as in `reference`."""
    _check(qkvz, ba, key_heads, value_heads, dk, dv)
    run = launch if triton_kernel.refusal(qkvz, ba) is None else reference
    return run(qkvz, ba, key_heads, value_heads, dk, dv, interleaved)


@qkvzba_split.register_fake
def _(qkvz, ba, key_heads, value_heads, dk, dv, interleaved):  # type: ignore[no-untyped-def]
    _check(qkvz, ba, key_heads, value_heads, dk, dv)
    return _empty(qkvz, ba, key_heads, value_heads, dk, dv)
