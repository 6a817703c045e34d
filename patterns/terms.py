"""The terms of a formula in a graph, and what is looked through to see them: casts and broadcasts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.patterns import readings
from fxfuse.patterns.ops import CONSTANT_COPY


@dataclass(frozen=True)
class Virtual:
    """A part of an operator that is no node of the graph: the sigmoid inside a silu, say."""

    function: str
    argument: Term
    constant: float = 0.0


Term = Node | Virtual
Items = list[tuple[Term, float]]  # factors with exponents, or terms with coefficients


def argument_of(name: str, term: Term) -> Term | None:
    """What the graph calls this function of."""
    if not isinstance(term, Node) or str(term.target) != f"aten.{name}.default" or term.kwargs:
        return None
    return term.args[0]  # type: ignore[return-value]


def is_cast(node: Node) -> bool:
    """Whether a call changes nothing but dtype or strides; a cast to integers does more."""
    value = node.meta.get("val")
    return (
        node.op == "call_function"
        and str(node.target) in readings.CASTS
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and isinstance(node.args[0], Node)
        and node.args[0].meta["val"].is_floating_point()
    )


def before_casts(term: Term) -> Term:
    while isinstance(term, Node) and is_cast(term):
        term = term.args[0]  # type: ignore[assignment]
    return term


def uncast(term: Term) -> Term:
    """The term before casts and before it was given leading dimensions."""
    while isinstance(term, Node) and (is_cast(term) or _is_broadcast(term)):
        term = term.args[0]  # type: ignore[assignment]
    return term


def _is_broadcast(node: Node) -> bool:
    """Whether a call repeats its input along new or single leading dimensions, or adds those."""
    source = node.args[0] if str(node.target) in readings.BROADCASTS else None
    if not isinstance(source, Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    value, before = node.meta["val"], source.meta["val"]
    if before.dim() > value.dim():
        return False
    ends = zip(before.shape[::-1], value.shape[::-1], value.stride()[::-1], strict=False)
    if not all(statically_known_true(a == b) or (a == 1 and stride == 0) for a, b, stride in ends):
        return False
    lead = zip(value.shape[: value.dim() - before.dim()], value.stride(), strict=False)
    return all(statically_known_true(size == 1) or stride == 0 for size, stride in lead)


def sole_sources(term: Term) -> Iterator[Node]:
    """Each value from which alone a term is computed, constants aside; the nearest first."""
    waiting = {term} if isinstance(term, Node) else set[Node]()
    while waiting and all(node.op == "call_function" for node in waiting):
        last = max(waiting)
        waiting.remove(last)
        read = () if str(last.target) == CONSTANT_COPY else last.all_input_nodes
        waiting.update(node for node in read if isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)))
        if len(waiting) == 1:
            yield from waiting


def before_exact_casts(node: Node) -> Node:
    while is_cast(node):
        source: Node = node.args[0]  # type: ignore[assignment]
        given, got = source.meta["val"].dtype, node.meta["val"].dtype
        if torch.promote_types(given, got) != got:
            return node
        node = source
    return node


def before_broadcast(node: Node, dims: int) -> Node:
    """The tensor of so many dimensions whose elements stand in the last ones of the node."""
    while _is_broadcast(node) and node.args[0].meta["val"].dim() >= dims:  # type: ignore[union-attr]
        node = before_exact_casts(node.args[0])  # type: ignore[arg-type]
    return node
