"""RMSNorm times silu of a gate becomes one call: y = x / sqrt(mean(x²) + ε) · w · silu(gate).

Before: h = x.float(); h = w * (h * rsqrt(mean(h ** 2, -1, keepdim=True) + eps)).to(x.dtype)
        y = (h * silu(gate.float())).to(x.dtype)
After:  y = gated_rms_norm(x, gate, w, eps)
"""

from fxfuse.passes.formula_rule import FormulaRule
from fxfuse.patterns import idioms

RULE = FormulaRule("gated_rms_norm", idioms.GATED_RMS_NORM, "gated_rms_norm", ("x", "gate", "weight", "eps"))
