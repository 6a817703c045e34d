"""Gradients of the gated delta rule over whole sequences as one operator, whatever the number of chunks.

Formula: `gated_delta_rule`, differentiated step by step from its end; what it computed on the way is computed
again. An operator's own code runs below autograd, which therefore cannot be asked for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.gated_delta_rule import (
    CHUNK,
    L2_EPSILON,
    LEAST_LOG_DECAY,
    Given,
    check,
    initial,
    parts,
)
from fxfuse.runtime.ops.listed_once import operator


def _l2_normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON)


def _by_chunk(x: Tensor, heads: int, size: int) -> Tensor:
    """[B, T, h, ...] in any float dtype as [B, heads, N, size, ...] in fp32.

    Each head is repeated heads / h times, and zeros are appended where T is no multiple of the size.
    """
    x = x.transpose(1, 2).to(torch.float32)
    x = x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
    missing = -x.shape[2] % size
    if not isinstance(missing, int) or missing:
        x = F.pad(x, [*[0] * (2 * (x.dim() - 3)), 0, missing])
    return x.unflatten(2, (-1, size))


class _Pieces(NamedTuple):
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


def _pieces(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normalise: bool, size: int
) -> _Pieces:
    """The tokens in chunks of `size`; arguments as in `Given`."""
    heads, dk = value.shape[2], key.shape[-1]
    if normalise:
        query, key = _l2_normalised(query.float()), _l2_normalised(key.float())
    q, k, v, decay, rate = (_by_chunk(x, heads, size) for x in (query, key, value, g, beta))
    q = q * dk**-0.5
    decay = decay.clamp(min=LEAST_LOG_DECAY).cumsum(-1)
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    return _Pieces(q, k, v, decay, rate.unsqueeze(-1), between)


def _prepared(of: _Pieces) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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


class Cotangents(NamedTuple):
    """Gradients of output [B, T, HV, dv] and final state; None for one that nothing was computed from."""

    grad_out: Tensor | None
    grad_state: Tensor | None


def gradients(cotangents: Cotangents, given: Given) -> list[Tensor]:
    """Gradients of query, key, value, g, beta and of the initial state where there is one.

    Computed in float32; each has its tensor's shape and dtype and is contiguous.
    """
    found = [x.new_empty(x.shape) for x in given[:6] if x is not None]
    everything = slice(None)
    places = [(everything, everything)]
    if given.cu_seqlens is not None:
        tokens = parts(given.cu_seqlens, given.value.shape[1])
        places = [(slice(n, n + 1), part) for n, part in enumerate(tokens)]
    for sequences, part in places:
        state = None if given.initial_state is None else given.initial_state[sequences]
        query, key, value, g, beta = (x[:, part] for x in given[:5])
        own = Given(query, key, value, g, beta, state, given.normalise)
        out, final = cotangents
        own_gradients = _of_sequences(
            None if out is None else out[:, part], None if final is None else final[sequences], own
        )
        for whole, x in zip(found[:5], own_gradients, strict=False):
            whole[:, part] = x
        for whole in found[5:]:
            whole[sequences] = own_gradients[5]
    return found


def _of_sequences(grad_out: Tensor | None, grad_state: Tensor | None, given: Given) -> list[Tensor]:
    """Gradients of all six in float32, of sequences side by side."""
    length, heads = given.value.shape[1:3]
    key_heads = given.key.shape[2]
    state = initial(given.query, given.value, given.initial_state)
    d_state = torch.zeros_like(state) if grad_state is None else grad_state.to(torch.float32)
    if length == 0:
        return [*(x.new_zeros(x.shape) for x in given[:5]), d_state]
    size = min(CHUNK, length)
    of = _pieces(*given[:5], given.normalise, size)
    q, k, v, decay, rate, between = of
    q_grown, k_left, solved, attention, last = _prepared(of)
    last = last[..., None, None]
    w = solved[..., v.shape[-1] :]
    d_out = torch.zeros_like(v) if grad_out is None else _by_chunk(grad_out, heads, size)

    before, corrected = [], []  # the state each chunk begins with, and the values it adds to that
    for n in range(q.shape[2]):
        before.append(state)
        corrected.append(solved[:, :, n, :, : v.shape[-1]] - w[:, :, n] @ state)
        state = last[:, :, n] * state + k_left[:, :, n].mT @ corrected[n]
    after, d_corrected = [], []
    for n in reversed(range(q.shape[2])):
        after.append(d_state)
        d_corrected.append(attention[:, :, n].mT @ d_out[:, :, n] + k_left[:, :, n] @ d_state)
        d_state = (
            q_grown[:, :, n].mT @ d_out[:, :, n] + last[:, :, n] * d_state - w[:, :, n].mT @ d_corrected[-1]
        )
    states, added = torch.stack(before, 2), torch.stack(corrected, 2)
    d_after, d_added = torch.stack(after[::-1], 2), torch.stack(d_corrected[::-1], 2)
    d_q_grown, d_k_left = d_out @ states.mT, added @ d_after.mT
    d_attention = d_out @ added.mT
    d_last = (d_after * states).sum((-2, -1))

    # Of (I + A) X = R:  dR = (I + A)⁻ᵀ dX  and  dA = −dR Xᵀ, A strictly lower triangular.
    grown, until = decay.exp().unsqueeze(-1), (decay[..., -1:] - decay).exp().unsqueeze(-1)
    weighted = rate * k
    system = (weighted @ k.mT * between).tril(-1)
    d_solved = torch.cat([d_added, -d_added @ states.mT], dim=-1)
    d_right = torch.linalg.solve_triangular(system.mT, d_solved, upper=True, unitriangular=True)
    d_system = -(d_right @ solved.mT).tril(-1)
    d_values, d_keys = d_right.split([v.shape[-1], k.shape[-1]], dim=-1)

    d_pairs, d_scores = d_system * between, d_attention * between
    d_weighted = d_pairs @ k + grown * d_keys
    d_q = d_scores @ k + d_q_grown * grown
    d_k = d_pairs.mT @ weighted + d_scores.mT @ q + d_k_left * until + rate * d_weighted
    d_rate = (d_values * v).sum(-1) + (d_weighted * k).sum(-1)
    # A factor exp(x) hands x its own value times its gradient.
    d_between = d_system * system + d_attention * attention
    d_until = (d_k_left * k_left).sum(-1)
    d_decay = d_between.sum(-1) - d_between.sum(-2) - d_until
    d_decay += (d_q_grown * q_grown).sum(-1) + (d_keys * weighted * grown).sum(-1)
    d_decay[..., -1] += d_until.sum(-1) + d_last * last[..., 0, 0]
    d_g = d_decay.flip(-1).cumsum(-1).flip(-1)

    d_q, d_k, d_v, d_g, d_rate = (
        x.flatten(2, 3)[:, :, :length].transpose(1, 2) for x in (d_q, d_k, rate * d_values, d_g, d_rate)
    )
    d_query, d_key = (
        x.unflatten(2, (key_heads, heads // key_heads)).sum(3) for x in (d_q * k.shape[-1] ** -0.5, d_k)
    )
    if given.normalise:
        d_query, d_key = _before_norm(given.query, d_query), _before_norm(given.key, d_key)
    return [d_query, d_key, d_v, d_g.where(given.g >= LEAST_LOG_DECAY, 0.0), d_rate, d_state]


def _before_norm(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x, from that of x / sqrt(Σx² + ε)."""
    x = x.to(torch.float32)
    inverse = torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON)
    normed = x * inverse
    return inverse * (gradient - normed * (normed * gradient).sum(-1, keepdim=True))


