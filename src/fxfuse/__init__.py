"""Graph rewrite passes and matching weight transforms for Hugging Face Qwen3.5-family models.

Importing it adds `optimize`, `deoptimize` and `optimization_report` to transformers' PreTrainedModel and does
nothing else; what needs torch is loaded at first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fxfuse._attach import attach
from fxfuse.errors import (
    CheckpointError,
    FxfuseError,
    OptionError,
    PlanError,
    ShapeError,
    UnsupportedModelError,
    VerificationError,
)

if TYPE_CHECKING:
    from fxfuse.passes.weights import WeightPlan
    from fxfuse.runtime.convert import convert
    from fxfuse.runtime.explain import explain
    from fxfuse.runtime.load import load_state_dict
    from fxfuse.runtime.optimize import deoptimize, optimize, optimized
    from fxfuse.runtime.plan import plan
    from fxfuse.runtime.report import Report
    from fxfuse.runtime.rewrite import Rewritten, rewrite

try:
    __version__ = version("fxfuse")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0.0.0"

_HOMES = {
    "Report": "fxfuse.runtime.report",
    "Rewritten": "fxfuse.runtime.rewrite",
    "WeightPlan": "fxfuse.passes.weights",
    "convert": "fxfuse.runtime.convert",
    "deoptimize": "fxfuse.runtime.optimize",
    "explain": "fxfuse.runtime.explain",
    "load_state_dict": "fxfuse.runtime.load",
    "optimize": "fxfuse.runtime.optimize",
    "optimized": "fxfuse.runtime.optimize",
    "plan": "fxfuse.runtime.plan",
    "rewrite": "fxfuse.runtime.rewrite",
}

__all__ = [
    "CheckpointError",
    "FxfuseError",
    "OptionError",
    "PlanError",
    "Report",
    "Rewritten",
    "ShapeError",
    "UnsupportedModelError",
    "VerificationError",
    "WeightPlan",
    "convert",
    "deoptimize",
    "explain",
    "load_state_dict",
    "optimize",
    "optimized",
    "plan",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fxfuse' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


attach()
