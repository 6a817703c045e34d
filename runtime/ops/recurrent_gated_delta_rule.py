"""Gated delta rule token by token, the state moving on in place: the form for one or a few tokens.

S_t = exp(g_t) S_{t-1};  S_t += k_t ⊗ β_t (v_t − S_tᵀ k_t);  o_t = S_tᵀ q_t / √dk. Formula: Yang, Kautz,
Hatamizadeh, "Gated Delta Networks" (2024). The state is [B, HV, dk, dv] as transformers keeps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.activations import wide
from fxfuse.runtime.ops.arguments import check_written
from fxfuse.runtime.ops.gated_delta_rule import L2_EPSILON, check, parts
from fxfuse.runtime.ops.listed_once import operator
from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

MAX_KEY_DIM = 256
BLOCK_V = 32


class Given(NamedTuple):
    """What the rule takes: the same as in `gated_delta_rule.Given`, but a state that moves on.

    Attributes:
        state: [B, HV, dk, dv], or [N, HV, dk, dv] with cu_seqlens, of any strides, in place.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    normalise: bool
    cu_seqlens: Tensor | None = None


def reference(*arguments: Any) -> Tensor:
    """The rule in plain torch, of the fields of `Given`, computed in float32.

    Returns:
        [B, T, HV, dv] in the dtype of query, contiguous.
    """
    query, key, value, g, beta, state, normalise, cu_seqlens = Given(*arguments)
    if cu_seqlens is not None:
        outs = [value.new_empty((1, 0, *value.shape[2:]), dtype=query.dtype)]
        for n, part in enumerate(parts(cu_seqlens, value.shape[1])):
            own = (x[:, part] for x in (query, key, value, g, beta))
            outs.append(reference(*own, state[n : n + 1], normalise))
        return torch.cat(outs, dim=1)
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


def unsupported(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel takes these tensors, in the order of `Given`, on no device, or None."""
    key_dim = key.shape[-1]
    if key_dim > MAX_KEY_DIM:
        return f"key heads of {key_dim}: one program holds at most {MAX_KEY_DIM}"
    return triton_kernel.unsupported(query, key, *rest)


def refusal(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel does not take these here, or None."""
    return unsupported(query, key, *rest) or triton_kernel.refusal(query, key, *rest)


@kernel
def _recurrent_gated_delta_rule(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    g,
    beta,
    state,
    cu_seqlens,
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
    PACKED: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    i = tl.arange(0, BLOCK_K).to(tl.int64)
    # One dimension of programs: only the first of a grid may have more than 65,535.
    blocks = tl.cdiv(value_dim, BLOCK_V)
    j = (tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
    sequence = (tl.program_id(0) // blocks // value_heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % value_heads).to(tl.int64)
    batch, start, count = sequence, sequence * 0, length
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        count = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
        batch = sequence * 0
    in_key = i < key_dim
    in_value = j < value_dim
    tile = in_key[:, None] & in_value[None, :]
    place = state + sequence * state_stride_b + head * state_stride_h
    place = place + i[:, None] * state_stride_k + j[None, :] * state_stride_v
    current = tl.load(place, mask=tile, other=0.0).to(tl.float32)
    query += batch * query_stride_b + start * query_stride_t + head // ratio * query_stride_h
    key += batch * key_stride_b + start * key_stride_t + head // ratio * key_stride_h
    value += batch * value_stride_b + start * value_stride_t + head * value_stride_h
    g += batch * g_stride_b + start * g_stride_t + head * g_stride_h
    beta += batch * beta_stride_b + start * beta_stride_t + head * beta_stride_h
    out += ((batch * length + start) * value_heads + head) * value_dim
    for _ in range(count):
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


def launch(*arguments: Any) -> Tensor:
    """`reference` by the Triton kernel, one launch."""
    query, key, value, g, beta, state, normalise, cu_seqlens = Given(*arguments)
    out = torch.empty(value.shape, dtype=query.dtype, device=value.device)
    batch, length, value_heads, value_dim = value.shape
    key_heads, key_dim = key.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    block_k = power_of_2(key_dim)
    block_v = min(power_of_2(value_dim), BLOCK_V)
    _recurrent_gated_delta_rule[(sequences * value_heads * -(-value_dim // block_v),)](
        query,
        key,
        value,
        g,
        beta,
        state,
        value if cu_seqlens is None else cu_seqlens,
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
        PACKED=cu_seqlens is not None,
        NORMALISE=normalise,
        EPSILON=L2_EPSILON,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        num_warps=max(1, block_k * block_v // 1024),
    )
    return out


def _run(given: Given) -> Tensor:
    """The rule as one node of a graph, the state in place; shapes and dtypes as in `Given`."""
    check("recurrent_gated_delta_rule", *given[:6], given.cu_seqlens)
    check_written("recurrent_gated_delta_rule", state=given.state)
    refused = refusal(*given[:6], given.cu_seqlens)
    return (launch if refused is None else reference)(*given)


def _fake(given: Given) -> Tensor:
    check("recurrent_gated_delta_rule", *given[:6], given.cu_seqlens)
    return given.query.new_empty(given.value.shape)


recurrent_gated_delta_rule = operator("recurrent_gated_delta_rule", _run, _fake, Given, mutates=("state",))
