"""The launches of `chunk_gated_delta_rule`: two for whole sequences.

States between chunks and the solved system are never in memory, and value heads read the key head of their
group: nothing is repeated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.runtime.ops import triton_kernel
from fxfuse.runtime.ops.gated_delta_rule import L2_EPSILON, LEAST_LOG_DECAY, Given
from fxfuse.runtime.ops.prepare_chunks_kernel import CHUNK, SCALES, prepare_chunks
from fxfuse.runtime.ops.scan_chunks_kernel import scan_chunks
from fxfuse.runtime.ops.triton_kernel import power_of_2

MAX_KEY_DIM = 256
LEAST_BLOCK = 16  # of a side of a matrix product
KEY_BYTES = 64  # of a token that are multiplied at a time
BLOCK_V = 16


def _chunk_table(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """Each sequence's first chunk [N + 1], each chunk's sequence, and how many chunks there are at most.

    The numbers stay on their device: nobody waits for them.
    """
    counts = (cu_seqlens.diff() + CHUNK - 1) // CHUNK
    first = F.pad(counts.cumsum(0), (1, 0))
    most = length // CHUNK + counts.shape[0]
    numbers = torch.arange(most, device=cu_seqlens.device, dtype=first.dtype)
    return first, torch.searchsorted(first, numbers, right=True) - 1, most


def launch(given: Given) -> tuple[Tensor, Tensor]:
    """Output and final state, as of `gated_delta_rule.reference`."""
    query, key, value, g, beta, initial_state, normalise, cu_seqlens = given
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
    prepare_chunks[(number, value_heads)](
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
    scan_chunks[(sequences * value_heads * -(-value_dim // BLOCK_V),)](
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
