"""The kernel of `qk_norm_rope_gate`: heads of query, key and value of some tokens in each program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

    from fxfuse.runtime.ops.qk_norm_rope_gate import Given

TILE = 2048  # elements of one program


@kernel
def _normed_and_rotated_tile(  # type: ignore[no-untyped-def]
    x,
    weight,
    cos,
    sin,
    t,
    in_t,
    stride_t,
    stride_d,
    weight_stride,
    cos_stride_t,
    cos_stride_r,
    sin_stride_t,
    sin_stride_r,
    head_dim,
    rotary,
    eps,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_T, BLOCK_D] of one head in float32."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_d = d < head_dim
    mask = in_t[:, None] & in_d[None, :]
    rows = x + t[:, None] * stride_t
    value = tl.load(rows + d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(value * value, axis=1) / head_dim + eps)[:, None]
        scale = tl.load(weight + d * weight_stride, mask=in_d, other=0.0).to(tl.float32) + 1.0
        value = value * inverse * scale[None, :]
    # The other half of each rotated pair, read again: it is in the cache of the multiprocessor.
    turns = d < rotary
    first = d < rotary // 2
    pair = tl.where(first, d + rotary // 2, d - rotary // 2)
    mask = in_t[:, None] & turns[None, :]
    other = tl.load(rows + pair[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(weight + pair * weight_stride, mask=turns, other=0.0).to(tl.float32) + 1.0
        other = other * inverse * scale[None, :]
    other = tl.where(first[None, :], -other, other)
    place = t[:, None] * cos_stride_t + d[None, :] * cos_stride_r
    c = tl.load(cos + place, mask=mask, other=1.0).to(tl.float32)
    place = t[:, None] * sin_stride_t + d[None, :] * sin_stride_r
    s = tl.load(sin + place, mask=mask, other=0.0).to(tl.float32)
    return value * c + other * s


@kernel
def _qk_norm_rope_gate(  # type: ignore[no-untyped-def]
    query,
    gate,
    key,
    value,
    q_weight,
    k_weight,
    cos,
    sin,
    key_cache,
    value_cache,
    positions,
    out,
    gate_out,
    length,
    heads,
    kv_heads,
    key_length,
    value_length,
    head_dim,
    rotary,
    eps,
    query_stride_b,
    query_stride_t,
    query_stride_h,
    query_stride_d,
    gate_stride_b,
    gate_stride_t,
    gate_stride_h,
    gate_stride_d,
    key_stride_b,
    key_stride_t,
    key_stride_h,
    key_stride_d,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    value_stride_d,
    q_weight_stride,
    k_weight_stride,
    cos_stride_b,
    cos_stride_t,
    cos_stride_r,
    sin_stride_b,
    sin_stride_t,
    sin_stride_r,
    key_cache_stride_b,
    key_cache_stride_h,
    key_cache_stride_l,
    key_cache_stride_d,
    value_cache_stride_b,
    value_cache_stride_h,
    value_cache_stride_l,
    value_cache_stride_d,
    positions_stride,
    ONE_POSITION: tl.constexpr,
    NORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK_T)
    t = (tl.program_id(0) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_t = t < length
    mask = in_t[:, None] & (d < head_dim)[None, :]
    step = t[:, None]
    cos += batch * cos_stride_b
    sin += batch * sin_stride_b
    if head < heads:
        tile = _normed_and_rotated_tile(
            query + batch * query_stride_b + head * query_stride_h,
            q_weight,
            cos,
            sin,
            t,
            in_t,
            query_stride_t,
            query_stride_d,
            q_weight_stride,
            cos_stride_t,
            cos_stride_r,
            sin_stride_t,
            sin_stride_r,
            head_dim,
            rotary,
            eps,
            NORM,
            BLOCK_D,
        )
        place = out + ((batch * heads + head) * length + step) * head_dim + d[None, :]
        tl.store(place, tile.to(out.dtype.element_ty), mask=mask)
        if GATE:
            place = gate + batch * gate_stride_b + head * gate_stride_h + step * gate_stride_t
            copied = tl.load(place + d[None, :] * gate_stride_d, mask=mask)
            place = gate_out + ((batch * length + step) * heads + head) * head_dim + d[None, :]
            tl.store(place, copied, mask=mask)
    else:
        if ONE_POSITION:
            position = tl.load(positions).to(tl.int64) + t
        else:
            position = tl.load(positions + t * positions_stride, mask=in_t, other=-1).to(tl.int64)
        mask = mask & (position >= 0)[:, None]
        kv_head = (head - heads) % kv_heads
        if head < heads + kv_heads:
            mask = mask & (position < key_length)[:, None]
            tile = _normed_and_rotated_tile(
                key + batch * key_stride_b + kv_head * key_stride_h,
                k_weight,
                cos,
                sin,
                t,
                in_t,
                key_stride_t,
                key_stride_d,
                k_weight_stride,
                cos_stride_t,
                cos_stride_r,
                sin_stride_t,
                sin_stride_r,
                head_dim,
                rotary,
                eps,
                NORM,
                BLOCK_D,
            )
            place = key_cache + batch * key_cache_stride_b + kv_head * key_cache_stride_h
            place = place + position[:, None] * key_cache_stride_l + d[None, :] * key_cache_stride_d
            tl.store(place, tile.to(key_cache.dtype.element_ty), mask=mask)
        else:
            mask = mask & (position < value_length)[:, None]
            place = value + batch * value_stride_b + kv_head * value_stride_h + step * value_stride_t
            copied = tl.load(place + d[None, :] * value_stride_d, mask=mask)
            place = value_cache + batch * value_cache_stride_b + kv_head * value_cache_stride_h
            place = place + position[:, None] * value_cache_stride_l + d[None, :] * value_cache_stride_d
            tl.store(place, copied.to(value_cache.dtype.element_ty), mask=mask)


def launch(given: Given, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """The query [B, nh, T, D] and a copy of the gate, which is the query's where there is none."""
    query, key, value, _, _, cos, sin, key_cache, value_cache, positions, eps = given
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    out = torch.empty(batch, heads, length, head_dim, dtype=query.dtype, device=query.device)
    gate_out = out if gate is None else torch.empty(query.shape, dtype=gate.dtype, device=query.device)
    gate_in = query if gate is None else gate
    weights = [query if weight is None else weight for weight in given.weights]
    cos, sin = (x.expand(batch, -1, -1) for x in (cos, sin))
    positions = positions.reshape(-1)
    width = power_of_2(head_dim)
    block = min(power_of_2(length), max(1, TILE // width))
    _qk_norm_rope_gate[(batch * -(-length // block), heads + 2 * kv_heads)](
        query,
        gate_in,
        key,
        value,
        *weights,
        cos,
        sin,
        key_cache,
        value_cache,
        positions,
        out,
        gate_out,
        length,
        heads,
        kv_heads,
        key_cache.shape[2],
        value_cache.shape[2],
        head_dim,
        cos.shape[-1],
        eps,
        *query.stride(),
        *gate_in.stride(),
        *key.stride(),
        *value.stride(),
        *(weight.stride(0) for weight in weights),
        *cos.stride(),
        *sin.stride(),
        *key_cache.stride(),
        *value_cache.stride(),
        positions.stride(0),
        ONE_POSITION=positions.numel() != length,
        NORM=given.q_weight is not None,
        GATE=gate is not None,
        BLOCK_T=block,
        BLOCK_D=width,
        num_warps=4 if block > 1 else 1,
    )
    return out, gate_out
