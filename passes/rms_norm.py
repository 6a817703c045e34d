"""RMSNorm, zero-centred or plain, becomes one call: y = x / sqrt(mean(x²) + ε) · (1 + w), or · w.

Before: h = x.float(); h = h * rsqrt(mean(h ** 2, -1, keepdim=True) + eps)
        y = (h * (1 + w.float())).to(x.dtype)
After:  y = rms_norm(x, w, eps, zero_centred=True)
"""

from fxfuse.passes.formula_rule import FormulaRule
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.program import Program
from fxfuse.patterns import idioms

RULE = "rms_norm"
ARGUMENTS = ("x", "weight", "eps")
RULES = (
    FormulaRule(RULE, idioms.ZERO_CENTRED_RMS_NORM, "rms_norm", ARGUMENTS, (True,)),
    FormulaRule(RULE, idioms.RMS_NORM, "rms_norm", ARGUMENTS, (False,)),
)


def run(program: Program) -> Outcome:
    """Rewrite every norm; report every one that stays, with the node and the reason."""
    outcome = Outcome()
    for rule in RULES:
        found = rule.run(program)
        outcome.matches += found.matches
        outcome.misses += found.misses
        if found.matches:
            program.refresh()  # the next rule reads the values of this one's calls
    return outcome
