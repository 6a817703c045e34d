"""Gated DeltaNet: the gates of the chunked rule, the rule, and one decoded token from projection to output.

g = −exp(A_log) · softplus(a + dt_bias), β = sigmoid(b); for each token S ← S · exp(g) + k̂ ⊗ β (v − Sᵀ k̂) and
y = Sᵀ q̂ / √dk ("Gated Delta Networks", Yang, Kautz and Hatamizadeh 2024; Qwen3-Next and Qwen3.5).
"""

import random

import torch
from torch.fx import Node

from fxfuse.runtime import ops
from fxfuse.testing.blocks.block import Block, Sizes, base, normal, projected, seeded
from fxfuse.testing.blocks.norms import normed
from fxfuse.testing.speller import Speller

assert ops  # registers the chunked rule, which capture keeps as one node


def _draw(rng: random.Random) -> Sizes:
    return base(
        rng,
        heads=rng.choice((2, 1)),
        ratio=rng.choice((2, 1, 3)),
        key=rng.choice((4, 3)),
        value=rng.choice((6, 5)),
    )


def _log_decay(s: Speller, a: Node, heads: int) -> Node:
    a_log = s.parameter("A_log", seeded(s, "A_log", heads))
    dt_bias = s.parameter("dt_bias", seeded(s, "dt_bias", heads))
    decay = s.exp(s.cast(a_log, torch.float32))
    shifted = s.add(s.cast(a, torch.float32), dt_bias)
    return s.same(s.spell("minus_product", decay, s.softplus(shifted)))


def _chunked_rule(
    s: Speller, sizes: Sizes, x: Node, gates: list[Node], normalised: bool = False
) -> list[Node]:
    """With query and key normalised before the rule, or by it."""
    batch, length = s.sizes(x, 2)
    heads, values = sizes["heads"], sizes["heads"] * sizes["ratio"]
    q = s.reshape(s.linear(x, heads * sizes["key"], name="q"), batch, length, heads, sizes["key"])
    k = s.reshape(s.linear(x, heads * sizes["key"], name="k"), batch, length, heads, sizes["key"])
    v = s.reshape(s.linear(x, values * sizes["value"], name="v"), batch, length, values, sizes["value"])
    if normalised:
        q, k = (s.cast(_normalised(s, t), s.dtype, x) for t in (q, k))
    rule = torch.ops.fxfuse.chunk_gated_delta_rule.default
    both = s.call(rule, q, k, v, *gates, None, not normalised)
    out, state = s.parts(both, 2)
    return [projected(s, out, sizes), s.mul(state, 2)]


