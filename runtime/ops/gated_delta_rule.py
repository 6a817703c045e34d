"""Gated delta rule over a sequence: S_t = exp(g_t)·S_{t-1}·(I − β_t k_t k_tᵀ) + β_t k_t v_tᵀ, o_t = S_tᵀ q_t.

Formula: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), in its chunked form: inside a chunk the
product of the rank-one updates is the solution of one unit lower-triangular system, between chunks only the
state is carried.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops.arguments import check_tensors

CHUNK = 64
L2_EPSILON = 1e-6
LEAST_LOG_DECAY = -110.0  # exp of it is zero in float32; sums of less lose digits, and of −inf all of them
LOG2_E = 1.4426950408889634
SOLVED = 16  # rows of a triangular system that are solved one after the other
TOGETHER = 64  # heads of chunks that are prepared by one call each: more would leave the caches of a CPU


class Factors(NamedTuple):
    """What n tokens are multiplied by, in fp32; leading axes as of the tokens.

    Attributes:
        norms: [..., 2n], the inverse norms of keys and queries; ones where they are not normalised.
        pairs: [..., 2n, n], of the products of keys and queries with keys; zero for later keys. In the first
            half the diagonal stands for nothing.
        reading: [..., 2n, 1], of keys and queries that read the state before.
        keeping: [..., n, 1], of keys whose values the state after holds.
        over: [..., 1, 1], of the state.
    """

    norms: Tensor
    pairs: Tensor
    reading: Tensor
    keeping: Tensor
    over: Tensor


def keys_over_queries(key: Tensor, query: Tensor) -> Tensor:
    """Both [..., n, dk] in any float dtype, with any strides, as contiguous fp32 [..., 2n, dk]."""
    size = key.shape[-2]
    both = key.new_empty((*key.shape[:-2], 2 * size, key.shape[-1]), dtype=torch.float32)
    both[..., :size, :] = key
    both[..., size:, :] = query
    return both


def factors(pairs: Tensor, g: Tensor, beta: Tensor, normalise: bool) -> Factors:
    """Of `keys_over_queries` [..., 2n, dk], g and beta [..., n] in fp32.

    Keys and queries are multiplied as they come: their norms, the rates and the decay are factors of what
    comes out, which has fewer elements.
    """
    size, dk = g.shape[-1], pairs.shape[-1]
    norms = pairs.new_ones(1).expand(pairs.shape[:-1])
    if normalise:
        norms = torch.rsqrt(torch.linalg.vector_norm(pairs, dim=-1).square_() + L2_EPSILON)
    decay = g.clamp(min=LEAST_LOG_DECAY).cumsum(-1)
    last = decay[..., -1:]
    rows = torch.stack([norms[..., :size], norms[..., size:] * dk**-0.5], dim=-2)
    columns = norms[..., :size] * beta
    between = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    future = between.new_full((size, size), float("-inf")).triu_(1)
    between = torch.add(future, between, alpha=LOG2_E).exp2_()  # 2ˣ: a third of the time of eˣ
    between *= columns.unsqueeze(-2)
    return Factors(
        norms,
        (rows.unsqueeze(-1) * between.unsqueeze(-3)).flatten(-3, -2),
        (rows * decay.exp().unsqueeze(-2)).flatten(-2).unsqueeze(-1),
        ((last - decay).exp() * columns).unsqueeze(-1),
        last.exp().unsqueeze(-1),
    )


def inverse(system: Tensor) -> Tensor:
    """(I + A)⁻¹ [b, n, n], A being what lies beneath the diagonal of `system`.

    [[D, 0], [B, E]]⁻¹ = [[D⁻¹, 0], [−E⁻¹ B D⁻¹, E⁻¹]]: products of matrices, which a CPU computes many at a
    time, and small blocks to solve, which it does one by one.
    """
    size = system.shape[-1]
    block = SOLVED if size == CHUNK else size
    whole = torch.zeros_like(system, memory_format=torch.contiguous_format)
    identity = torch.eye(block, device=system.device).expand(len(system), size // block, -1, -1)
    # Given the transposed system, the solver copies less.
    solved = torch.linalg.solve_triangular(
        _diagonal(system, block).mT, identity, upper=True, left=False, unitriangular=True
    )
    _diagonal(whole, block).copy_(solved.mT)
    while block < size:
        first, second = slice(None, block), slice(block, None)
        block *= 2
        given, found = _diagonal(system, block), _diagonal(whole, block)
        below = found[..., second, second] @ given[..., second, first] @ found[..., first, first]
        torch.neg(below, out=found[..., second, first])
    return whole


def _diagonal(x: Tensor, size: int) -> Tensor:
    """The blocks on the diagonals of [b, n, n], as a view [b, n / size, size, size]."""
    return x.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3).movedim(-1, 1)


def by_chunk(x: Tensor, size: int) -> Tensor:
    """[B, N·n, h, ...] as a view [N, B, h, n, ...] of N chunks of n tokens."""
    return x.unflatten(1, (-1, size)).movedim((1, 3), (0, 2))


class Given(NamedTuple):
    """What the rule over whole sequences takes.

    Attributes:
        query, key: [B, T, Hk, dk]; value: [B, T, HV, dv], HV a multiple of Hk: value head h reads key head
            h // (HV / Hk); any float dtype, any strides.
        g, beta: [B, T, HV]; g is the logarithm of the decay.
        initial_state: [B, HV, dk, dv] or None for zeros.
        normalise: l2-normalise query and key over dk.
        cu_seqlens: [N + 1] integers, 0 first and T last, where a batch of one packs N sequences: sequence n
            has the tokens from cu_seqlens[n] to cu_seqlens[n + 1], and its own state in [N, HV, dk, dv].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None
    normalise: bool
    cu_seqlens: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (*self[:6], self.cu_seqlens)


