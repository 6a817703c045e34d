"""A tensor times the sigmoid of its gate becomes one call, on the heads before they are joined.

Before: y = reshape(attention, [B, T, H·D]) * sigmoid(reshape(gate, [B, T, H·D]))
After:  y = reshape(sigmoid_gate_mul(attention, gate), [B, T, H·D])
"""

from fxfuse.passes.formula_rule import FormulaRule
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.program import Program
from fxfuse.passes.reshapes_after import reshape_after
from fxfuse.passes.storage_writes import equal_sizes
from fxfuse.patterns import idioms
from fxfuse.patterns.matcher import Bound


def has_a_gate_for_each_element(bound: Bound) -> bool:
    return equal_sizes(bound["x"].meta["val"].shape, bound["gate"].meta["val"].shape)


RULE = FormulaRule(
    "sigmoid_gate",
    idioms.SIGMOID_GATE,
    "sigmoid_gate_mul",
    ("x", "gate"),
    suits=has_a_gate_for_each_element,
)


def run(program: Program) -> Outcome:
    """Rewrite every gated tensor; where both operands join heads, that is done afterwards."""
    outcome = RULE.run(program)
    if outcome.matches:
        reshape_after(program, "fxfuse.sigmoid_gate_mul.default")
    return outcome
