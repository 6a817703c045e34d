"""Whole random programs: several blocks in a row, shared weights, writes in place, sizes that vary."""

import random
from collections import Counter
from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.speller import Speller
from fxfuse.testing.tensors import integer_tensor

__all__ = ["RandomProgram", "random_program"]

# Blocks that are one row, whatever the shape of a program.
ONE_TOKEN = ("experts_of_one_token", "chosen_experts")
ONE_ROW = ("one_row", *ONE_TOKEN)
EXACT = tuple(block.name for block in BLOCKS.values() if block.exact and block.name not in ONE_ROW)


@dataclass(frozen=True)
class RandomProgram:
    """A graph module, inputs that it runs on, and which blocks it was written from, in order."""

    module: GraphModule
    inputs: tuple[Tensor, ...]
    blocks: tuple[str, ...]

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) for x in self.inputs]
        return f"RandomProgram of {', '.join(self.blocks)} on {shapes}:{self.module.code}"


def random_program(
    rng: random.Random,
    *,
    blocks: tuple[str, ...] = EXACT,
    most: int = 3,
    seed: int = 0,
    dynamic: bool = False,
    writes: bool = True,
    length: int | None = None,
) -> RandomProgram:
    """Up to `most` of the named blocks one after the other, over small integers.

    Args:
        blocks: names in `fxfuse.testing.blocks.BLOCKS`; by default those on which rewrites are bit-equal.
        dynamic: leading sizes are asked of tensors, never written as numbers.
        writes: between the blocks some values are written or turned in place, detached, or copied.
        length: of the sequences; drawn where it is not given. Blocks of decoding need 1.
    """
    s = Speller(rng, seed=seed, dynamic=dynamic)
    hidden = rng.choice((6, 8))
    shape = (
        (rng.choice((2, 3)), rng.choice((3, 4, 5)), hidden)
        if length is None
        else (rng.choice((1, 2, 3)), length, hidden)
    )
    x = s.input(integer_tensor(shape, seed))
    names: list[str] = []
    outputs: list[Node] = []
    sizes: dict[str, dict[str, int]] = {}
    used: Counter[str] = Counter()
    for _ in range(rng.randint(1, most)):
        name = rng.choice(blocks)
        shared = name in sizes and rng.random() < 0.3
        if not shared:
            used[name] += 1
            sizes[name] = BLOCKS[name].draw(rng)
        sizes[name] |= {"batch": shape[0], "length": shape[1], "hidden": hidden}
        s.prefix = f"{name}{used[name]}_"
        made = list(BLOCKS[name].write(s, sizes[name], x))
        names.append(name)
        s.prefix = f"glue{len(names)}_"
        if writes and rng.random() < 0.3:
            outputs += _between(s, rng.choice([x, *made]))
        outputs += rng.sample(made, rng.randint(1, len(made)))
        x = _next(s, x, hidden)
    return RandomProgram(s.module(*outputs, x), tuple(s.inputs), tuple(names))


def _between(s: Speller, x: Node) -> list[Node]:
    """A write, sizes that change in place and back, a view of what is detached, or a copy that is written."""
    kind = s.rng.choice(("written", "written", "detached", "copied", "turned"))
    if kind == "written":
        s.call(s.rng.choice(("add_", "mul_")), x, 2)
    elif kind == "turned":
        s.call("transpose_", s.call("transpose_", x, 0, -1), 0, -1)
    elif kind == "detached":
        return [s.call("narrow", s.call("detach", x), 0, 0, 1)]
    else:
        copy = s.call("clone", x)
        s.call("mul_", s.call("narrow", copy, 0, 0, 1), 3)
        return [copy]
    return []


def _next(s: Speller, x: Node, hidden: int) -> Node:
    """The hidden states of the next block: small integers again."""
    y = s.linear(x, hidden, name="mix")
    if s.maybe(0.5):
        y = s.add(y, x)
    return s.call("clamp", y, -2, 2)
