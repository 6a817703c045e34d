"""One token of Gated DeltaNet in one launch: all that stands between the input and the output projection.

Convolution step with SiLU on q | k | v, gates, l2 norms, the delta rule on the state, gated RMSNorm. The
inputs are views of the projection's row wherever it put them (`views_of_row`); nothing is copied.

Formulas: those of `causal_conv1d_update`, `gdn_gates`, `recurrent_gated_delta_rule` and `gated_rms_norm`;
everything between the inputs and the output is in float32.

A program owns a key head of one sequence with all value heads that read it, one after the other: they share
q's and k's columns of the convolution's state, which move on in place, so nobody else may be reading them.
The whole state of a value head is held in registers, because the norm needs all of its output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import (
    causal_conv1d_update,
    gated_rms_norm,
    gdn_gates,
    recurrent_gated_delta_rule,
    triton_kernel,
)
from fxfuse.runtime.ops.activations import sigmoid, silu, softplus, wide
from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

L2_EPSILON = recurrent_gated_delta_rule.L2_EPSILON
MAX_TILE = 128 * 128  # elements of a state: more would leave the registers of eight warps
ELEMENTS_PER_WARP = 2048


class Parts(NamedTuple):
    """What a row of the projections holds; r = HV / Hk value heads for each key head.

    Attributes:
        query, key: [B, Hk, dk]. value, z: [B, Hk, r, dv]. b, a: [B, Hk, r].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


def views_of_row(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, dk: int, dv: int, interleaved: bool
) -> Parts:
    """The parts as views of the projections' output.

    Args:
        qkvz: [..., 2·Hk·dk + 2·HV·dv]; ba: [..., 2·HV]; they may be two slices of one row.
        interleaved: each key head's group [q | k | r·v | r·z] and [r·b | r·a] in turn, as in Qwen3-Next;
            otherwise all q | all k | all v | all z and all b | all a, as in Qwen3.5.
    """
    r = value_heads // key_heads
    if interleaved:
        q, k, v, z = qkvz.unflatten(-1, (key_heads, -1)).split([dk, dk, r * dv, r * dv], dim=-1)
        b, a = ba.unflatten(-1, (key_heads, -1)).split([r, r], dim=-1)
        return Parts(q, k, v.unflatten(-1, (r, dv)), z.unflatten(-1, (r, dv)), b, a)
    sizes = [key_heads * dk, key_heads * dk, value_heads * dv, value_heads * dv]
    q, k, v, z = qkvz.split(sizes, dim=-1)
    b, a = ba.split([value_heads, value_heads], dim=-1)
    q, k = (x.unflatten(-1, (key_heads, dk)) for x in (q, k))
    v, z = (x.unflatten(-1, (key_heads, r, dv)) for x in (v, z))
    return Parts(q, k, v, z, *(x.unflatten(-1, (key_heads, r)) for x in (b, a)))


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    eps: float,
    round_beta: bool,
) -> Tensor:
    """The step in plain torch.

    Args:
        query, key: [B, Hk, dk]; value, z: [B, Hk, r, dv]; b, a: [B, Hk, r]; value head h = group · r + i;
            any float dtype, any strides.
        conv_state: [B, 2·Hk·dk + HV·dv, S], S >= K, channels all q | all k | all v, in place.
        conv_weight: [C, K]; conv_bias: [C] or None. A_log, dt_bias: [HV]. norm_weight: [dv].
        state: [B, HV, dk, dv], in place.
        eps: of the norm. round_beta: round β to the dtype of b, as transformers' eager code does.

    Returns:
        [B, HV, dv] in the dtype of z, contiguous.
    """
    batch, key_heads, ratio, dv = value.shape
    dk, heads = key.shape[-1], key_heads * ratio
    row = torch.cat([x.flatten(1) for x in (query, key, value)], dim=-1).unsqueeze(-1)
    moved = conv_state.to(torch.promote_types(row.dtype, conv_state.dtype))
    mixed = causal_conv1d_update.reference(wide(row), moved, conv_weight, conv_bias, True).squeeze(-1)
    conv_state.copy_(moved)
    q, k, v = mixed.split([key_heads * dk, key_heads * dk, heads * dv], dim=-1)
    g, beta = gdn_gates.reference(a.flatten(1), b.flatten(1), A_log, dt_bias, round_beta)
    out = recurrent_gated_delta_rule.reference(
        q.view(batch, 1, key_heads, dk),
        k.view(batch, 1, key_heads, dk),
        v.view(batch, 1, heads, dv),
        g.unsqueeze(1),
        beta.unsqueeze(1),
        state,
        True,
    ).squeeze(1)
    return gated_rms_norm.reference(out, z.flatten(1, 2), norm_weight, eps).to(z.dtype)


