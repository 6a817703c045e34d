"""The kernel of `gdn_decode`: one launch for a token of Gated DeltaNet.

A program owns a key head of one sequence with all value heads that read it, one after the other: they share
q's and k's columns of the convolution's state, which move on in place, so nobody else may be reading them.
The whole state of a value head is held in registers, because the norm needs all of its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.runtime.ops.activations import sigmoid, silu, softplus
from fxfuse.runtime.ops.recurrent_gated_delta_rule import L2_EPSILON
from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

    from fxfuse.runtime.ops.gdn_decode import Given

MAX_TILE = 128 * 128  # elements of a state: more would leave the registers of eight warps
ELEMENTS_PER_WARP = 2048


@kernel
def _convolved(  # type: ignore[no-untyped-def]
    new,
    channel,
    there,
    conv_state,
    state_stride_c,
    state_stride_s,
    weight,
    weight_stride_c,
    weight_stride_k,
    bias,
    bias_stride,
    HAS_BIAS: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """silu(convolution) of the channels [N] after a new column, which the state takes in."""
    # Columns of the state as it will be; of K - 1, the first that the taps see is the one before them.
    s = tl.arange(0, BLOCK_S).to(tl.int64) + min(COLUMNS - TAPS, 0)
    mask = there[:, None] & (s < COLUMNS)[None, :]
    place = conv_state + channel[:, None] * state_stride_c + s[None, :] * state_stride_s
    old = tl.load(place + state_stride_s, mask=mask & (s < COLUMNS - 1)[None, :], other=0.0).to(tl.float32)
    window = tl.where((s == COLUMNS - 1)[None, :], new[:, None], old)
    tap = s - (COLUMNS - TAPS)
    taps = weight + channel[:, None] * weight_stride_c + tap[None, :] * weight_stride_k
    total = tl.sum(window * tl.load(taps, mask=mask & (tap >= 0)[None, :], other=0.0).to(tl.float32), axis=1)
    if HAS_BIAS:
        total += tl.load(bias + channel * bias_stride, mask=there, other=0.0).to(tl.float32)
    # A column may be read and written by different threads: all reads come first.
    tl.debug_barrier()
    tl.store(place, window.to(conv_state.dtype.element_ty), mask=mask & (s >= 0)[None, :])
    return silu(total)


@kernel
def _gdn_decode(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    z,
    b,
    a,
    conv_state,
    conv_weight,
    conv_bias,
    A_log,
    dt_bias,
    norm_weight,
    state,
    out,
    key_heads,
    eps,
    scale,
    query_stride_b,
    query_stride_g,
    query_stride_d,
    key_stride_b,
    key_stride_g,
    key_stride_d,
    value_stride_b,
    value_stride_g,
    value_stride_h,
    value_stride_d,
    z_stride_b,
    z_stride_g,
    z_stride_h,
    z_stride_d,
    b_stride_b,
    b_stride_g,
    b_stride_h,
    a_stride_b,
    a_stride_g,
    a_stride_h,
    conv_stride_b,
    conv_stride_c,
    conv_stride_s,
    weight_stride_c,
    weight_stride_k,
    bias_stride,
    A_log_stride,
    dt_bias_stride,
    norm_stride,
    state_stride_b,
    state_stride_h,
    state_stride_k: tl.constexpr,
    state_stride_v: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    RATIO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUND_BETA: tl.constexpr,
    EPSILON: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    batch = (tl.program_id(0) // key_heads).to(tl.int64)
    group = (tl.program_id(0) % key_heads).to(tl.int64)
    i = tl.arange(0, BLOCK_K).to(tl.int64)
    j = tl.arange(0, BLOCK_V).to(tl.int64)
    in_key = i < KEY_DIM
    in_value = j < VALUE_DIM
    tile = in_key[:, None] & in_value[None, :]
    conv_state += batch * conv_stride_b
    queries = query + batch * query_stride_b + group * query_stride_g
    keys = key + batch * key_stride_b + group * key_stride_g
    channel = group * KEY_DIM + i
    q = _convolved(
        tl.load(queries + i * query_stride_d, mask=in_key, other=0.0).to(tl.float32),
        channel,
        in_key,
        conv_state,
        conv_stride_c,
        conv_stride_s,
        conv_weight,
        weight_stride_c,
        weight_stride_k,
        conv_bias,
        bias_stride,
        HAS_BIAS,
        TAPS,
        COLUMNS,
        BLOCK_S,
    )
    k = _convolved(
        tl.load(keys + i * key_stride_d, mask=in_key, other=0.0).to(tl.float32),
        channel + key_heads * KEY_DIM,
        in_key,
        conv_state,
        conv_stride_c,
        conv_stride_s,
        conv_weight,
        weight_stride_c,
        weight_stride_k,
        conv_bias,
        bias_stride,
        HAS_BIAS,
        TAPS,
        COLUMNS,
        BLOCK_S,
    )
    # Features beyond the heads' sizes are zeros throughout: loads mask them, and nothing is added to them.
    q = q * (tl.rsqrt(tl.sum(q * q, axis=0) + EPSILON) * scale)
    k = k * tl.rsqrt(tl.sum(k * k, axis=0) + EPSILON)
    scales = tl.load(norm_weight + j * norm_stride, mask=in_value, other=0.0).to(tl.float32)
    for nth in range(RATIO):
        r = group * 0 + nth  # in 64 bits, as all that strides are multiplied by
        head = group * RATIO + r
        place = state + batch * state_stride_b + head * state_stride_h
        place = place + i[:, None] * state_stride_k + j[None, :] * state_stride_v
        current = tl.load(place, mask=tile, other=0.0).to(tl.float32)
        values = value + batch * value_stride_b + group * value_stride_g + r * value_stride_h
        v = _convolved(
            tl.load(values + j * value_stride_d, mask=in_value, other=0.0).to(tl.float32),
            2 * key_heads * KEY_DIM + head * VALUE_DIM + j,
            in_value,
            conv_state,
            conv_stride_c,
            conv_stride_s,
            conv_weight,
            weight_stride_c,
            weight_stride_k,
            conv_bias,
            bias_stride,
            HAS_BIAS,
            TAPS,
            COLUMNS,
            BLOCK_S,
        )
        step = tl.load(a + batch * a_stride_b + group * a_stride_g + r * a_stride_h).to(tl.float32)
        step = softplus(step + tl.load(dt_bias + head * dt_bias_stride).to(tl.float32))
        decay = tl.exp(-tl.exp(tl.load(A_log + head * A_log_stride).to(tl.float32)) * step)
        rate = sigmoid(tl.load(b + batch * b_stride_b + group * b_stride_g + r * b_stride_h).to(tl.float32))
        if ROUND_BETA:
            rate = rate.to(b.dtype.element_ty).to(tl.float32)
        current = current * decay
        correction = (v - tl.sum(current * k[:, None], axis=0)) * rate
        current += k[:, None] * correction[None, :]
        tl.store(place, current.to(state.dtype.element_ty), mask=tile)
        result = tl.sum(current * q[:, None], axis=0)
        inverse = tl.rsqrt(tl.sum(result * result, axis=0) / VALUE_DIM + eps)
        gates = z + batch * z_stride_b + group * z_stride_g + r * z_stride_h
        gate = silu(tl.load(gates + j * z_stride_d, mask=in_value, other=0.0).to(tl.float32))
        target = out + (batch * key_heads * RATIO + head) * VALUE_DIM + j
        tl.store(target, (result * inverse * scales * gate).to(out.dtype.element_ty), mask=in_value)


def launch(given: Given) -> Tensor:
    """[B, HV, dv] of one step, both states in place."""
    batch, key_heads, ratio, dv = given.value.shape
    dk = given.key.shape[-1]
    out = torch.empty(batch, key_heads * ratio, dv, dtype=given.z.dtype, device=given.z.device)
    block_k, block_v = power_of_2(dk), power_of_2(dv)
    _gdn_decode[(batch * key_heads,)](
        given.query,
        given.key,
        given.value,
        given.z,
        given.b,
        given.a,
        given.conv_state,
        given.conv_weight,
        given.conv_weight if given.conv_bias is None else given.conv_bias,
        given.A_log,
        given.dt_bias,
        given.norm_weight,
        given.state,
        out,
        key_heads,
        given.eps,
        dk**-0.5,
        *given.query.stride(),
        *given.key.stride(),
        *given.value.stride(),
        *given.z.stride(),
        *given.b.stride(),
        *given.a.stride(),
        *given.conv_state.stride(),
        *given.conv_weight.stride(),
        0 if given.conv_bias is None else given.conv_bias.stride(0),
        given.A_log.stride(0),
        given.dt_bias.stride(0),
        given.norm_weight.stride(0),
        *given.state.stride(),
        KEY_DIM=dk,
        VALUE_DIM=dv,
        RATIO=ratio,
        HAS_BIAS=given.conv_bias is not None,
        ROUND_BETA=given.round_beta,
        EPSILON=L2_EPSILON,
        TAPS=given.conv_weight.shape[1],
        COLUMNS=given.conv_state.shape[-1],
        BLOCK_S=power_of_2(max(given.conv_state.shape[-1], given.conv_weight.shape[1])),
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=max(1, block_k * block_v // ELEMENTS_PER_WARP),
    )
    return out
