"""Gradients of the gated delta rule over whole sequences as one operator, whatever the number of chunks.

Formula: `gated_delta_rule`, differentiated step by step from its end; what it computed on the way is computed
again. An operator's own code runs below autograd, which therefore cannot be asked for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.errors import ShapeError, UnsupportedModelError
from fxfuse.runtime.ops.arguments import check_tensors
from fxfuse.runtime.ops.gated_delta_rule import (
    CHUNK,
    LEAST_LOG_DECAY,
    Factors,
    Given,
    by_chunk,
    check,
    factors,
    initial,
    inverse,
    keys_over_queries,
    parts,
)
from fxfuse.runtime.ops.listed_once import operator

LEAST_RATE = 1e-20  # stands for rates of zero, for gradients are divided by it


def _filled_chunks(x: Tensor, heads: int, size: int) -> Tensor:
    """[B, T, h, ...] as [N, B, heads, size, ...], in its dtype.

    Each head is repeated heads / h times, and zeros are appended where T is no multiple of the size.
    """
    missing = -x.shape[1] % size
    x = F.pad(x, [*[0] * (2 * (x.dim() - 2)), 0, missing]) if missing else x
    x = by_chunk(x, size)
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


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


class _Chunks(NamedTuple):
    """N chunks of n tokens, b value heads of all sequences, in fp32; the rule itself: `gated_delta_rule`.

    Attributes:
        pairs: [N, b, 2n, dk], keys over queries; value: [N, b, n, dv].
        by: their factors.
        solved, inside: [N, b, n, n], the inverted system and the attention inside of a chunk.
    """

    pairs: Tensor
    value: Tensor
    by: Factors
    solved: Tensor
    inside: Tensor


def _chunks(given: Given, beta: Tensor) -> _Chunks:
    length, heads = given.value.shape[1:3]
    size = min(CHUNK, length)
    query, key, value, g, rate = (_filled_chunks(x, heads, size) for x in (*given[:4], beta))
    pairs = keys_over_queries(key, query).flatten(1, 2)
    value, g, rate = (x.to(torch.float32).flatten(1, 2) for x in (value, g, rate))
    by = factors(pairs, g, rate, given.normalise)
    products = pairs @ pairs[..., :size, :].mT * by.pairs
    system, inside = products[..., :size, :], products[..., size:, :]
    return _Chunks(pairs, value, by, inverse(system.flatten(0, 1)).unflatten(0, (len(pairs), -1)), inside)


def _carried(of: _Chunks, above: Tensor, d_errors: Tensor, states: Tensor, d_states: Tensor) -> Tensor:
    """Errors [N, b, n, dv] of chunks that have states, and what there is to know of these.

    Args:
        above: [N, b, 2n, dv], gradients of what keys and queries read: those of queries are given, those of
            keys are written.
        d_errors: [N, b, n, dv], gradients of the errors by way of each chunk's own output; written to.
        states, d_states: [N + 1, b, dk, dv], before and after each chunk: the first and the last are given.
    """
    size = of.value.shape[2]
    kept, reading = of.pairs[..., :size, :] * of.by.keeping, of.pairs * of.by.reading
    errors = torch.empty_like(d_errors)
    for n, over in enumerate(of.by.over):
        missing = torch.baddbmm(of.value[n], reading[n, :, :size], states[n], alpha=-1)
        torch.bmm(of.solved[n], missing, out=errors[n])
        torch.mul(over, states[n], out=states[n + 1]).baddbmm_(kept[n].mT, errors[n])
    for n in reversed(range(len(errors))):
        d_errors[n].baddbmm_(kept[n], d_states[n + 1])
        above[n, :, :size] = -(of.solved[n].mT @ d_errors[n])
        torch.mul(of.by.over[n], d_states[n + 1], out=d_states[n]).baddbmm_(reading[n].mT, above[n])
    return errors


def _of_sequences(grad_out: Tensor | None, grad_state: Tensor | None, given: Given) -> list[Tensor]:
    """Gradients of all six in float32, of sequences side by side."""
    batch, length, heads, dv = given.value.shape
    key_heads = given.key.shape[2]
    state = initial(given.query, given.value, given.initial_state)
    d_state = torch.zeros_like(state) if grad_state is None else grad_state.to(torch.float32)
    if length == 0:
        return [*(x.new_zeros(x.shape) for x in given[:5]), d_state]
    beta = given.beta.to(torch.float32)
    beta = torch.where(beta.abs() < LEAST_RATE, LEAST_RATE, beta)
    of = _chunks(given, beta)
    pairs, by = of.pairs, of.by
    size = of.value.shape[2]
    keys = pairs[..., :size, :]

    above = of.value.new_zeros(*of.value.shape[:2], 2 * size, dv)
    if grad_out is not None:
        above[..., size:, :].unflatten(1, (batch, heads)).copy_(_filled_chunks(grad_out, heads, size))
    d_errors = of.inside.mT @ above[..., size:, :]
    carried = len(pairs) > 1 or given.initial_state is not None or grad_state is not None
    if carried:
        states = of.value.new_empty(len(pairs) + 1, batch * heads, *state.shape[2:])
        d_states = torch.empty_like(states)
        states[0], d_states[-1] = state.flatten(0, 1), d_state.flatten(0, 1)
        errors = _carried(of, above, d_errors, states, d_states)
        d_state = d_states[0].unflatten(0, (batch, heads))
    else:
        errors = of.solved @ of.value
        above[..., :size, :] = -(of.solved.mT @ d_errors)

    # Of (I + A) e = m:  dm = (I + A)⁻ᵀ de  and  dA = −dm eᵀ, A strictly lower triangular.
    d_products = (above @ errors.mT).mul_(by.pairs)
    d_products[..., :size, :].diagonal(dim1=-2, dim2=-1).zero_()
    d_pairs, d_keys = d_products @ keys, d_products.mT @ pairs
    if carried:
        d_pairs += above @ states[:-1].mT * by.reading
        d_keys += errors @ d_states[1:].mT * by.keeping
    # Rates, norms and exp(decay) are factors: their gradients, times them, are sums of products' own.
    of_rows, of_columns = torch.linalg.vecdot(d_pairs, pairs), torch.linalg.vecdot(d_keys, keys)
    d_decay = of_rows[..., :size] + of_rows[..., size:] - of_columns
    if carried:
        d_decay[..., -1] += (states[1:] * d_states[1:]).sum((-2, -1))
    d_g = d_decay.flip(-1).cumsum(-1).flip(-1)
    d_pairs[..., :size, :] += d_keys
    if given.normalise:
        of_rows[..., :size] += of_columns
        d_pairs.addcmul_(pairs, (by.norms.square() * of_rows).unsqueeze(-1), value=-1)

    def tokens(x: Tensor) -> Tensor:
        """[N, b, n, ...] as [B, T, HV, ...]."""
        return x.unflatten(1, (batch, heads)).movedim(2, 3).movedim(0, 1).flatten(1, 2)[:, :length]

    d_key, d_query = (
        tokens(x).unflatten(2, (key_heads, -1)).sum(3)
        for x in (d_pairs[..., :size, :], d_pairs[..., size:, :])
    )
    d_g = tokens(d_g).where(given.g >= LEAST_LOG_DECAY, 0.0)
    return [d_query, d_key, tokens(-above[..., :size, :]), d_g, tokens(of_columns) / beta, d_state]


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


def _second(ctx, *grads):  # type: ignore[no-untyped-def]
    raise UnsupportedModelError(
        "the gradients of chunk_gated_delta_rule have none of their own: where they are differentiated once "
        "more, as a gradient penalty is, call model.deoptimize() first"
    )


chunk_gated_delta_rule_backward.register_autograd(_second)
