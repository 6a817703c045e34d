"""The lengths of a static cache's layers, one tensor each, are counted up together at the end of the graph.

Before: positions = arange(T) + length; length.add_(T); …                       in every layer
After:  positions = arange(T) + length; …; _foreach_add_([length, …], T)        once

Until then each layer may read its length as it was, which is where its new tokens begin.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.program import Program
from fxfuse.passes.regions import erase
from fxfuse.passes.storage_writes import StorageWrites, storage_of, written_by

RULE = "cache_lengths"
COUNTS = ("aten.add_.Tensor", "aten.sub_.Tensor", "aten.copy_.default")


def step_of(node: Node) -> Any:
    """The n of x.add_(n), x.sub_(-n) and x.copy_(x + n)."""
    length, step = node.args[:2]
    if str(node.target) == "aten.sub_.Tensor":
        return -step if isinstance(step, int) else None  # type: ignore[operator]
    if str(node.target) == "aten.copy_.default":
        plain = isinstance(step, Node) and str(step.target) == "aten.add.Tensor" and not step.kwargs
        pairs = (step.args, step.args[::-1]) if plain else ()  # type: ignore[union-attr]
        return next((n for x, n in pairs if x is length), None)  # type: ignore[misc]
    return step


def counts_up(node: Node) -> bool:
    """An input of one whole number, counted up by a number; nobody reads what the call returns."""
    length, *rest = node.args
    if node.users or node.kwargs or len(rest) != 1 or not isinstance(length, Node):
        return False
    value, step = length.meta.get("val"), step_of(node)
    if step is None or (isinstance(step, Node) and isinstance(step.meta.get("val"), Tensor)):
        return False
    return (
        length.op == "placeholder"
        and isinstance(value, Tensor)
        and value.dim() == 0
        and not value.is_floating_point()
    )


def run(program: Program) -> Outcome:
    """Move every count that nothing reads afterwards to the end."""
    outcome = Outcome()
    last_use: dict[int | None, Node] = {}
    for node in program.graph.nodes:
        if node.op != "output":
            for n in node.all_input_nodes:
                last_use[storage_of(n)] = node
    together: dict[Any, list[Node]] = defaultdict(list)
    writes = StorageWrites(program.graph)
    for node in program.calls(*COUNTS):
        length, sum_ = node.args[:2]
        if isinstance(sum_, Node) and writes.version(length, sum_) != writes.version(length, node):  # type: ignore[arg-type]
            continue
        if counts_up(node) and last_use[storage_of(node)] is node and written_by(node) == [node.args[0]]:
            together[step_of(node)].append(node)
    for step, nodes in together.items():
        with program.graph.inserting_before(program.graph.find_nodes(op="output")[0]):
            lengths: Any = [node.args[0] for node in nodes]
            program.graph.call_function(torch.ops.aten._foreach_add_.Scalar, (lengths, step))
        erase(program, nodes)
        what = f"{len(nodes)} counts → 1" if len(nodes) > 1 else "count → end of the graph"
        outcome.matches.append(Match(RULE, "", (), what))
    return outcome
