"""A rule that replaces every occurrence of a formula by one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, read_by
from fxfuse.passes.storage_writes import equal_sizes
from fxfuse.patterns.formula import Formula
from fxfuse.patterns.matcher import Bound, matches
from fxfuse.runtime.ops.limits import unsupported


@dataclass(frozen=True)
class FormulaRule:
    """`formula` becomes `target(*arguments, *constants)`, whose result has the dtype of its first argument.

    Attributes:
        arguments: names of variables and scalars of the formula, in the order of the operator's.
        constants: further arguments of the operator.
        suits: whether what the formula was bound to is an occurrence at all.
    """

    name: str
    formula: Formula
    target: str
    arguments: tuple[str, ...]
    constants: tuple[Any, ...] = ()
    suits: Callable[[Bound], bool] = lambda bound: True

    def run(self, program: Program) -> Outcome:
        """Rewrite from the graph's end, where the widest occurrences begin."""
        outcome, guards, judge = Outcome(), Guards(program), Judge()
        done: set[Node] = set()
        found: list[tuple[Node, Bound, list[Node]]] = []
        for node in reversed(list(program.graph.nodes)):
            if node in done or node.op != "call_function":
                continue
            bound = next((b for b in matches(self.formula, node) if self._fits(node, b)), None)
            if bound is None:
                continue
            region = behind([node], set(_nodes(bound)))
            why = self._reason(guards, judge, region, node, bound)
            if why is None:
                found.append((node, bound, region))
                done.update(region)
            else:
                outcome.misses.append(Miss(self.name, module_path(node), why[0].name, why[1]))
                done.add(node)
        replaced: dict[Node, Node] = {}
        for node, bound, region in reversed(found):
            operands = [replaced.get(o, o) if isinstance(o, Node) else o for o in self._operands(bound)]
            with program.graph.inserting_before(node):
                new = replaced[node] = call(program, node, self.operator(), *operands)
            node.replace_all_uses_with(new)
            members = tuple(program.weights[n.name].name for n in _nodes(bound) if n.name in program.weights)
            outcome.matches.append(Match(self.name, module_path(node), members, f"{len(region)} calls → 1"))
        for _, _, region in found:
            erase(program, region)
        return outcome

    def operator(self) -> Any:
        return getattr(torch.ops.fxfuse, self.target).default

    def _operands(self, bound: Bound) -> list[Any]:
        return [*(bound[name] for name in self.arguments), *self.constants]

    def _fits(self, node: Node, bound: Bound) -> bool:
        nodes = _nodes(bound)
        if len(set(nodes)) < len(nodes):  # x · sigmoid(x) is no gated tensor
            return False
        first = bound[self.arguments[0]].meta["val"]
        value = node.meta.get("val")
        return (
            isinstance(value, torch.Tensor)
            and value.dtype == first.dtype
            and equal_sizes(value.shape, first.shape)
            and self.suits(bound)
        )

    def _reason(
        self, guards: Guards, judge: Judge, region: Sequence[Node], node: Node, bound: Bound
    ) -> tuple[Node, str] | None:
        operands = self._operands(bound)
        read = read_by(region)
        unread = next((n for n in _nodes(bound) if n not in read), None)
        if unread is not None:
            return node, f"{unread.name} is read by nothing but what another input is computed from"
        values = (o.meta["val"] if isinstance(o, Node) else o for o in operands)
        why = unsupported(self.target, *values)
        if why is not None:
            return node, why
        dtype = node.meta["val"].dtype
        found = guards.reason(region, [node], {dtype, torch.promote_types(dtype, torch.float32)})
        if found is not None:
            return found

        def candidate(values: Any) -> Sequence[torch.Tensor]:
            return [self.operator()(*(values[o] if isinstance(o, Node) else o for o in operands))]

        name = f"{self.target} {[o for o in operands if not isinstance(o, Node)]}"
        try:
            same = judge.equal(region, [node], candidate, name)
        except Refused as refusal:
            return refusal.node, refusal.reason
        return None if same else (node, f"run on random values it is no {self.target}")


def _nodes(bound: Bound) -> list[Node]:
    return [value for value in bound.values() if isinstance(value, Node)]
