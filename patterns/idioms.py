"""The formulas of the models' pointwise and normalising parts."""

from fxfuse.patterns.formula import Scalar, Var, exp, mean, sigmoid, silu, softplus, total

_x, _gate, _up = Var("x"), Var("gate"), Var("up")
_weight = Var("weight", dims=1)
_eps = Scalar("eps")
_normed = _x * (mean(_x * _x) + _eps) ** -0.5

ANYTHING, ANYTHING_ELSE = _x, Var("y")
ZERO_CENTRED_RMS_NORM = _normed * (1.0 + _weight)
RMS_NORM = _normed * _weight
GATED_RMS_NORM = _normed * _weight * silu(_gate)
SWIGLU = silu(_gate) * _up
SIGMOID_GATE = _x * sigmoid(_gate)
LOG_DECAY = -exp(Var("A_log", dims=1)) * softplus(Var("a") + Var("dt_bias", dims=1))
RATE = sigmoid(Var("b"))
DECAY = exp(Var("g"))
L2_NORM = _x * (total(_x * _x) + _eps) ** -0.5
