"""Products with a gate: SwiGLU, and attention's output times the sigmoid of its gate."""

import random

from torch.fx import Node

from fxfuse.testing.blocks.block import Block, Sizes, base, normal, projected
from fxfuse.testing.speller import Speller


def _write_swiglu(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    gate = s.linear(x, 2 * sizes["hidden"], name="gate_proj")
    up = s.linear(x, 2 * sizes["hidden"], name="up_proj")
    return [s.linear(s.spell("times_silu", gate, up), sizes["hidden"], name="down_proj")]


def _draw_gated(rng: random.Random) -> Sizes:
    return base(rng, heads=rng.choice((2, 3)), head=rng.choice((4, 6)), joined=rng.choice((0, 1)))


def _write_sigmoid_gate(s: Speller, sizes: Sizes, x: Node) -> list[Node]:
    """Gated head by head, or after the heads are joined."""
    batch, length = s.sizes(x, 2)
    heads, head = sizes["heads"], sizes["head"]
    attended = s.transpose(s.input(normal(s, "y", sizes["batch"], heads, sizes["length"], head)), 1, 2)
    gate = s.reshape(s.linear(x, heads * head, name="gate"), batch, length, heads, head)
    if sizes["joined"]:
        attended, gate = (s.reshape(t, batch, length, heads * head) for t in (attended, gate))
    return [projected(s, s.spell("times_sigmoid", attended, gate), sizes)]


BLOCKS = (
    Block("swiglu", "swiglu", base, _write_swiglu, exact=False),
    Block("gated_heads", "sigmoid_gate", _draw_gated, _write_sigmoid_gate, exact=False),
)
