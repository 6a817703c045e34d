"""What a block is: sizes to draw, and a function that writes it with a speller."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfuse.testing.speller import Speller
from fxfuse.testing.tensors import integer_tensor

__all__ = ["Block", "Sizes", "base", "normal", "projected", "seeded"]

Sizes = dict[str, int]


@dataclass(frozen=True)
class Block:
    """One piece of a model.

    Attributes:
        name: of the block.
        rule: name of the pass that should match it, once.
        draw: sizes of one example.
        write: takes a speller, the sizes and the hidden states [B, T, hidden]; returns the outputs.
        exact: whether a correct rewrite gives the same bits on small integers.
        after: passes that have to run before the rule's.
        whole: how the detail of the match begins where all parts of the block are in it.
    """

    name: str
    rule: str
    draw: Callable[[random.Random], Sizes]
    write: Callable[[Speller, Sizes, Node], Sequence[Node]]
    exact: bool = True
    after: tuple[str, ...] = ()
    whole: Callable[[Sizes], str] = lambda sizes: ""

    @property
    def passes(self) -> tuple[str, ...]:
        return (*self.after, self.rule)

    def hidden_states(self, sizes: Sizes, seed: int = 0) -> Tensor:
        shape = (sizes["batch"], sizes["length"], sizes["hidden"])
        if self.exact:
            return integer_tensor(shape, seed)
        # Small values in every other example: there the epsilon of a norm counts.
        scale = 1e-3 if seed % 2 else 1.0
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale

    def module(self, sizes: Sizes, speller: Speller) -> tuple[GraphModule, tuple[Tensor, ...]]:
        """The block as a graph module, and inputs for it."""
        x = speller.input(self.hidden_states(sizes, speller.seed))
        module = speller.module(*self.write(speller, sizes, x))
        return module, tuple(speller.inputs)


def base(rng: random.Random, **more: int) -> Sizes:
    """Sizes of hidden states, and more."""
    return {
        "batch": rng.choice((2, 3)),
        "length": rng.choice((5, 3, 7)),
        "hidden": rng.choice((8, 6, 12)),
        **more,
    }


def projected(s: Speller, y: Node, sizes: Sizes) -> Node:
    """y [B, T, …] through an output projection, after which nobody sees how y lay in memory."""
    flat = s.reshape(y, *s.sizes(y, 2), -1) if len(s.shape(y)) > 3 else y
    return s.mul(s.linear(flat, sizes["hidden"], name="out_proj"), 2)


def seeded(s: Speller, name: str, *shape: int) -> Tensor:
    """Values of a parameter that is no integer matter: numbers around 1."""
    return 1 + 0.3 * normal(s, name, *shape)


def normal(s: Speller, name: str, *shape: int) -> Tensor:
    """Normal values, decided by the seed and the name."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(s.seed_of(name)))
