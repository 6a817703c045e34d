"""Parts of a linear's output as strided views of it: the features they are, and the calls that read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.layout_chains import blocks_of
from fxfuse.passes.numbered_features import TooLarge, cuts_of, region_of
from fxfuse.passes.program import Program
from fxfuse.passes.regions import call, is_made_of_numbers
from fxfuse.patterns import ops


@dataclass(frozen=True)
class Part:
    """Features of a linear's output, read in order by `node`."""

    linear: Node
    node: Node
    features: tuple[int, ...]

    def taken(self, features: Sequence[int]) -> "Part":
        return Part(self.linear, self.node, tuple(features))

    @property
    def is_strided(self) -> bool:
        return len(blocks_of(self.features)) == 4

    def of(self, row: Tensor, dims: Sequence[int]) -> Tensor:
        """The part of a row's values, its features in these dimensions."""
        return row[..., list(self.features)].unflatten(-1, tuple(dims))

    def view(self, program: Program, dims: Sequence[int]) -> Node:
        """The part as a view, its features in these dimensions, at the insertion point."""
        start, run, stride, count = blocks_of(self.features)
        if count == 1:
            whole = call(program, self.node, torch.ops.aten.slice.Tensor, self.linear, -1, start, start + run)
            return call(program, self.node, torch.ops.aten.unflatten.int, whole, -1, list(dims))
        target: Any = torch.ops.fxfuse.gather_features.default
        groups = call(program, self.node, target, self.linear, [start, run, stride, count], [count, run])
        if tuple(dims) == (count, run):
            return groups
        inner = call(program, self.node, torch.ops.aten.unflatten.int, groups, -1, list(dims[1:]))
        return inner


def projections(program: Program) -> set[Node]:
    """The linears of weights; one of numbers alone, such as a sum by ones, projects nothing."""
    linears = program.calls(ops.LINEAR)
    return {n for n in linears if not is_made_of_numbers(n.args[1])}  # type: ignore[arg-type]


def parts_of(linear: Node) -> list[Part]:
    """The parts that the graph takes from a linear's output, each once; none where they cannot be told."""
    try:
        _, cuts = cuts_of(region_of(linear))
    except TooLarge:
        return []
    found: dict[tuple[int, ...], Part] = {}
    for cut in cuts:
        found.setdefault(cut.features, Part(linear, cut.node, cut.features))
    return list(found.values())