def _write_gates(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    heads = sizes["heads"] * sizes["ratio"]
    b = s.linear(x, heads, name="in_proj_b")
    a = s.linear(x, heads, name="in_proj_a")
    return _chunked_rule(s, sizes, x, [_log_decay(s, a, heads), s.sigmoid(b)])


def _given_gates(s: Speller, sizes: Sizes) -> list[Node]:
    shape = (sizes["batch"], sizes["length"], sizes["heads"] * sizes["ratio"])
    return [s.input(-normal(s, "g", *shape).abs()), s.input(normal(s, "b", *shape).sigmoid())]


def _write_normalised_rule(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    return _chunked_rule(s, sizes, x, _given_gates(s, sizes), normalised=True)


def _write_repeated_rule(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    """Every key head repeated for the value heads of its group, before the rule."""
    batch, length, heads, ratio = (sizes[n] for n in ("batch", "length", "heads", "ratio"))
    values, gates = heads * ratio, _given_gates(s, sizes)
    repeated = []
    for name in ("q", "k"):
        few = s.reshape(s.linear(x, heads * sizes["key"], name=name), batch, length, heads, sizes["key"])
        repeated.append(s.transpose(s.repeat_heads(s.transpose(few, 1, 2), ratio), 1, 2))
    v = s.reshape(s.linear(x, values * sizes["value"], name="v"), batch, length, values, sizes["value"])
    rule = torch.ops.fxfuse.chunk_gated_delta_rule.default
    out, state = s.parts(s.call(rule, *repeated, v, *gates, None, True), 2)
    return [projected(s, out, sizes), s.mul(state, 2)]


# One decoded token


def _draw_step(rng: random.Random) -> Sizes:
    more = {"taps": rng.choice((4, 2)), "rows": rng.choice((0, 1, 2)), "cut": rng.choice((0, 1))}
    return _draw(rng) | more | {"length": 1, "fewer": rng.choice((0, 0, 1))}


def _rows(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    """q|k|v [B, 1, C], z [B, 1, HV·dv], b and a [B, 1, HV]: of one row, of four, or interleaved by heads."""
    heads, ratio, dk, dv = sizes["heads"], sizes["ratio"], sizes["key"], sizes["value"]
    values = heads * ratio
    widths = [2 * heads * dk + values * dv, values * dv, values, values]
    if sizes["rows"] == 0:
        return s.split(s.linear(x, sum(widths), name="in_proj"), widths)
    if sizes["rows"] == 1:
        names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        return [s.linear(x, width, name=name) for width, name in zip(widths, names, strict=True)]
    batch, length = s.sizes(x, 2)
    parts = [dk, dk, ratio * dv, ratio * dv]
    row = s.linear(x, heads * sum(parts), name="in_proj_qkvz")
    q, k, v, z = s.split(s.reshape(row, batch, length, heads, sum(parts)), parts)
    flat = [s.reshape(t, batch, length, heads * width) for t, width in zip((q, k, v), parts, strict=False)]
    gates = s.reshape(s.linear(x, 2 * values, name="in_proj_ba"), batch, length, heads, 2 * ratio)
    b, a = (s.reshape(t, batch, length, values) for t in s.split(gates, [ratio, ratio]))
    return [s.cat(flat), s.reshape(z, batch, length, values * dv), b, a]


def _normalised(s: Speller, x: Node) -> Node:
    wide = s.cast(x, torch.float32)
    return s.mul(wide, s.rsqrt(s.add(s.spell("sum_square", wide), 1e-6)))


def _convolved(s: Speller, sizes: Sizes, mixed: Node) -> Node:
    """silu of the convolution over the state's columns, K or K - 1, and the new one; the state moves on."""
    channels, taps, columns = s.shape(mixed)[-1], sizes["taps"], sizes["taps"] - sizes["fewer"]
    conv_state = s.input(normal(s, "conv_state", sizes["batch"], channels, columns))
    window = s.cat([conv_state, s.transpose(mixed, 1, 2)])
    last = s.split(window, [1, columns])[1]
    s.spell("write", conv_state, last)
    seen = last if sizes["cut"] and columns == taps else window
    whole = s.shape(seen)[-1] == taps
    y = s.convolution(seen, "conv1d", taps, causal=False, by_hand=whole)
    y = y if whole else s.split(y, [1, 1])[1]
    return s.transpose(s.silu(y), 1, 2)


def _moved_on(s: Speller, sizes: Sizes, mixed: Node, b: Node, a: Node) -> Node:
    """The step of the rule [B, HV, dv] in fp32; the state moves on."""
    batch, heads, ratio, dk, dv = (sizes[n] for n in ("batch", "heads", "ratio", "key", "value"))
    values = heads * ratio
    state = s.input(normal(s, "state", batch, values, dk, dv), dtype=torch.float32)
    q, k, v = s.split(mixed, [heads * dk, heads * dk, values * dv])
    q, k = (s.repeat_heads(s.reshape(t, batch, heads, 1, dk), ratio) for t in (q, k))
    q, k = (s.reshape(_normalised(s, t), batch, values, dk) for t in (q, k))
    v = s.cast(s.reshape(v, batch, values, dv), torch.float32)

    decay = s.exp(s.reshape(_log_decay(s, a, values), batch, values, 1, 1))
    beta = s.reshape(s.sigmoid(s.cast(b, torch.float32)), batch, values, 1)
    kept = s.mul(state, decay)
    delta = s.mul(s.sub(v, s.spell("read_state", kept, k)), beta)
    new = s.add(kept, s.spell("outer", k, delta))
    out = s.spell("read_state", new, s.mul(q, dk**-0.5))
    s.spell("write", state, new)
    return out


def _write_step(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    batch, values, dv = sizes["batch"], sizes["heads"] * sizes["ratio"], sizes["value"]
    mixed, z, b, a = _rows(s, sizes, x)
    out = _moved_on(s, sizes, _convolved(s, sizes, mixed), b, a)
    weight = s.parameter("norm.weight", seeded(s, "norm.weight", dv))
    gate = s.silu(s.cast(s.reshape(z, batch, values, dv), torch.float32))
    y = s.mul(s.mul(s.cast(weight, torch.float32), normed(s, out, 1e-6)), gate)
    row = s.reshape(s.cast(y, s.dtype, x), batch, 1, values * dv)
    return [projected(s, row, sizes)]


def _write_recurrence(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    mixed, _, b, a = _rows(s, sizes, x)
    out = s.cast(_moved_on(s, sizes, mixed, b, a), s.dtype, x)
    return [projected(s, s.reshape(out, sizes["batch"], 1, -1), sizes)]


def _write_convolution(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    return [projected(s, _convolved(s, sizes, x), sizes)]


BLOCKS = (
    Block("gates_of_the_delta_rule", "gdn_gates", _draw, _write_gates, exact=False),
    Block(
        "rule_of_repeated_keys",
        "grouped_delta_rule",
        lambda rng: _draw(rng) | {"ratio": rng.choice((2, 3))},
        _write_repeated_rule,
        exact=False,
    ),
    Block("rule_of_normalised_keys", "l2_norm", _draw, _write_normalised_rule, exact=False),
    Block("recurrence", "recurrent_gated_delta_rule", _draw_step, _write_recurrence, exact=False),
    Block("convolution_of_one_token", "causal_conv1d_update", _draw_step, _write_convolution, exact=False),
    Block("decoded_token", "gdn_decode", _draw_step, _write_step, exact=False),
)
