"""Which features of a linear a node holds, found by running the nodes behind it on numbered elements.

The numbers say where every element came from, whatever the spelling. Sizes that vary are tried at two values
each: what holds for both, and has the shape that the graph says, depends on neither.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxfuse.patterns import ops

# Values for sizes that vary, in two runs: primes, so that products and sums of them differ.
TRIALS = ((5, 11, 17, 23, 29), (7, 13, 19, 31, 37))
# Elements that a chain may have to be numbered: 256 MB.
MOST_ELEMENTS = 2**25


@dataclass(frozen=True)
class Cut:
    """A node of the chain whose rows are whole: the features it holds, in order, and their shape."""

    node: Node
    features: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def is_in_order(self) -> bool:
        return self.features == tuple(range(self.features[0], self.features[0] + len(self.features)))


class TooLarge(Exception):
    """Numbering the chain would take more memory than it is worth."""


def region_of(linear: Node) -> list[Node]:
    """The linear and the nodes that hold nothing but its features, in graph order."""
    region = {linear}
    for node in linear.graph.nodes:
        is_layout = node.op == "call_function" and (
            node.target is operator.getitem or str(node.target) in ops.LAYOUT
        )
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple))]
        if is_layout and tensors and region.issuperset(tensors):
            region.add(node)
    return [node for node in linear.graph.nodes if node in region]


def cuts_of(region: Sequence[Node]) -> tuple[list[Node], list[Cut]]:
    """The part of the region that can be numbered, and its last nodes whose rows are whole.

    A cut has a use beyond rearranging it into other whole rows. Raises TooLarge.
    """
    runs = [_numbered(region, primes) for primes in TRIALS]
    known = [node for node in region if all(node in run for run in runs)]
    first, second = runs
    whole = {node: found for node in known if (found := first[node]) and found == second[node]}
    inside = {node for node in known if node in whole or _only_feeds(node, set(known), set(whole))}
    leading = region[0].meta["val"].dim() - 1
    cuts = []
    for node in known:
        shape = tuple(node.meta["val"].shape[leading:]) if node in whole else ()
        if shape and all(type(n) is int for n in shape) and any(user not in inside for user in node.users):
            cuts.append(Cut(node, whole[node], shape))
    return known, cuts


def features_of(node: Node, region: Sequence[Node]) -> tuple[int, ...] | None:
    """The features that the node's rows hold of those of the region's first; None where they are not whole.

    Raises TooLarge.
    """
    first, second = (_numbered(region, primes).get(node) for primes in TRIALS)
    return first if first == second else None


def _only_feeds(node: Node, known: set[Node], whole: set[Node]) -> bool:
    """Whether a list (of a split) or another step is there only on the way to nodes whose rows are whole."""
    return bool(node.users) and all(
        user in known and (user in whole or _only_feeds(user, known, whole)) for user in node.users
    )


def _numbered(region: Sequence[Node], primes: Sequence[int]) -> dict[Node, tuple[int, ...] | None]:
    """The features of each node's rows, None where rows are not whole; without what does not add up."""
    sizes: dict[Any, int] = {}
    linear = region[0]

    def concrete(value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr
        for symbol in expression.free_symbols:
            sizes.setdefault(symbol, primes[len(sizes) % len(primes)])
        return int(expression.subs(sizes))

    shape = [concrete(size) for size in linear.meta["val"].shape]
    if prod(shape) > MOST_ELEMENTS:
        raise TooLarge
    values: dict[Node, Any] = {linear: torch.arange(prod(shape), device="cpu").reshape(shape)}
    last_use = {n: node for node in region for n in node.all_input_nodes}
    found = {linear: _features(values[linear], shape)}

    def value_of(node: Node) -> Any:
        return values[node] if node in values else concrete(node.meta["val"])

    for node in region[1:]:
        sources = [n for n in node.all_input_nodes if n in last_use]
        if all(n in values or n not in region for n in sources):
            args, kwargs = map_arg((node.args, node.kwargs), value_of)
            value = node.target(*args, **kwargs)  # type: ignore[operator]
            if _shapes(value) == _shapes(node.meta["val"], concrete):
                values[node], found[node] = value, _features(value, shape)
        for source in sources:
            if last_use[source] is node:
                values.pop(source, None)
    return found


def _shapes(value: Any, concrete: Any = lambda size: size) -> Any:
    if isinstance(value, Tensor):
        return tuple(concrete(size) for size in value.shape)
    return tuple(_shapes(v, concrete) for v in value)


def _features(value: Any, whole: Sequence[int]) -> tuple[int, ...] | None:
    """The features that each row of the linear has in `value`, if every row is there, in order and alike."""
    *lead, width = whole
    if not isinstance(value, Tensor) or list(value.shape[: len(lead)]) != lead or value.dim() == len(lead):
        return None
    rows = value.reshape(prod(lead), -1)
    picked = rows[0]
    if not torch.equal(rows, picked + torch.arange(prod(lead), device="cpu")[:, None] * width):
        return None
    return tuple(picked.tolist())
