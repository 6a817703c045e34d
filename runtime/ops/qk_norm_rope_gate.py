"""From attention's projections to what attention reads, in one launch, writing k and v into a static cache.

Per head: query and gate taken apart, zero-centred RMSNorm of q and k, rotary embedding of the first R
features, x·cos + rotate_half(x)·sin, in float32 and rounded once. Formulas: `rms_norm`; Su et al.,
"RoFormer" (2021), with the halves of GPT-NeoX; partial rotation as in Qwen3-Next.

`qk_norm_rope` is the same without a copy of the gate, for consumers that read it where the projection left
it, as `sigmoid_gate_mul` does.
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

MAX_HEAD_DIM = 1024
TILE = 2048  # elements of one program


def _normed_and_rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    features = wide(x)
    normed = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + eps) * (1.0 + wide(weight))
    rotary = cos.shape[-1]
    turned, rest = normed[..., :rotary], normed[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat([-second, first], dim=-1)
    turned = turned * wide(cos).unsqueeze(2) + other * wide(sin).unsqueeze(2)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
) -> Tensor:
    """All but the gate, in plain torch.

    Args:
        query: [B, T, nh, D]; key, value: [B, T, nkv, D]; any float dtypes and strides.
        q_weight, k_weight: [D], zero-centred. cos, sin: [B or 1, T, R], R even and at most D.
        key_cache, value_cache: [B, nkv, L, D], L of each its own, in place at the positions. Where there is
            no static cache they are empty tensors with L = T.
        positions: integers [T], or one alone for the first of T that follow each other. All have to be
            inside the cache; on a GPU one that is not is not written.

    Returns:
        [B, nh, T, D] in the dtype of query, contiguous.
    """
    length = query.shape[1]
    places = positions if positions.numel() == length else positions.reshape(()) + _range(positions, length)
    rotated = _normed_and_rotated(key, k_weight, cos, sin, eps).transpose(1, 2)
    key_cache.index_copy_(2, places.reshape(-1), rotated.to(key_cache.dtype))
    value_cache.index_copy_(2, places.reshape(-1), value.transpose(1, 2).to(value_cache.dtype))
    return _normed_and_rotated(query, q_weight, cos, sin, eps).transpose(1, 2).contiguous()


def _range(positions: Tensor, length: int) -> Tensor:
    return torch.arange(length, device=positions.device, dtype=positions.dtype)


def refusal(query: Tensor, *rest: Tensor) -> str | None:
    """Why the kernel does not take these, or None."""
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {query.shape[-1]}: one program holds at most {MAX_HEAD_DIM}"
    return triton_kernel.refusal(query, *rest)


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
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_T, BLOCK_D] of one head in float32."""
    d = tl.arange(0, BLOCK_D)
    in_d = d < head_dim
    mask = in_t[:, None] & in_d[None, :]
    rows = x + t.to(tl.int64)[:, None] * stride_t
    value = tl.load(rows + d[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1) / head_dim + eps)[:, None]
    scale = tl.load(weight + d * weight_stride, mask=in_d, other=0.0).to(tl.float32) + 1.0
    value = value * inverse * scale[None, :]
    # The other half of each rotated pair, read again: it is in the cache of the multiprocessor.
    turns = d < rotary
    first = d < rotary // 2
    pair = tl.where(first, d + rotary // 2, d - rotary // 2)
    mask = in_t[:, None] & turns[None, :]
    other = tl.load(rows + pair[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + pair * weight_stride, mask=turns, other=0.0).to(tl.float32) + 1.0
    other = other * inverse * tl.where(first, -scale, scale)[None, :]
    place = t.to(tl.int64)[:, None] * cos_stride_t + d[None, :] * cos_stride_r
    c = tl.load(cos + place, mask=mask, other=1.0).to(tl.float32)
    place = t.to(tl.int64)[:, None] * sin_stride_t + d[None, :] * sin_stride_r
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
    GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    in_t = t < length
    mask = in_t[:, None] & (d < head_dim)[None, :]
    step = t.to(tl.int64)[:, None]
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


def _launch(
    query: Tensor,
    gate: Tensor | None,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    out = torch.empty(batch, heads, length, head_dim, dtype=query.dtype, device=query.device)
    gate_out = out if gate is None else torch.empty(query.shape, dtype=gate.dtype, device=query.device)
    gate_in = query if gate is None else gate
    cos, sin = (x.expand(batch, -1, -1) for x in (cos, sin))
    positions = positions.reshape(-1)
    width = power_of_2(head_dim)
    block = min(power_of_2(length), max(1, TILE // width))
    _qk_norm_rope_gate[(-(-length // block), heads + 2 * kv_heads, batch)](
        query,
        gate_in,
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
        key_cache.shape[2],
        value_cache.shape[2],
        head_dim,
        cos.shape[-1],
        eps,
        *query.stride(),
        *gate_in.stride(),
        *key.stride(),
        *value.stride(),
        q_weight.stride(0),
        k_weight.stride(0),
        *cos.stride(),
        *sin.stride(),
        *key_cache.stride(),
        *value_cache.stride(),
        positions.stride(0),
        ONE_POSITION=positions.numel() != length,
        GATE=gate is not None,
        BLOCK_T=block,
        BLOCK_D=width,
        num_warps=4 if block > 1 else 1,
    )
    return out, gate_out


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
) -> Tensor:
    """`reference` by the Triton kernel, one launch."""
    given = (key, value, q_weight, k_weight, cos, sin, key_cache, value_cache, positions, eps)
    return _launch(query, None, *given)[0]


def gate_reference(query_gate: Tensor, *given: Tensor | float) -> tuple[Tensor, Tensor]:
    """`reference` of query_gate's first halves, and its second halves copied."""
    query, gate = query_gate.chunk(2, dim=-1)
    return reference(query, *given), gate.clone(memory_format=torch.contiguous_format)  # type: ignore[arg-type]


def gate_launch(query_gate: Tensor, *given: Tensor | float) -> tuple[Tensor, Tensor]:
    """`gate_reference` by the Triton kernel, one launch."""
    return _launch(*query_gate.chunk(2, dim=-1), *given)  # type: ignore[arg-type]


def _check(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
) -> None:
    batch, length, _, head_dim = query.shape
    kv_heads = key.shape[2]
    rotary = cos.shape[-1]
    expected: dict[str, tuple[Tensor, list[tuple[int, ...]]]] = {
        "key": (key, [(batch, length, kv_heads, head_dim)]),
        "value": (value, [(batch, length, kv_heads, head_dim)]),
        "q_weight": (q_weight, [(head_dim,)]),
        "k_weight": (k_weight, [(head_dim,)]),
        "cos": (cos, [(batch, length, rotary), (1, length, rotary)]),
        "sin": (sin, [(batch, length, rotary), (1, length, rotary)]),
        "key_cache": (key_cache, [(batch, kv_heads, key_cache.shape[2], head_dim)]),
        "value_cache": (value_cache, [(batch, kv_heads, value_cache.shape[2], head_dim)]),
    }
    wrong = [
        f"{what} is {tuple(x.shape)}, not {' or '.join(map(str, shapes))}"
        for what, (x, shapes) in expected.items()
        if tuple(x.shape) not in shapes
    ]
    if rotary % 2 or rotary > head_dim:
        wrong.append(f"{rotary} rotated features: an even number, at most {head_dim}")
    if positions.numel() not in (1, length):
        wrong.append(f"{positions.numel()} positions: one for each of {length} tokens, or the first alone")
    if wrong:
        raise ShapeError(f"{name} with query {tuple(query.shape)}: {'; '.join(wrong)}")


def _check_halves(query_gate: Tensor, *given: Tensor) -> None:
    twice = query_gate.shape[-1]
    if twice % 2:
        raise ShapeError(f"qk_norm_rope_gate: heads of {twice} features have no query and gate of one size")
    _check("qk_norm_rope_gate", query_gate[..., : twice // 2], *given)


@torch.library.custom_op("fxfuse::qk_norm_rope", mutates_args=("key_cache", "value_cache"))
def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
) -> Tensor:
    """The query, as one node of a graph, and the caches in place; shapes and dtypes as in `reference`."""
    given = (query, key, value, q_weight, k_weight, cos, sin, key_cache, value_cache, positions)
    _check("qk_norm_rope", *given)
    return (launch if refusal(*given) is None else reference)(*given, eps)


@qk_norm_rope.register_fake
def _(query, *given):  # type: ignore[no-untyped-def]
    _check("qk_norm_rope", query, *given[:-1])
    batch, length, heads, head_dim = query.shape
    return query.new_empty((batch, heads, length, head_dim))


@torch.library.custom_op("fxfuse::qk_norm_rope_gate", mutates_args=("key_cache", "value_cache"))
def qk_norm_rope_gate(
    query_gate: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    positions: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(query [B, nh, T, D], gate [B, T, nh, D]) from query_gate [B, T, nh, 2·D], each head's q and gate."""
    given = (key, value, q_weight, k_weight, cos, sin, key_cache, value_cache, positions)
    _check_halves(query_gate, *given)
    run = gate_launch if refusal(query_gate, *given) is None else gate_reference
    return run(query_gate, *given, eps)


@qk_norm_rope_gate.register_fake
def _(query_gate, *given):  # type: ignore[no-untyped-def]
    batch, length, heads, twice = query_gate.shape
    _check_halves(query_gate, *given[:-1])
    shape = (batch, heads, length, twice // 2)
    return query_gate.new_empty(shape), query_gate.new_empty((batch, length, heads, twice // 2))
