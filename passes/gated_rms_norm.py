"""RMSNorm times silu of a gate becomes one call: y = x / sqrt(mean(x²) + ε) · w · silu(gate).

Before: h = x.float(); h = w * (h * rsqrt(mean(h ** 2, -1, keepdim=True) + eps)).to(x.dtype)
        y = (h * silu(gate.float())).to(x.dtype)
After:  y = gated_rms_norm(x, gate, w, eps)
"""

from fxfuse.passes.formula_rule import FormulaRule
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.program import Program
from fxfuse.passes.reshapes_after import reshape_after
from fxfuse.patterns import idioms

RULE = FormulaRule("gated_rms_norm", idioms.GATED_RMS_NORM, "gated_rms_norm", ("x", "gate", "weight", "eps"))


def run(program: Program) -> Outcome:
    """Rewrite every gated norm; where x and gate are both made rows of, that is done afterwards."""
    outcome = RULE.run(program)
    if outcome.matches:
        reshape_after(program, "fxfuse.gated_rms_norm.default", keeps_last=True)
    return outcome
