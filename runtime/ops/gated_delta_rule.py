"""Gated delta rule over a sequence: S_t = exp(g_t)·S_{t-1}·(I − β_t k_t k_tᵀ) + β_t k_t v_tᵀ, o_t = S_tᵀ q_t.

Formula: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), in its chunked form: inside a chunk the
product of the rank-one updates is the solution of one unit lower-triangular system, between chunks only the
state is carried.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops.arguments import check_tensors

CHUNK = 64
L2_EPSILON = 1e-6
LEAST_LOG_DECAY = -110.0  # exp of it is zero in float32; sums of less lose digits, and of −inf all of them


def _columns(x: Tensor, key_heads: int, part: slice) -> Tensor:
    """Some tokens of [B, T, h, ...] in any float dtype as contiguous fp32 [B, Hk, h / Hk, n, ...]."""
    x = x[:, part].transpose(1, 2)
    x = x.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    return x.unflatten(1, (key_heads, -1))


def _inverse_norm(x: Tensor) -> Tensor:
    return torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) + L2_EPSILON)


def _chunk(tokens: Sequence[Tensor], state: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    """Query, key, value, g, beta of n tokens, from `_columns`; returns out [B·HV, n, dv] and the next state.

    Value heads that share a key head are an axis of their own (r), so that keys are multiplied once for all.
    """
    query, key, value, g, beta = tokens
    size, dk = key.shape[-2:]
    if normalise:
        query, key = query * _inverse_norm(query), key * _inverse_norm(key)
    query = query * dk**-0.5
    decay, rate = g.clamp(min=LEAST_LOG_DECAY).cumsum(-1), beta.unsqueeze(-1)  # [B, Hk, r, n(, 1)]
    grown, last = decay.exp().unsqueeze(-1), decay[..., -1:]
    future = torch.ones(size, size, dtype=torch.bool, device=key.device).triu(1)
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill_(future, float("-inf")).exp_()
    products = torch.cat([key, query], dim=-2) @ key.mT

    def heads(x: Tensor) -> Tensor:
        return x.flatten(0, 2)  # [B·HV, n, ...]

    # (I + A) u = β (v − exp(γ) k S): what each token writes beyond what is there. The solver takes ones for
    # the diagonal and does not read beyond it; given the transposed system it copies less.
    system = heads(products[..., :size, :] * (rate * between))
    missing = (heads(value) - heads(grown * key) @ state) * heads(rate)
    written = torch.linalg.solve_triangular(
        system.mT, missing.mT, upper=True, left=False, unitriangular=True
    ).mT
    inside = heads(products[..., size:, :] * between)
    out = (heads(grown * query) @ state).baddbmm_(inside, written)
    kept = heads((last - decay).exp().unsqueeze(-1) * key)
    return out, (heads(last).exp().unsqueeze(-1) * state).baddbmm_(kept.mT, written)


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
    """The rule in plain torch, of the fields of `Given`, computed in fp32; differentiable.

    Returns:
        out [B, T, HV, dv] in query's dtype, contiguous; final state [B, HV, dk, dv] in fp32, contiguous.
    """
    given = Given(*arguments)
    if given.cu_seqlens is not None:
        return _packed(given, given.cu_seqlens)
    length = given.value.shape[1]
    state = initial(given.query, given.value, given.initial_state)
    if length == 0:
        return given.value.new_empty(given.value.shape, dtype=given.query.dtype), state.clone(
            memory_format=torch.contiguous_format
        )
    batch, _, heads, _ = given.value.shape
    outs, state = [], state.flatten(0, 1)
    # Chunk by chunk, so that all of it stays in the caches of a CPU.
    for start in range(0, length, CHUNK):
        part = slice(start, min(start + CHUNK, length))
        tokens = [_columns(x, given.key.shape[2], part) for x in given[:5]]
        out, state = _chunk(tokens, state, given.normalise)
        outs.append(out.unflatten(0, (batch, heads)).transpose(1, 2).to(given.query.dtype))
    return torch.cat(outs, dim=1).contiguous(), state.unflatten(0, (batch, heads)).contiguous()


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