def refusal(value: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel does not take these, or None."""
    dk, dv = key.shape[-1], value.shape[-1]
    if power_of_2(dk) * power_of_2(dv) > MAX_TILE:
        return f"a state of {dk} x {dv} does not fit the registers of one program"
    return triton_kernel.refusal(value, key, *rest)


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
    s = tl.arange(0, BLOCK_S)
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
    tl.store(place, window.to(conv_state.dtype.element_ty), mask=mask)
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
    group = tl.program_id(0) % key_heads
    i = tl.arange(0, BLOCK_K)
    j = tl.arange(0, BLOCK_V)
    in_key = i < KEY_DIM
    in_value = j < VALUE_DIM
    tile = in_key[:, None] & in_value[None, :]
    conv_state += batch * conv_stride_b
    queries = query + batch * query_stride_b + group * query_stride_g
    keys = key + batch * key_stride_b + group * key_stride_g
    channel = (group * KEY_DIM + i).to(tl.int64)
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
    for r in range(RATIO):
        head = group * RATIO + r
        place = state + batch * state_stride_b + head * state_stride_h
        place = place + i[:, None] * state_stride_k + j[None, :] * state_stride_v
        current = tl.load(place, mask=tile, other=0.0).to(tl.float32)
        values = value + batch * value_stride_b + group * value_stride_g + r * value_stride_h
        v = _convolved(
            tl.load(values + j * value_stride_d, mask=in_value, other=0.0).to(tl.float32),
            (2 * key_heads * KEY_DIM + head * VALUE_DIM + j).to(tl.int64),
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


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    eps: float,
    round_beta: bool,
) -> Tensor:
    """`reference` by the Triton kernel, one launch."""
    batch, key_heads, ratio, dv = value.shape
    dk = key.shape[-1]
    out = torch.empty(batch, key_heads * ratio, dv, dtype=z.dtype, device=z.device)
    block_k, block_v = power_of_2(dk), power_of_2(dv)
    _gdn_decode[(batch * key_heads,)](
        query,
        key,
        value,
        z,
        b,
        a,
        conv_state,
        conv_weight,
        conv_weight if conv_bias is None else conv_bias,
        A_log,
        dt_bias,
        norm_weight,
        state,
        out,
        key_heads,
        eps,
        dk**-0.5,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *z.stride(),
        *b.stride(),
        *a.stride(),
        *conv_state.stride(),
        *conv_weight.stride(),
        0 if conv_bias is None else conv_bias.stride(0),
        A_log.stride(0),
        dt_bias.stride(0),
        norm_weight.stride(0),
        *state.stride(),
        KEY_DIM=dk,
        VALUE_DIM=dv,
        RATIO=ratio,
        HAS_BIAS=conv_bias is not None,
        ROUND_BETA=round_beta,
        EPSILON=L2_EPSILON,
        TAPS=conv_weight.shape[1],
        COLUMNS=conv_state.shape[-1],
        BLOCK_S=power_of_2(conv_state.shape[-1]),
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=max(1, block_k * block_v // ELEMENTS_PER_WARP),
    )
    return out


def _check(
    parts: Parts,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    per_head: tuple[Tensor, Tensor],
    norm_weight: Tensor,
    state: Tensor,
) -> None:
    batch, key_heads, ratio, dv = parts.value.shape
    dk, heads = parts.key.shape[-1], key_heads * ratio
    channels = 2 * key_heads * dk + heads * dv
    expected = {
        "query": (parts.query, (batch, key_heads, dk)),
        "key": (parts.key, (batch, key_heads, dk)),
        "z": (parts.z, (batch, key_heads, ratio, dv)),
        "b": (parts.b, (batch, key_heads, ratio)),
        "a": (parts.a, (batch, key_heads, ratio)),
        "conv_state": (conv_state, (batch, channels, conv_state.shape[-1])),
        "conv_weight": (conv_weight, (channels, conv_weight.shape[-1])),
        "conv_bias": (conv_bias, (channels,)),
        "A_log": (per_head[0], (heads,)),
        "dt_bias": (per_head[1], (heads,)),
        "norm_weight": (norm_weight, (dv,)),
        "state": (state, (batch, heads, dk, dv)),
    }
    wrong = [
        f"{name} is {tuple(x.shape)}, not {shape}"
        for name, (x, shape) in expected.items()
        if x is not None and x.shape != shape
    ]
    if conv_state.shape[-1] < conv_weight.shape[-1]:
        wrong.append(f"conv_state has {conv_state.shape[-1]} columns, not {conv_weight.shape[-1]} or more")
    if wrong:
        raise ShapeError(f"gdn_decode with value {tuple(parts.value.shape)}: {'; '.join(wrong)}")


@torch.library.custom_op("fxfuse::gdn_decode", mutates_args=("conv_state", "state"))
def gdn_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    eps: float,
    round_beta: bool = False,
) -> Tensor:
    """The step as one node of a graph, both states in place; shapes and dtypes as in `reference`."""
    parts = Parts(query, key, value, z, b, a)
    rest = (conv_weight, conv_bias, A_log, dt_bias, norm_weight, state)
    _check(parts, conv_state, conv_weight, conv_bias, (A_log, dt_bias), norm_weight, state)
    refused = refusal(value, key, query, z, b, a, conv_state, *rest)
    return (launch if refused is None else reference)(*parts, conv_state, *rest, eps, round_beta)


@gdn_decode.register_fake
def _(  # type: ignore[no-untyped-def]
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
    eps,
    round_beta=False,
):
    parts = Parts(query, key, value, z, b, a)
    _check(parts, conv_state, conv_weight, conv_bias, (A_log, dt_bias), norm_weight, state)
    batch, key_heads, ratio, dv = value.shape
    return z.new_empty((batch, key_heads * ratio, dv))
