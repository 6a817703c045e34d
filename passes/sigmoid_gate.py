"""A tensor times the sigmoid of its gate becomes one call, on the heads before they are joined.

Before: y = reshape(attention, [B, T, H·D]) * sigmoid(reshape(gate, [B, T, H·D]))
After:  y = reshape(sigmoid_gate_mul(attention, gate), [B, T, H·D])
"""

from torch.fx import Node

from fxfuse.passes.formula_rule import FormulaRule
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes
from fxfuse.patterns import idioms, ops
from fxfuse.patterns.matcher import Bound

JOINS = (ops.RESHAPE, "aten.flatten.using_ints")


def gate_is_broadcast(bound: Bound) -> str | None:
    x, gate = bound["x"].meta["val"].shape, bound["gate"].meta["val"].shape
    return None if equal_sizes(x, gate) else f"its gate is {tuple(gate)}, not of its own shape"


RULE = FormulaRule(
    "sigmoid_gate",
    idioms.SIGMOID_GATE,
    "sigmoid_gate_mul",
    ("x", "gate"),
    refuse=gate_is_broadcast,
)


def run(program: Program) -> Outcome:
    """Rewrite every gated tensor; where both operands join heads, that is done afterwards."""
    outcome = RULE.run(program)
    if outcome.matches:
        writes = StorageWrites(program.graph)
        for node in program.calls("fxfuse.sigmoid_gate_mul.default"):
            _join_after(program, writes, node)
    return outcome


def _join_after(program: Program, writes: StorageWrites, node: Node) -> None:
    joined = [operand for operand in node.args if isinstance(operand, Node)]
    if any(str(n.target) not in JOINS or writes.is_written(n) for n in joined):
        return
    sources: list[Node] = [n.args[0] for n in joined]  # type: ignore[misc]
    if not equal_sizes(*(n.meta["val"].shape for n in sources)):
        return
    how = joined[0]
    with program.graph.inserting_after(node):
        after = program.graph.call_function(how.target, (node, *how.args[1:]))  # type: ignore[arg-type]
    after.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    node.args = tuple(sources)
    node.meta.pop("val", None)
    for n in joined:
        if not n.users:
            program.graph.erase_node(n)
