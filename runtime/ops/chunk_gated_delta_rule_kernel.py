"""The kernels of `chunk_gated_delta_rule`: two launches for whole sequences.

The first has a program for each chunk and value head, which inverts the chunk's triangular system; the second
one for each sequence, value head and block of value features, which carries the state from chunk to chunk in
registers and writes the output on its way. States between chunks and the solved system are never in memory,
and value heads read the key head of their group: nothing is repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.gated_delta_rule import L2_EPSILON, LEAST_LOG_DECAY
from fxfuse.runtime.ops.triton_kernel import kernel, power_of_2

if TYPE_CHECKING:
    import triton.language as tl

CHUNK = 32  # tokens; twice as many did not fit the registers of every target
MAX_KEY_DIM = 256
LEAST_BLOCK = 16  # of a side of a matrix product
KEY_BYTES = 64  # of a token that are multiplied at a time
BLOCK_V = 16
SCALES = 5  # kinds of factors that the second launch multiplies by


@kernel
def _inverse(a, SIZE: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + a)⁻¹ for a strictly lower triangular a, from the inverses of diagonal blocks half as large.

    [[D, 0], [B, E]]⁻¹ = [[D⁻¹, 0], [−E⁻¹ B D⁻¹, E⁻¹]]. Powers of a would be fewer products, but they grow
    beyond any precision where keys repeat.
    """
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where((row % 2 == 1) & (column == row - 1), a, 0.0)
    block = 2
    while block < SIZE:
        below = tl.where((row // block % 2 == 1) & (column // block == row // block - 1), a, 0.0)
        left = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(left, inverse, input_precision=PRECISION)
        block *= 2
    return inverse


@kernel
def _quarters(x, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Upper left, lower left and lower right of a square matrix."""
    apart = tl.permute(tl.reshape(x, (2, HALF, 2, HALF)), (1, 3, 0, 2))
    left, right = tl.split(apart)
    upper_left, lower_left = tl.split(left)
    _, lower_right = tl.split(right)
    return upper_left, lower_left, lower_right


@kernel
def _prepare_chunks(  # type: ignore[no-untyped-def]
    query,
    key,
    g,
    beta,
    cu_seqlens,
    first_chunks,
    sequences,
    prepared,
    length,
    chunks,
    sequence_count,
    scale,
    query_stride_b,
    query_stride_t,
    query_stride_h,
    query_stride_d,
    key_stride_b,
    key_stride_t,
    key_stride_h,
    key_stride_d,
    g_stride_b,
    g_stride_t,
    g_stride_h,
    beta_stride_b,
    beta_stride_t,
    beta_stride_h,
    NORMALISE: tl.constexpr,
    PACKED: tl.constexpr,
    EPSILON: tl.constexpr,
    LEAST_LOG_DECAY: tl.constexpr,
    CHUNK: tl.constexpr,
    RATIO: tl.constexpr,
    KEY_DIM: tl.constexpr,
    SCALES: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if PACKED:  # programs beyond the last chunk find themselves behind the last sequence, without a token
        sequence = tl.load(sequences + number)
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        end = tl.load(cu_seqlens + tl.minimum(sequence + 1, sequence_count)).to(tl.int64)
        start += (number - tl.load(first_chunks + sequence)) * CHUNK
        batch = number * 0
    else:
        batch = number // chunks
        start = number % chunks * CHUNK
        end = length
    t = tl.arange(0, CHUNK)
    there = start + t < end
    query += batch * query_stride_b + start * query_stride_t + head // RATIO * query_stride_h
    key += batch * key_stride_b + start * key_stride_t + head // RATIO * key_stride_h
    g += batch * g_stride_b + start * g_stride_t + head * g_stride_h
    beta += batch * beta_stride_b + start * beta_stride_t + head * beta_stride_h
    slot = number * tl.num_programs(1) + head
    prepared += slot * (2 * CHUNK + SCALES) * CHUNK

    # Products of the raw queries and keys are exact for half precision; their norms come in afterwards.
    d = tl.arange(0, KEY_BLOCK)
    query_key = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    key_key = tl.zeros((CHUNK, CHUNK), dtype=tl.float32)
    query_square = tl.zeros((CHUNK,), dtype=tl.float32)
    key_square = tl.zeros((CHUNK,), dtype=tl.float32)
    for begin in range(0, KEY_WIDTH, KEY_BLOCK):
        mask = there[:, None] & (begin + d < KEY_DIM)[None, :]
        place = query + t[:, None] * query_stride_t + (begin + d)[None, :] * query_stride_d
        q = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        place = key + t[:, None] * key_stride_t + (begin + d)[None, :] * key_stride_d
        k = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        query_key += tl.dot(q, tl.trans(k), input_precision=PRECISION)
        key_key += tl.dot(k, tl.trans(k), input_precision=PRECISION)
        query_square += tl.sum(q * q, axis=1)
        key_square += tl.sum(k * k, axis=1)
    query_scale = tl.full((CHUNK,), 1.0, dtype=tl.float32)
    key_scale = tl.full((CHUNK,), 1.0, dtype=tl.float32)
    if NORMALISE:
        query_scale = tl.rsqrt(query_square + EPSILON)
        key_scale = tl.rsqrt(key_square + EPSILON)
    query_scale *= scale

    decay = tl.load(g + t * g_stride_t, mask=there, other=0.0).to(tl.float32)
    decay = tl.cumsum(tl.maximum(decay, LEAST_LOG_DECAY), axis=0)
    rate = tl.load(beta + t * beta_stride_t, mask=there, other=0.0).to(tl.float32)
    causal = t[:, None] >= t[None, :]
    between = tl.exp(tl.where(causal, decay[:, None] - decay[None, :], float("-inf"))) * key_scale[None, :]
    here = t[:, None] * CHUNK + t[None, :]
    tl.store(prepared + CHUNK * CHUNK + here, query_key * query_scale[:, None] * between)
    system = tl.where(t[:, None] > t[None, :], key_key * (rate * key_scale)[:, None] * between, 0.0)
    # Quarter by quarter: less to multiply, and the operands fit the registers.
    HALF: tl.constexpr = CHUNK // 2
    first, below, second = _quarters(system, HALF)
    first = _inverse(first, HALF, PRECISION)
    second = _inverse(second, HALF, PRECISION)
    below = tl.dot(tl.dot(second, below, input_precision=PRECISION), first, input_precision=PRECISION)
    h = tl.arange(0, HALF)
    here = h[:, None] * CHUNK + h[None, :]
    tl.store(prepared + here, first)
    tl.store(prepared + HALF + here, tl.zeros_like(first))
    tl.store(prepared + HALF * CHUNK + here, -below)
    tl.store(prepared + HALF * CHUNK + HALF + here, second)

    scales = prepared + 2 * CHUNK * CHUNK
    grown = tl.exp(decay)
    last = tl.sum(tl.where(t == CHUNK - 1, decay, 0.0), axis=0)
    tl.store(scales + t, query_scale * grown)
    tl.store(scales + CHUNK + t, rate * key_scale * grown)
    tl.store(scales + 2 * CHUNK + t, key_scale * tl.exp(last - decay))
    tl.store(scales + 3 * CHUNK + t, rate)
    tl.store(scales + 4 * CHUNK, tl.exp(last))


@kernel
def _scan_chunks(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    prepared,
    initial_state,
    cu_seqlens,
    first_chunks,
    out,
    final_state,
    length,
    chunks,
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
    state_stride_b,
    state_stride_h,
    state_stride_k,
    state_stride_v,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SCALES: tl.constexpr,
    PARTS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sequence = (tl.program_id(1) // VALUE_HEADS).to(tl.int64)
    head = tl.program_id(1) % VALUE_HEADS
    t = tl.arange(0, CHUNK)
    i = tl.arange(0, KEY_BLOCK)
    j = tl.program_id(0) * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)
    in_value = j < VALUE_DIM
    # The state in parts of few keys: the operands of one product have to fit the registers.
    state = ()
    if HAS_STATE:
        initial_state += sequence * state_stride_b + head * state_stride_h
    for part in tl.static_range(PARTS):
        if HAS_STATE:
            feature = part * KEY_BLOCK + i
            before = initial_state + feature[:, None] * state_stride_k + j[None, :] * state_stride_v
            tile = (feature < KEY_DIM)[:, None] & in_value[None, :]
            state += (tl.load(before, mask=tile, other=0.0).to(tl.float32),)  # type: ignore[assignment]
        else:
            state += (tl.zeros((KEY_BLOCK, VALUE_BLOCK), dtype=tl.float32),)  # type: ignore[assignment]
    if PACKED:
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        count = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
        number = tl.load(first_chunks + sequence)
    else:
        query += sequence * query_stride_b
        key += sequence * key_stride_b
        value += sequence * value_stride_b
        start = sequence * length
        out += start * VALUE_HEADS * VALUE_DIM
        start = start * 0
        count = length
        number = sequence * chunks
    query += start * query_stride_t + head // RATIO * query_stride_h
    key += start * key_stride_t + head // RATIO * key_stride_h
    value += start * value_stride_t + head * value_stride_h
    out += (start * VALUE_HEADS + head) * VALUE_DIM
    slot = number * VALUE_HEADS + head
    prepared += slot * (2 * CHUNK + SCALES) * CHUNK
    here = t[:, None] * CHUNK + t[None, :]
    for begin in range(0, count, CHUNK):
        there = begin + t < count
        scales = prepared + 2 * CHUNK * CHUNK
        known = tl.zeros((CHUNK, VALUE_BLOCK), dtype=tl.float32)
        result = tl.zeros((CHUNK, VALUE_BLOCK), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            tl.debug_barrier()
            feature = part * KEY_BLOCK + i
            mask = there[:, None] & (feature < KEY_DIM)[None, :]
            place = key + t[:, None] * key_stride_t + feature[None, :] * key_stride_d
            k = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            known += tl.dot(k, state[part], input_precision=PRECISION)
            place = query + t[:, None] * query_stride_t + feature[None, :] * query_stride_d
            q = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            result += tl.dot(q, state[part], input_precision=PRECISION)
        mask = there[:, None] & in_value[None, :]
        place = value + t[:, None] * value_stride_t + j[None, :] * value_stride_d
        v = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        correction = (
            v * tl.load(scales + 3 * CHUNK + t)[:, None] - known * tl.load(scales + CHUNK + t)[:, None]
        )
        correction = tl.dot(tl.load(prepared + here), correction, input_precision=PRECISION)
        result *= tl.load(scales + t)[:, None]
        result += tl.dot(tl.load(prepared + CHUNK * CHUNK + here), correction, input_precision=PRECISION)
        target = out + t[:, None] * VALUE_HEADS * VALUE_DIM + j[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=mask)
        correction *= tl.load(scales + 2 * CHUNK + t)[:, None]
        decay = tl.load(scales + 4 * CHUNK)
        moved = ()
        for part in tl.static_range(PARTS):
            tl.debug_barrier()
            feature = part * KEY_BLOCK + i
            place = key + t[None, :] * key_stride_t + feature[:, None] * key_stride_d
            k = tl.load(place, mask=there[None, :] & (feature < KEY_DIM)[:, None], other=0.0)
            update = tl.dot(k.to(tl.float32), correction, input_precision=PRECISION)
            moved += (state[part] * decay + update,)  # type: ignore[assignment]
        state = moved
        query += CHUNK * query_stride_t
        key += CHUNK * key_stride_t
        value += CHUNK * value_stride_t
        out += CHUNK * VALUE_HEADS * VALUE_DIM
        prepared += VALUE_HEADS * (2 * CHUNK + SCALES) * CHUNK
    final_state += (sequence * VALUE_HEADS + head) * KEY_DIM * VALUE_DIM
    for part in tl.static_range(PARTS):
        feature = part * KEY_BLOCK + i
        after = final_state + feature[:, None] * VALUE_DIM + j[None, :]
        tl.store(after, state[part], mask=(feature < KEY_DIM)[:, None] & in_value[None, :])


def _chunk_table(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """Each sequence's first chunk [N + 1], each chunk's sequence, and how many chunks there are at most.

    The numbers stay on their device: nobody waits for them.
    """
    counts = (cu_seqlens.diff() + CHUNK - 1) // CHUNK
    first = F.pad(counts.cumsum(0), (1, 0))
    most = length // CHUNK + counts.shape[0]
    numbers = torch.arange(most, device=cu_seqlens.device, dtype=first.dtype)
    return first, torch.searchsorted(first, numbers, right=True) - 1, most


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalise: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule of `gated_delta_rule.reference` by the Triton kernels."""
    batch, length, value_heads, value_dim = value.shape
    key_heads, key_dim = key.shape[2:]
    device, ratio = value.device, value_heads // key_heads
    chunks = -(-length // CHUNK)
    sequences, number = batch, batch * chunks
    table = first = bounds = value
    packed = cu_seqlens is not None
    if cu_seqlens is not None:
        bounds, sequences = cu_seqlens, cu_seqlens.shape[0] - 1
        first, table, number = _chunk_table(cu_seqlens, length)
    out = torch.empty(value.shape, dtype=query.dtype, device=device)
    final = torch.empty(sequences, value_heads, key_dim, value_dim, dtype=torch.float32, device=device)
    # Of each chunk: its inverted system, the attention inside of it, and factors of its tokens.
    prepared = torch.empty(number, value_heads, 2 * CHUNK + SCALES, CHUNK, dtype=torch.float32, device=device)
    key_width = max(power_of_2(key_dim), LEAST_BLOCK)
    key_block = min(key_width, KEY_BYTES // query.element_size())
    precision = triton_kernel.dot_precision(query.dtype)
    _prepare_chunks[(number, value_heads)](
        query,
        key,
        g,
        beta,
        bounds,
        first,
        table,
        prepared,
        length,
        chunks,
        sequences,
        key_dim**-0.5,
        *query.stride(),
        *key.stride(),
        *g.stride(),
        *beta.stride(),
        NORMALISE=normalise,
        PACKED=packed,
        EPSILON=L2_EPSILON,
        LEAST_LOG_DECAY=LEAST_LOG_DECAY,
        CHUNK=CHUNK,
        RATIO=ratio,
        KEY_DIM=key_dim,
        SCALES=SCALES,
        KEY_WIDTH=key_width,
        KEY_BLOCK=key_block,
        PRECISION=precision,
        num_warps=4,
    )
    _scan_chunks[(-(-value_dim // BLOCK_V), sequences * value_heads)](
        query,
        key,
        value,
        prepared,
        value if initial_state is None else initial_state,
        bounds,
        first,
        out,
        final,
        length,
        chunks,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *((0, 0, 0, 0) if initial_state is None else initial_state.stride()),
        HAS_STATE=initial_state is not None,
        PACKED=packed,
        CHUNK=CHUNK,
        VALUE_HEADS=value_heads,
        RATIO=ratio,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        SCALES=SCALES,
        PARTS=key_width // key_block,
        KEY_BLOCK=key_block,
        VALUE_BLOCK=BLOCK_V,
        PRECISION=precision,
        num_warps=4,
        num_stages=1,
    )
    return out, final
