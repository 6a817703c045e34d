"""The second launch of `chunk_gated_delta_rule`: the state carried from chunk to chunk.

One program for each sequence, value head and block of value features. The state stays in registers, and the
output is written on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxfuse.runtime.ops.triton_kernel import kernel

if TYPE_CHECKING:
    import triton.language as tl


@kernel
def scan_chunks(  # type: ignore[no-untyped-def]
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
    # One dimension of programs: only the first of a grid may have more than 65,535.
    blocks: tl.constexpr = (VALUE_DIM + VALUE_BLOCK - 1) // VALUE_BLOCK
    sequence = (tl.program_id(0) // blocks // VALUE_HEADS).to(tl.int64)
    head = (tl.program_id(0) // blocks % VALUE_HEADS).to(tl.int64)
    t = tl.arange(0, CHUNK).to(tl.int64)
    i = tl.arange(0, KEY_BLOCK).to(tl.int64)
    j = (tl.program_id(0) % blocks * VALUE_BLOCK + tl.arange(0, VALUE_BLOCK)).to(tl.int64)
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
