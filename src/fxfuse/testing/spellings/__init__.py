"""Ways to write one operation, by name: functions, methods, operators, keywords, in place, and by detours.

Each entry of the table takes the speller and the operands, writes calls and returns the result, or raises
`DoesNotApply` before it writes anything. All spellings of an operation have equal values: bit for bit where
the operation moves elements or works on small integers, to rounding elsewhere. The first of each is the
plain one.

Nothing here knows of fxfuse's normal form, or shares code with it.
"""

from collections.abc import Mapping

from fxfuse.testing.spellings import (
    activations,
    arithmetic,
    attention,
    chosen,
    convolutions,
    dimensions,
    identities,
    linears,
    reductions,
    shapes,
    writes,
)
from fxfuse.testing.spellings.spelling import DoesNotApply, Spelling

__all__ = ["TABLE", "DoesNotApply"]

TABLE: Mapping[str, dict[str, Spelling]] = {
    "size": shapes.SIZE,
    "identity": identities.IDENTITY,
    "reshape": shapes.RESHAPE,
    "split": shapes.SPLIT,
    "cat": shapes.CAT,
    "unsqueeze": dimensions.UNSQUEEZE,
    "transpose": dimensions.TRANSPOSE,
    "repeat_heads": dimensions.REPEAT_HEADS,
    "linear": linears.LINEAR,
    "turned": linears.TURNED,
    "chosen": chosen.CHOSEN,
    "each_times_its_row": chosen.EACH_TIMES_ITS_ROW,
    "cast": arithmetic.CAST,
    "add": arithmetic.ADD,
    "sub": arithmetic.SUB,
    "mul": arithmetic.MUL,
    "neg": arithmetic.NEG,
    "minus_product": arithmetic.MINUS_PRODUCT,
    "times_one_plus": arithmetic.TIMES_ONE_PLUS,
    "square": arithmetic.SQUARE,
    "rsqrt": arithmetic.RSQRT,
    "mean": reductions.MEAN,
    "sum": reductions.SUM,
    "sum_square": reductions.SUM_SQUARE,
    "mean_square": reductions.MEAN_SQUARE,
    "normed": reductions.NORMED,
    "read_state": reductions.READ_STATE,
    "outer": reductions.OUTER,
    "exp": activations.EXP,
    "sigmoid": activations.SIGMOID,
    "silu": activations.SILU,
    "softplus": activations.SOFTPLUS,
    "times_sigmoid": activations.TIMES_SIGMOID,
    "times_silu": activations.TIMES_SILU,
    "depthwise": convolutions.DEPTHWISE,
    "causal": convolutions.CAUSAL,
    "causal_or_by_hand": convolutions.CAUSAL_OR_BY_HAND,
    "window": convolutions.WINDOW,
    "taps": convolutions.TAPS,
    "attend": attention.ATTEND,
    "attend_or_by_hand": attention.ATTEND_OR_BY_HAND,
    "half_turn": attention.HALF_TURN,
    "rotate": attention.ROTATE,
    "write": writes.WRITE,
    "write_at": writes.WRITE_AT,
    "count_up": writes.COUNT_UP,
}
