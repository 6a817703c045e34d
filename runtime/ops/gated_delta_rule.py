"""Gated delta rule over a sequence: S_t = exp(g_t)·S_{t-1}·(I − β_t k_t k_tᵀ) + β_t k_t v_tᵀ, o_t = S_tᵀ q_t.

Formula: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), in its chunked form: inside a chunk the
product of the rank-one updates is the solution of one unit lower-triangular system, between chunks only the
state is carried.
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops.arguments import check_tensors

CHUNK = 64
L2_EPSILON = 1e-6
LEAST_LOG_DECAY = -110.0  # exp of it is zero in float32; sums of less lose digits, and of −inf all of them


def _l2_normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON)


def by_chunk(x: Tensor, heads: int, size: int) -> Tensor:
    """[B, T, h, ...] in any float dtype as [B, heads, N, size, ...] in fp32.

    Each head is repeated heads / h times, and zeros are appended where T is no multiple of the size.
    """
    x = x.transpose(1, 2).to(torch.float32)
    x = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
    missing = -x.shape[2] % size
    if not isinstance(missing, int) or missing:
        x = F.pad(x, [*[0] * (2 * (x.dim() - 3)), 0, missing])
    return x.unflatten(2, (-1, size))


class Pieces(NamedTuple):
    """Tokens by chunk, in fp32: what the rule is computed from.

    Attributes:
        q, k: [B, HV, N, size, dk], normalised where asked for, q scaled; v: [B, HV, N, size, dv].
        decay: [B, HV, N, size], its logarithm since the chunk's beginning; rate: [B, HV, N, size, 1].
        between: [B, HV, N, size, size], the decay from each token to a later one, zero to an earlier one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    rate: Tensor
    between: Tensor


def pieces(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normalise: bool, size: int
) -> Pieces:
    """The tokens in chunks of `size`; arguments as in `Given`."""
    heads, dk = value.shape[2], key.shape[-1]
    if normalise:
        query, key = _l2_normalised(query.float()), _l2_normalised(key.float())
    q, k, v, decay, rate = (by_chunk(x, heads, size) for x in (query, key, value, g, beta))
    q = q * dk**-0.5
    decay = decay.clamp(min=LEAST_LOG_DECAY).cumsum(-1)
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    return Pieces(q, k, v, decay, rate.unsqueeze(-1), between)


def prepared(of: Pieces) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What each chunk needs of its own tokens alone.

    Returns, in fp32 and for N chunks: queries with the decay since the chunk's beginning and keys with that
    until its end, both [B, HV, N, size, dk]; the solved system [u | w] [B, HV, N, size, dv + dk]; the
    attention inside the chunk [B, HV, N, size, size]; the decay over the whole chunk [B, HV, N].
    """
    q, k, v, decay, rate, between = of
    grown = decay.exp().unsqueeze(-1)

    # (I + A) [u | w] = β [v | exp(γ) k]; the diagonal of the left side is taken as one by the solver, which
    # is given the transposed system: so it need not turn what lies in memory row by row.
    system = rate * k @ k.mT * between
    right = torch.cat([rate * v, rate * grown * k], dim=-1)
    solved = torch.linalg.solve_triangular(system.mT, right.mT, upper=True, left=False, unitriangular=True).mT
    attention = q @ k.mT * between
    until = (decay[..., -1:] - decay).exp().unsqueeze(-1)
    return q * grown, k * until, solved, attention, decay[..., -1].exp()


def scanned(
    q: Tensor, k: Tensor, solved: Tensor, attention: Tensor, last: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The state carried from chunk to chunk; arguments from `prepared`, and the state [B, HV, dk, dv].

    Returns out [B, HV, N · size, dv] and the final state, both in fp32 and contiguous.
    """
    batch, heads, chunks, _, dk = q.shape
    u, w = solved.split([solved.shape[-1] - dk, dk], dim=-1)
    state, outs = state.flatten(0, 1), []
    for i in range(chunks):
        q_i, k_i, u_i, w_i, inside, decay = (x[:, :, i].flatten(0, 1) for x in (q, k, u, w, attention, last))
        corrected = torch.baddbmm(u_i, w_i, state, alpha=-1)
        outs.append(torch.baddbmm(q_i @ state, inside, corrected))
        state = torch.baddbmm(decay[:, None, None] * state, k_i.mT, corrected)
    return torch.cat(outs, dim=1).unflatten(0, (batch, heads)), state.unflatten(0, (batch, heads))


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
        return given.value.new_empty(given.value.shape, dtype=given.query.dtype), state.clone()
    size = min(CHUNK, length)
    out, state = scanned(*prepared(pieces(*given[:5], given.normalise, size)), state)
    return out[:, :, :length].transpose(1, 2).to(given.query.dtype).contiguous(), state.contiguous()


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


@torch.library.custom_op("fxfuse::delta_rule_chunks", mutates_args=())
def delta_rule_chunks(
    q: Tensor, k: Tensor, solved: Tensor, attention: Tensor, last: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`scanned` as one node of a graph, whatever the number of chunks."""
    return scanned(q, k, solved, attention, last, state)


@delta_rule_chunks.register_fake
def _(q, k, solved, attention, last, state):  # type: ignore[no-untyped-def]
    batch, heads, chunks, size, _ = q.shape
    return q.new_empty((batch, heads, chunks * size, state.shape[-1])), state.new_empty(state.shape)
