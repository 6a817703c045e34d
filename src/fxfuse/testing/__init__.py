"""Equivalence testing for graph rewrites: two oracles, one report.

    from fxfuse.testing import assert_equivalent

    original = copy.deepcopy(model)
    report = assert_equivalent(original, model.optimize(), {"input_ids": ids})

Everything is loaded when first used; importing this package imports neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxfuse.testing.equivalence import assert_equivalent
    from fxfuse.testing.report import EquivalenceReport, TensorComparison
    from fxfuse.testing.tensors import integer_like_, integer_tensor, poison
    from fxfuse.testing.trees import cache_tensors, flatten

__all__ = [
    "EquivalenceReport",
    "TensorComparison",
    "assert_equivalent",
    "cache_tensors",
    "flatten",
    "integer_like_",
    "integer_tensor",
    "poison",
]

_HOME = {
    "EquivalenceReport": "report",
    "TensorComparison": "report",
    "assert_equivalent": "equivalence",
    "cache_tensors": "trees",
    "flatten": "trees",
    "integer_like_": "tensors",
    "integer_tensor": "tensors",
    "poison": "tensors",
}


def __getattr__(name: str) -> object:
    if name == "strategies":
        return importlib.import_module(f"{__name__}.strategies")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
