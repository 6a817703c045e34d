"""One decoded token as people write it who have never seen the generator; for `test_strangers_spellings`.

The first argument of each holds the parameters: `taps` [12, 1, 4], `w` [12], `wk` [8, 12].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

B, H, D = 2, 12, 8
EPS = 1e-6


def normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# A convolution over a state of four columns


def projected(m: Any, y: Tensor) -> Tensor:
    """Read by a linear: strides that leave the graph forbid the rewrite."""
    return F.linear(y if y.dim() == 2 else y.mT, m.wk)


def stepped(dot: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def compute(m: Any, x: Tensor, state: Tensor) -> Tensor:
        columns = torch.cat([state, x], dim=-1)
        state.copy_(columns[..., -4:])
        return projected(m, F.silu(dot(m, columns, state)))

    return compute


def rolled(m: Any, x: Tensor, state: Tensor, by: int = -1) -> Tensor:
    state.copy_(torch.roll(state, shifts=by, dims=-1))
    state[:, :, -1] = x[:, :, 0]
    return projected(m, F.silu(torch.sum(state * m.taps.squeeze(1), dim=-1) + m.w))


def moved_by_hand(m: Any, x: Tensor, state: Tensor) -> Tensor:
    state[..., :-1] = state[..., 1:].clone()
    state[..., -1:] = x
    return projected(m, F.silu((state * m.taps[:, 0]).sum(-1, keepdim=True)))


def three_columns_kept(m: Any, x: Tensor, state: Tensor) -> Tensor:
    window = torch.cat((state[..., 1:], x), 2)
    y = torch.einsum("bdk,dk->bd", window, m.taps.view(H, 4))
    state.copy_(window)
    return projected(m, y * torch.sigmoid(y))


def tap_by_tap(m: Any, columns: Tensor, state: Tensor) -> Tensor:
    y = m.w.view(1, -1)
    for i in range(4):
        y = torch.addcmul(y, columns[:, :, i + 1], m.taps[:, 0, i])
    return y


CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "conv1d": stepped(lambda m, new, state: F.conv1d(new, m.taps, groups=H)[..., -1:]),
    "conv1d with its bias": stepped(lambda m, new, state: F.conv1d(new, m.taps, m.w, groups=H)[..., -1:]),
    "sum of products": stepped(
        lambda m, new, state: (new[..., -4:] * m.taps.squeeze(1)).sum(-1, keepdim=True)
    ),
    "sum over the state": stepped(lambda m, new, state: torch.sum(state * m.taps[:, 0], dim=-1)[..., None]),
    "einsum": stepped(lambda m, new, state: torch.einsum("bck,ck->bc", new[..., 1:], m.taps[:, 0])),
    "einsum and a bias": stepped(lambda m, new, state: torch.einsum("bck,cok->bc", state, m.taps) + m.w),
    "vecdot": stepped(lambda m, new, state: torch.linalg.vecdot(state, m.taps.squeeze(1))),
    "mean times the number of taps": stepped(lambda m, new, state: (state * m.taps[:, 0]).mean(-1) * 4),
    "matmul": stepped(lambda m, new, state: (new[:, :, None, 1:] @ m.taps.mT[None]).squeeze(-1)),
    "one tap after the other": stepped(
        lambda m, new, state: sum(new[..., i + 1 : i + 2] * m.taps[..., i] for i in range(4))
    ),
    "addcmul": stepped(tap_by_tap),
    "rolled": rolled,
    "moved by hand": moved_by_hand,
    "three columns kept": three_columns_kept,
}

# One token of the delta rule over a state of four heads, in the words of the model's own code


def l2_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)


def delta_step(
    norm: Callable[[Tensor], Tensor] = l2_norm,
    early: bool = False,
    apart: bool = False,
    returned: bool = False,
    undecayed: bool = False,
    joined: bool = False,
    keyed: bool = False,
) -> Callable[..., Any]:
    """Query and key have two heads; `early`: normalised before those are repeated.

    `keyed`: the rate multiplies the key.
    `undecayed`: the memory is read before it decays, which is another rule. `joined`: read by a product of
    matrices, whose rows are the heads side by side.
    """

    def compute(
        m: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> Any:
        heads = [norm(x.float()) if early else x for x in (query, key)]
        heads = [x.repeat_interleave(2, dim=2) for x in heads]
        q, k, v, b, decay = (x.transpose(1, 2).float()[:, :, 0] for x in (*heads, value, beta, g))
        q, k = (q, k) if early else (norm(q), norm(k))
        moved = state * decay.exp()[..., None, None]
        known, b = ((state if undecayed else moved) * k[..., None]).sum(-2), b[..., None]
        delta = v * b - known * b if apart else (v - known) * b
        k, delta = (k * b, v - known) if keyed else (k, delta)
        moved = moved + k[..., None] * delta[..., None, :]
        out = (moved * (q * D**-0.5)[..., None]).sum(-2)
        out = out[:, :, None].transpose(1, 2).contiguous().to(query.dtype)
        if joined:
            rows = torch.bmm((q * D**-0.5).reshape(-1, 1, D), moved.reshape(-1, D, D))
            out = rows.to(query.dtype).view(B, 1, -1)
        if returned:
            return [out, moved]
        state.copy_(moved)
        return out

    return compute


def in_place(rank: Callable[[Tensor, Tensor, Tensor], Any], before: bool = False) -> Callable[..., Any]:
    """The state decays and is added to where it is; `before`: it is read out too early."""

    def compute(
        m: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor
    ) -> Tensor:
        q, k = (l2_norm(x[:, 0].repeat_interleave(2, dim=1).float()) for x in (query, key))
        state *= g[:, 0].exp()[..., None, None]
        known = torch.einsum("bhkv,bhk->bhv", state, k)
        early = torch.einsum("bhkv,bhk->bhv", state, q * D**-0.5)
        rank(state, k, beta[:, 0].float().unsqueeze(-1) * (value[:, 0].float() - known))
        out = early if before else torch.einsum("bhkv,bhk->bhv", state, q * D**-0.5)
        return out.unsqueeze(1).to(query.dtype)

    return compute


def doubled(out: Tensor, state: Tensor) -> list[Tensor]:
    return [out, state * 2]


def step_inputs() -> list[Tensor]:
    shapes = [(B, 1, 2, D), (B, 1, 2, D), (B, 1, 4, D), (B, 1, 4), (B, 1, 4), (B, 4, D, D)]
    q, k, v, g, beta, state = normal(*shapes)
    return [q.bfloat16(), k.bfloat16(), v.bfloat16(), -g.abs(), beta.sigmoid().bfloat16(), state]


DELTA_STEPS: dict[str, Callable[..., Any]] = {
    "as the model has it": delta_step(),
    "normalised before the repeat": delta_step(early=True),
    "vector_norm squared": delta_step(
        lambda x: x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 + EPS)
    ),
    "norm, pow": delta_step(lambda x: x / (x.norm(dim=-1, keepdim=True).pow(2) + EPS).sqrt(), early=True),
    "einsum": delta_step(lambda x: x * torch.rsqrt(torch.einsum("...d,...d->...", x, x)[..., None] + EPS)),
    "mean times n": delta_step(lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) * D + EPS)),
    "the rate on value and memory": delta_step(apart=True),
    "the rate on the key": delta_step(keyed=True),
    "the rate on the key, normalised early": delta_step(early=True, keyed=True),
    "heads side by side at once": delta_step(joined=True),
    "in place": in_place(lambda state, k, v: state.add_(k.unsqueeze(-1) * v.unsqueeze(-2))),
    "in place, addcmul": in_place(lambda state, k, v: state.addcmul_(k[..., None], v[..., None, :])),
    "in place, einsum": in_place(lambda state, k, v: state.__iadd__(torch.einsum("bhk,bhv->bhkv", k, v))),
}

# The new state leaves the graph; how many matches there are
RETURNED: dict[str, tuple[Callable[..., Any], int]] = {
    "as the model has it": (delta_step(returned=True), 1),
    "norms before": (delta_step(early=True, apart=True, returned=True), 1),
    "heads side by side": (delta_step(joined=True, returned=True), 1),
    "read before it decays": (delta_step(undecayed=True, returned=True), 0),
    "doubled": (lambda m, *given: doubled(*delta_step(returned=True)(m, *given)), 0),
}

# Attention of one token over keys that heads share


def repeated(x: Tensor, times: int = 2) -> Tensor:
    """repeat_kv as transformers has it."""
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, width)
    return x.reshape(batch, heads * times, length, width)


def eager(repeat: Callable[[Tensor], Tensor] = repeated, before: bool = False) -> Callable[..., Any]:
    """The attention of transformers without a library's; `before`: the query is scaled, not the scores."""

    def compute(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        keys, values = repeat(k), repeat(v)
        late, early = (1.0, D**-0.5) if before else (D**-0.5, 1.0)
        scores = torch.matmul(q * early, keys.transpose(2, 3)) * late
        weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        weights = F.dropout(weights, p=0.0, training=False)
        return torch.matmul(weights, values).transpose(1, 2).contiguous()

    return compute


def scores_in_place(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.repeat_interleave(2, 1).permute(0, 1, 3, 2)
    scores /= math.sqrt(D)
    scores += mask
    return (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2)


def by_library(repeat: Callable[[Tensor], Tensor] = repeated, **options: Any) -> Callable[..., Any]:
    def compute(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=mask, **options)
        return y.transpose(1, 2)

    return compute


def attention_inputs() -> list[Tensor]:
    q, k, v, mask = normal((B, 4, 1, D), (B, 2, 9, D), (B, 2, 9, D), (B, 1, 1, 9))
    return [q, k, v, torch.where(mask > 1, -1e4, 0.0)]


ATTENTIONS: dict[str, Callable[..., Any]] = {
    "sdpa of what is expanded": by_library(),
    "sdpa of repeat_interleave": by_library(lambda x: torch.repeat_interleave(x, 2, dim=1), scale=D**-0.5),
    "sdpa that knows groups": by_library(lambda x: x, enable_gqa=True),
    "matmul, softmax, matmul": eager(),
    "of repeat_interleave": eager(lambda x: x.repeat_interleave(2, dim=1)),
    "the query scaled": eager(before=True),
    "scores in place": scores_in_place,
}

STEPS: dict[str, tuple[dict[str, Callable[..., Any]], Callable[[], list[Tensor]]]] = {
    "causal_conv1d_update": (CONVOLUTIONS, lambda: normal((B, H, 1), (B, H, 4))),
    "recurrent_gated_delta_rule": (DELTA_STEPS, step_inputs),
    "grouped_query_attention": (ATTENTIONS, attention_inputs),
}

# What is nearly a step, and none: the key says what is wrong with it.


def two_states(m: Any, x: Tensor, state: Tensor) -> Tensor:
    columns = torch.cat([state, x], dim=-1)
    state.copy_(columns[..., :4])
    return projected(m, (columns[..., 1:] * m.taps[:, 0]).sum(-1))


def read_by_others(m: Any, x: Tensor, state: Tensor) -> list[Tensor]:
    columns = torch.cat([state, x], dim=-1)
    state.copy_(columns[..., -4:])
    products = columns[..., -4:] * m.taps[:, 0]
    return [projected(m, products.sum(-1)), products * 3]


def one_group(x: Tensor) -> Tensor:
    return x[:, None].expand(B, 2, 2, 9, D).reshape(B, 4, 9, D)


NO_STEPS: dict[str, tuple[str, Callable[..., Any]]] = {
    "the columns roll the other way": ("causal_conv1d_update", lambda m, x, s: rolled(m, x, s, 1)),
    "the sum is over the columns before": (
        "causal_conv1d_update",
        stepped(lambda m, new, state: (new[..., :4] * m.taps[:, 0]).sum(-1)),
    ),
    "the taps are in another order": (
        "causal_conv1d_update",
        stepped(lambda m, new, state: torch.einsum("bck,ck->bc", state, m.taps[:, 0].flip(-1))),
    ),
    "the last column is not kept": ("causal_conv1d_update", two_states),
    "the products are read, too": ("causal_conv1d_update", read_by_others),
    "the memory is read before it decays": ("recurrent_gated_delta_rule", delta_step(undecayed=True)),
    "the memory is read out before it is added to": (
        "recurrent_gated_delta_rule",
        in_place(lambda state, k, v: state.add_(k[..., None] * v[..., None, :]), before=True),
    ),
    "added to by half": (
        "recurrent_gated_delta_rule",
        in_place(lambda state, k, v: state.addcmul_(k[..., None], v[..., None, :], value=0.5)),
    ),
    "the heads follow each other, not the repeats": ("grouped_query_attention", eager(one_group)),
    "and for the library": ("grouped_query_attention", by_library(one_group)),
}
