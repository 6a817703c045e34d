"""silu of one tensor times another becomes one call.

Before: y = silu(gate) * up
After:  y = silu_mul(gate, up)
"""

from fxfuse.passes.formula_rule import FormulaRule
from fxfuse.patterns import idioms

RULE = FormulaRule("swiglu", idioms.SWIGLU, "silu_mul", ("gate", "up"))
