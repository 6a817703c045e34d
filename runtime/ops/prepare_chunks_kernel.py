"""The first launch of `chunk_gated_delta_rule`: what each chunk needs of its own tokens alone.

One program for each chunk and value head, which inverts the chunk's triangular system. It writes, all in
float32, the inverse [CHUNK, CHUNK], the attention inside the chunk [CHUNK, CHUNK], and SCALES rows of factors
of the tokens: of queries and of keys since the chunk's beginning, of keys until its end, of values; and the
decay over the chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxfuse.runtime.ops.triton_kernel import kernel

if TYPE_CHECKING:
    import triton.language as tl

CHUNK = 32  # tokens; twice as many did not fit the registers of every target
SCALES = 5


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
def prepare_chunks(  # type: ignore[no-untyped-def]
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
    head = tl.program_id(1).to(tl.int64)
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
    t = tl.arange(0, CHUNK).to(tl.int64)
    there = start + t < end
    query += batch * query_stride_b + start * query_stride_t + head // RATIO * query_stride_h
    key += batch * key_stride_b + start * key_stride_t + head // RATIO * key_stride_h
    g += batch * g_stride_b + start * g_stride_t + head * g_stride_h
    beta += batch * beta_stride_b + start * beta_stride_t + head * beta_stride_h
    slot = number * tl.num_programs(1) + head
    prepared += slot * (2 * CHUNK + SCALES) * CHUNK

    # Products of the raw queries and keys are exact for half precision; their norms come in afterwards.
    d = tl.arange(0, KEY_BLOCK).to(tl.int64)
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
