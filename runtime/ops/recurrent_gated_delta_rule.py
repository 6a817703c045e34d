"""Gated delta rule token by token, the state moving on in place: the form for one or a few tokens.

S_t = exp(g_t) S_{t-1};  S_t += k_t ⊗ β_t (v_t − S_tᵀ k_t);  o_t = S_tᵀ q_t / √dk. Formula: Yang, Kautz,
Hatamizadeh, "Gated Delta Networks" (2024). The state is [B, HV, dk, dv] as transformers keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.activations import wide
from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

L2_EPSILON = 1e-6
MAX_KEY_DIM = 256
BLOCK_V = 32


def reference(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, normalise: bool
) -> Tensor:
    """The rule in plain torch, computed in float32.

    Args:
        query, key: [B, T, Hk, dk]; value: [B, T, HV, dv], HV a multiple of Hk: value head h reads key head
            h // (HV / Hk); any float dtype, any strides.
        g, beta: [B, T, HV]; g is the logarithm of the decay.
        state: [B, HV, dk, dv] of any strides, in place.
        normalise: l2-normalise query and key over dk.

    Returns:
        [B, T, HV, dv] in the dtype of query, contiguous.
    """
    ratio = value.shape[2] // key.shape[2]
    q, k, v, decay, rate = (wide(x) for x in (query, key, value, g, beta))
    if normalise:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON) for x in (q, k))
    q, k = (x.repeat_interleave(ratio, dim=2) for x in (q * key.shape[-1] ** -0.5, k))
    decay = decay.exp()
    current = wide(state).to(torch.promote_types(v.dtype, state.dtype))
    out = torch.empty(value.shape, dtype=query.dtype, device=value.device)
    for t in range(value.shape[1]):
        current = current * decay[:, t, :, None, None]
        correction = (v[:, t] - (current * k[:, t, :, :, None]).sum(-2)) * rate[:, t, :, None]
        current = current + k[:, t, :, :, None] * correction.unsqueeze(-2)
        out[:, t] = (current * q[:, t, :, :, None]).sum(-2)
    state.copy_(current)
    return out


def unsupported(*tensors: Tensor) -> str | None:
    """Why the kernel takes these arguments, in the order of `reference`, on no device, or None."""
    key_dim = tensors[1].shape[-1]
    if key_dim > MAX_KEY_DIM:
        return f"key heads of {key_dim}: one program holds at most {MAX_KEY_DIM}"
    return triton_kernel.unsupported(*tensors)


def refusal(*tensors: Tensor) -> str | None:
    """Why the kernel does not take these arguments here, or None."""
    return unsupported(*tensors) or triton_kernel.refusal(*tensors)


@kernel
def _recurrent_gated_delta_rule(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    g,
    beta,
    state,
    out,
    length,
    value_heads,
    ratio,
    key_dim,
    value_dim,
    scale,
    query_stride_b,
    query_stride_t,
    query_stride_h,
    query_stride_d,
    key_stride_b,
    key_stride_t,
    key_stride_h,
    key_stride_d,
    value_stride_b,
    value_stride_t,
    value_stride_h,
    value_stride_d,
    g_stride_b,
    g_stride_t,
    g_stride_h,
    beta_stride_b,
    beta_stride_t,
    beta_stride_h,
    state_stride_b,
    state_stride_h,
    state_stride_k,
    state_stride_v,
    NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i = tl.arange(0, BLOCK_K)
    j = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    batch = (tl.program_id(1) // value_heads).to(tl.int64)
    head = tl.program_id(1) % value_heads
    in_key = i < key_dim
    in_value = j < value_dim
    tile = in_key[:, None] & in_value[None, :]
    place = state + batch * state_stride_b + head * state_stride_h
    place = place + i[:, None] * state_stride_k + j[None, :] * state_stride_v
    current = tl.load(place, mask=tile, other=0.0).to(tl.float32)
    query += batch * query_stride_b + head // ratio * query_stride_h
    key += batch * key_stride_b + head // ratio * key_stride_h
    value += batch * value_stride_b + head * value_stride_h
    g += batch * g_stride_b + head * g_stride_h
    beta += batch * beta_stride_b + head * beta_stride_h
    out += (batch * length * value_heads + head) * value_dim
    for _ in range(length):
        q = tl.load(query + i * query_stride_d, mask=in_key, other=0.0).to(tl.float32)
        k = tl.load(key + i * key_stride_d, mask=in_key, other=0.0).to(tl.float32)
        v = tl.load(value + j * value_stride_d, mask=in_value, other=0.0).to(tl.float32)
        rate = tl.load(beta).to(tl.float32)
        if NORMALISE:
            q = q * tl.rsqrt(tl.sum(q * q, axis=0) + EPSILON)
            k = k * tl.rsqrt(tl.sum(k * k, axis=0) + EPSILON)
        current = current * tl.exp(tl.load(g).to(tl.float32))
        correction = (v - tl.sum(current * k[:, None], axis=0)) * rate
        current += k[:, None] * correction[None, :]
        result = tl.sum(current * q[:, None], axis=0) * scale
        tl.store(out + j, result.to(out.dtype.element_ty), mask=in_value)
        query += query_stride_t
        key += key_stride_t
        value += value_stride_t
        g += g_stride_t
        beta += beta_stride_t
        out += value_heads * value_dim
    tl.store(place, current.to(state.dtype.element_ty), mask=tile)


def launch(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, normalise: bool
) -> Tensor:
    """`reference` by the Triton kernel, one launch."""
    out = torch.empty(value.shape, dtype=query.dtype, device=value.device)
    batch, length, value_heads, value_dim = value.shape
    key_heads, key_dim = key.shape[2:]
    block_k = power_of_2(key_dim)
    block_v = min(power_of_2(value_dim), BLOCK_V)
    _recurrent_gated_delta_rule[(-(-value_dim // block_v), batch * value_heads)](
        query,
        key,
        value,
        g,
        beta,
        state,
        out,
        length,
        value_heads,
        value_heads // key_heads,
        key_dim,
        value_dim,
        key_dim**-0.5,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *g.stride(),
        *beta.stride(),
        *state.stride(),
        NORMALISE=normalise,
        EPSILON=L2_EPSILON,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=max(1, block_k * block_v // 1024),
    )
    return out


def check(
    name: str, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> None:
    """Raise where shapes do not belong together."""
    batch, length, heads, dv = value.shape
    key_heads, dk = key.shape[2:]
    if (
        query.shape != key.shape
        or key.shape[:2] != (batch, length)
        or heads % key_heads
        or not g.shape == beta.shape == (batch, length, heads)
        or state.shape != (batch, heads, dk, dv)
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value, g, beta, state))
        raise ShapeError(
            f"{name} takes query and key [B, T, Hk, dk], value [B, T, HV, dv] with HV a multiple of Hk, "
            f"g and beta [B, T, HV] and a state [B, HV, dk, dv], not {shapes}"
        )


@torch.library.custom_op("fxfuse::recurrent_gated_delta_rule", mutates_args=("state",))
def recurrent_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, normalise: bool
) -> Tensor:
    """The rule as one node of a graph, the state in place; shapes and dtypes as in `reference`."""
    check("recurrent_gated_delta_rule", query, key, value, g, beta, state)
    run = launch if refusal(query, key, value, g, beta, state) is None else reference
    return run(query, key, value, g, beta, state, normalise)


@recurrent_gated_delta_rule.register_fake
def _(query, key, value, g, beta, state, normalise):  # type: ignore[no-untyped-def]
    check("recurrent_gated_delta_rule", query, key, value, g, beta, state)
    return query.new_empty(value.shape)