def _run(cotangents: Cotangents, given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`gradients` as one node of a graph; the last is an empty tensor where there was no initial state."""
    _check(cotangents, given)
    found = gradients(cotangents, given)
    return tuple(found if len(found) == 6 else [*found, given.query.new_empty(0)])  # type: ignore[return-value]


def _check(cotangents: Cotangents, given: Given) -> None:
    check("chunk_gated_delta_rule_backward", *given.tensors)  # type: ignore[arg-type]
    check_tensors(
        "chunk_gated_delta_rule_backward",
        grad_out=("[B, T, HV, dv]", cotangents.grad_out),
        grad_state=("[B, HV, dk, dv]", cotangents.grad_state),
    )
    batch, length, heads, dv = given.value.shape
    sequences = batch if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
    expected = (batch, length, heads, dv), (sequences, heads, given.key.shape[-1], dv)
    for name, x, shape in zip(Cotangents._fields, cotangents, expected, strict=True):
        if x is not None and x.shape != shape:
            raise ShapeError(
                f"chunk_gated_delta_rule_backward: {name} is {tuple(x.shape)}, not {tuple(shape)}"
            )


def _fake(cotangents: Cotangents, given: Given) -> tuple[Tensor, ...]:
    state = given.initial_state
    empty = given.query.new_empty(0) if state is None else state.new_empty(state.shape)
    return (*(x.new_empty(x.shape) for x in given[:5]), empty)


chunk_gated_delta_rule_backward = operator("chunk_gated_delta_rule_backward", _run, _fake, Cotangents, Given)