def check(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ShapeError where shapes do not belong together."""
    check_tensors(
        name,
        query=("[B, T, Hk, dk]", query),
        key=("[B, T, Hk, dk]", key),
        value=("[B, T, HV, dv]", value),
        g=("[B, T, HV]", g),
        beta=("[B, T, HV]", beta),
        state=("[B, HV, dk, dv]", state),
    )
    batch, length, heads, dv = value.shape
    key_heads, dk = key.shape[2:]
    if (
        query.shape != key.shape
        or 0 in (key_heads, dk)
        or key.shape[:2] != (batch, length)
        or heads % key_heads
        or not g.shape == beta.shape == (batch, length, heads)
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value, g, beta))
        raise ShapeError(
            f"{name} takes query and key [B, T, Hk, dk], value [B, T, HV, dv] with HV a multiple of Hk and "
            f"g and beta [B, T, HV], not {shapes}"
        )
    sequences, letter = batch, "B"
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.numel() < 1:
            raise ShapeError(
                f"{name} takes packed sequences as a batch of one, with cu_seqlens [N + 1] of integers, not "
                f"a batch of {batch} with {str(cu_seqlens.dtype).removeprefix('torch.')} "
                f"{tuple(cu_seqlens.shape)}"
            )
        sequences, letter = cu_seqlens.shape[0] - 1, "N"
    if state is not None and state.shape != (sequences, heads, dk, dv):
        raise ShapeError(
            f"{name} takes a state [{letter}, HV, dk, dv], here {(sequences, heads, dk, dv)}, not "
            f"{tuple(state.shape)}"
        )


def parts(cu_seqlens: Tensor, length: int) -> list[slice]:
    """The tokens of each packed sequence; ShapeError unless they cover all tokens one after the other."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ShapeError(f"cu_seqlens {bounds} do not lead from 0 to the {length} tokens that there are")
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The rule in plain torch, of the fields of `Given`, computed in fp32; autograd cannot go through it.

    Returns:
        out [B, T, HV, dv] in query's dtype, contiguous; final state [B, HV, dk, dv] in fp32, contiguous.
    """
    given = Given(*arguments)
    if given.cu_seqlens is not None:
        return _packed(given, given.cu_seqlens)
    length = given.value.shape[1]
    start = initial(given.query, given.value, given.initial_state).clone(
        memory_format=torch.contiguous_format
    )
    out = given.value.new_empty(given.value.shape, dtype=given.query.dtype)
    if length == 0:
        return out, start
    batch, _, heads, _ = given.value.shape
    state = None if given.initial_state is None else start.flatten(0, 1)
    for part, size in _stretches(length, batch * heads):
        for n, (own, after) in enumerate(_chunks(given, part, size, state)):
            tokens = slice(part.start + n * size, part.start + (n + 1) * size)
            out[:, tokens] = own.unflatten(0, (batch, heads)).transpose(1, 2)
            state = after
    return out, (start if state is None else state.unflatten(0, (batch, heads)))


def _stretches(length: int, heads: int) -> Iterator[tuple[slice, int]]:
    """Tokens whose chunks are prepared together, and how many of them a chunk has."""
    whole = length - length % CHUNK
    step = max(1, TOGETHER // max(1, heads)) * CHUNK
    for n in range(0, whole, step):
        yield slice(n, min(n + step, whole)), CHUNK
    if whole < length:
        yield slice(whole, length), length - whole


def _chunks(given: Given, part: slice, size: int, state: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Output [B·HV, n, dv] of each chunk of n tokens and the state [B·HV, dk, dv] behind it.

    The state given, none for one of zeros, is written to. Value heads that share a key head are an axis of
    their own (r), so that keys are multiplied with each other once for all.
    """
    key_heads = given.key.shape[2]
    chunks = (by_chunk(x[:, part], size) for x in given[:5])
    query, key, value, g, beta = (x.unflatten(2, (key_heads, -1)) for x in chunks)
    pairs = keys_over_queries(key, query)
    by = factors(pairs, g.float(), beta.float(), given.normalise)

    def heads(x: Tensor) -> Tensor:
        return x.flatten(1, 3)  # [N, B·HV, n, ...]

    # (I + A β) e = v − exp(γ) k S: how much each token's value differs from what is there for its key.
    products = heads(by.pairs.mul_(pairs @ pairs[..., :size, :].mT))
    solved = inverse(products[:, :, :size].flatten(0, 1)).unflatten(0, (len(products), -1))
    reading, keeping, over = heads(by.reading), heads(by.keeping), heads(by.over)
    both = heads(pairs.expand(*value.shape[:4], -1, -1))
    values = heads(value.to(torch.float32, memory_format=torch.contiguous_format, copy=True))
    for n, errors in enumerate(values):
        keys, queries = both[n].split(size, dim=1)
        inside = products[n, :, size:]
        if state is None:
            errors = solved[n] @ errors
            out = inside @ errors
        else:
            errors = solved[n] @ errors.addcmul_(keys @ state, reading[n, :, :size], value=-1)
            out = (queries @ state).mul_(reading[n, :, size:]).baddbmm_(inside, errors)
        kept = errors.mul_(keeping[n])
        state = keys.mT @ kept if state is None else state.mul_(over[n]).baddbmm_(keys.mT, kept)
        yield out, state


def _packed(given: Given, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """`reference` of each sequence by itself."""
    value, before = given.value, given.initial_state
    outs = [value.new_empty((1, 0, *value.shape[2:]), dtype=given.query.dtype)]
    states = [initial(given.query, value, None)[:0]]
    for n, part in enumerate(parts(cu_seqlens, value.shape[1])):
        own = None if before is None else before[n : n + 1]
        out, state = reference(*(x[:, part] for x in given[:5]), own, given.normalise)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), torch.cat(states)


def initial(query: Tensor, value: Tensor, state: Tensor | None) -> Tensor:
    """The given state in fp32, or zeros [B, HV, dk, dv]."""
    if state is not None:
        return state.to(torch.float32)
    batch, _, heads, dv = value.shape
    return query.new_zeros(batch, heads, query.shape[-1], dv, dtype=torch.float32)
