"""RMSNorm, zero-centred or plain, gated, and behind a residual sum."""

import torch
from torch.fx import Node

from fxfuse.testing.blocks.block import Block, Sizes, base, normal, seeded
from fxfuse.testing.speller import Speller

__all__ = ["BLOCKS", "normed", "zero_centred"]


def normed(s: Speller, x: Node, eps: float) -> Node:
    """x in fp32, divided by the root of its mean square over the last dimension."""
    wide = s.cast(x, torch.float32)
    return s.same(s.spell("normed", wide, eps))


def zero_centred(s: Speller, x: Node, name: str) -> Node:
    """normed(x) · (1 + w), in x's dtype."""
    weight = s.parameter(f"{name}.weight", seeded(s, f"{name}.weight", s.shape(x)[-1]) - 1)
    scaled = s.same(s.spell("times_one_plus", normed(s, x, 1e-6), s.cast(weight, torch.float32)))
    return s.cast(scaled, s.value(x).dtype, x)


def _plain(s: Speller, x: Node) -> Node:
    weight = s.parameter("norm.weight", seeded(s, "norm.weight", s.shape(x)[-1]))
    return s.mul(weight, s.cast(normed(s, x, 1e-6), s.value(x).dtype, x))


def _write_rms_norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    return [s.mul(zero_centred(s, x, "norm"), 2)]


def _write_plain_rms_norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    return [s.mul(_plain(s, x), 2)]


def _write_gated_rms_norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    gate = s.input(normal(s, "gate", *s.shape(x)))
    gated = s.mul(_plain(s, x), s.silu(s.cast(gate, torch.float32)))
    return [s.mul(s.cast(gated, s.value(x).dtype, x), 2)]


def _write_add_rms_norm(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    residual = s.input(normal(s, "residual", *s.shape(x)))
    total = s.add(x, residual)
    y = zero_centred(s, total, "norm") if sizes["zero_centred"] else _plain(s, total)
    return [s.mul(y, 2), s.mul(total, 2)]


BLOCKS = (
    Block("zero_centred_rms_norm", "rms_norm", base, _write_rms_norm, exact=False),
    Block("plain_rms_norm", "rms_norm", base, _write_plain_rms_norm, exact=False),
    Block("gated_rms_norm", "gated_rms_norm", base, _write_gated_rms_norm, exact=False),
    Block(
        "sum_and_norm",
        "add_rms_norm",
        lambda rng: base(rng, zero_centred=rng.choice((0, 1))),
        _write_add_rms_norm,
        exact=False,
        after=("rms_norm",),
    ),
)
