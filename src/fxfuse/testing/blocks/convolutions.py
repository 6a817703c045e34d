"""Depthwise convolutions: causal ones with their SiLU, and short ones over a window."""

import random
from functools import partial

from torch.fx import Node

from fxfuse.testing.blocks.block import Block, Sizes, base, normal, projected
from fxfuse.testing.speller import Speller


def _draw(rng: random.Random) -> Sizes:
    return base(rng, taps=rng.choice((4, 2, 3)), bias=rng.choice((0, 1)), silu=rng.choice((1, 1, 0)))


def _write_causal(s: Speller, sizes: Sizes, x: Node, by_hand: bool = False) -> list[Node]:
    mixed, bias = s.transpose(x, 1, 2), bool(sizes["bias"])
    y = s.convolution(mixed, "conv1d", sizes["taps"], causal=True, bias=bias, by_hand=by_hand)
    return [projected(s, s.transpose(s.silu(y) if sizes["silu"] else y, 1, 2), sizes)]


def _write_window(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    past = s.input(normal(s, "past", sizes["batch"], sizes["hidden"], sizes["taps"]))
    window = s.cat([past, s.transpose(x, 1, 2)])
    y = s.convolution(window, "conv1d", sizes["taps"], causal=False, bias=bool(sizes["bias"]))
    return [projected(s, s.transpose(s.silu(y), 1, 2), sizes)]


BLOCKS = (
    Block(
        "causal_convolution",
        "causal_conv1d",
        _draw,
        partial(_write_causal, by_hand=True),
        exact=False,
    ),
    Block("causal_convolution_on_cpu", "depthwise_convs", _draw, _write_causal, exact=False),
    Block("convolution_of_a_window", "depthwise_convs", _draw, _write_window, exact=False),
)
