"""Gated delta rule over a sequence: S_t = exp(g_t)·S_{t-1}·(I − β_t k_t k_tᵀ) + β_t k_t v_tᵀ, o_t = S_tᵀ q_t.

Formula: Yang, Kautz, Hatamizadeh, "Gated Delta Networks" (2024), in its chunked form: inside a chunk the
product of the rank-one updates is the solution of one unit lower-triangular system, between chunks only the
state is carried.
"""

import torch
from torch import Tensor

CHUNK = 64
L2_EPSILON = 1e-6


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, T, h, ...] in any float dtype to [B, heads, T, ...] in fp32, each head repeated heads / h times."""
    x = x.transpose(1, 2).to(torch.float32)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _l2_normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON)


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, H, T, ...] to [B, H, N, size, ...], zeros appended where T is not a multiple of the size."""
    missing = -x.shape[2] % size
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2)
    return x.unflatten(2, (-1, size))


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """The rule in plain torch, computed in fp32; differentiable.

    Args:
        query, key: [B, T, Hk, dk]; value: [B, T, HV, dv], HV a multiple of Hk; any float dtype, any strides.
        g, beta: [B, T, HV]; g is the logarithm of the decay.
        initial_state: [B, HV, dk, dv] or None for zeros.
        normalise: l2-normalise query and key over dk.

    Returns:
        out [B, T, HV, dv] in query's dtype, contiguous; final state [B, HV, dk, dv] in fp32, contiguous.
    """
    dtype, (batch, length, heads, dv), dk = query.dtype, value.shape, key.shape[-1]
    if normalise:
        query, key = _l2_normalised(query.float()), _l2_normalised(key.float())
    q, k, v, decay, rate = (_heads_first(x, heads) for x in (query, key, value, g, beta))
    q = q * dk**-0.5
    state = q.new_zeros(batch, heads, dk, dv) if initial_state is None else initial_state.to(torch.float32)
    if length == 0:
        return value.new_empty(value.shape, dtype=dtype), state.clone()

    size = min(CHUNK, length)
    q, k, v, decay, rate = (_chunks(x, size) for x in (q, k, v, decay, rate))
    decay = decay.cumsum(-1)
    rate = rate.unsqueeze(-1)
    causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril()
    between = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
    grown = decay.exp().unsqueeze(-1)

    # (I + A) [u | w] = β [v | exp(γ) k]; the diagonal of the left side is taken as one by the solver.
    system = (rate * k) @ k.mT * between
    solved = torch.linalg.solve_triangular(
        system, torch.cat([rate * v, rate * grown * k], dim=-1), upper=False, unitriangular=True
    )
    u, w = solved.split([dv, dk], dim=-1)
    attention = q @ k.mT * between
    q = q * grown
    k = k * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    last = decay[..., -1].exp()[..., None, None]

    outs = []
    for i in range(q.shape[2]):
        corrected = u[:, :, i] - w[:, :, i] @ state
        outs.append(q[:, :, i] @ state + attention[:, :, i] @ corrected)
        state = last[:, :, i] * state + k[:, :, i].mT @ corrected
    out = torch.cat(outs, dim=2)[:, :, :length].transpose(1, 2)
    return out.to(dtype).contiguous(), state.contiguous()


@torch.library.custom_op("fxfuse::chunk_gated_delta_rule", mutates_args=())
def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """The rule over [B, T, ...] as one node of a graph; shapes and dtypes as in `reference`."""
    out, state = reference(query, key, value, g, beta, initial_state, normalise)
    return out, state.clone() if state is initial_state else state


@chunk_gated_delta_rule.register_fake
def _(query, key, value, g, beta, initial_state, normalise):  # type: ignore[no-untyped-def]
    batch, length, heads, dv = value.shape
    out = query.new_empty((batch, length, heads, dv))
    return out, query.new_empty((batch, heads, key.shape[-1], dv), dtype=torch.float32)


@torch.library.custom_op("fxfuse::chunk_gated_delta_rule_backward", mutates_args=())
def chunk_gated_delta_rule_backward(
    grad_out: Tensor | None,
    grad_state: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, g, beta and the initial state: autograd over the reference, recomputed.

    The last one is an empty tensor where there was no initial state.
    """
    given = [query, key, value, g, beta, *([] if initial_state is None else [initial_state])]

    def forward(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, *state: Tensor
    ) -> tuple[Tensor, Tensor]:
        return reference(q, k, v, g, b, state[0] if state else None, normalise)

    # An operator's kernel runs below autograd; torch.func brings its own.
    outs, pull = torch.func.vjp(forward, *given)[:2]
    cotangents = tuple(
        torch.zeros_like(o) if d is None else d for o, d in zip(outs, (grad_out, grad_state), strict=True)
    )
    grads = [x.contiguous() for x in pull(cotangents)]
    return tuple(grads if initial_state is not None else [*grads, query.new_empty(0)])  # type: ignore[return-value]


@chunk_gated_delta_rule_backward.register_fake
def _(grad_out, grad_state, query, key, value, g, beta, initial_state, normalise):  # type: ignore[no-untyped-def]
    state = query.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return (*(x.new_empty(x.shape) for x in (query, key, value, g, beta)), state)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.normalise = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_out, grad_state):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors  # once: under activation checkpointing each look unpacks them
    *rest, state = chunk_gated_delta_rule_backward(grad_out, grad_state, *saved, ctx.normalise)
    return (*rest, None if saved[5] is None else state, None)


chunk_gated_delta_rule.register_autograd(_backward, setup_context=_save)
