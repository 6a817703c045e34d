"""Adds optimize, deoptimize and optimization_report to PreTrainedModel, once transformers is there."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODELING = "transformers.modeling_utils"


def attach() -> None:
    """Add the methods now if transformers' models are loaded, else when they are."""
    if MODELING in sys.modules:
        _add_methods(sys.modules[MODELING])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Lets one module load as always, then adds the methods and steps aside."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _add_methods(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _add_methods(modeling: Any) -> None:
    def optimize(self, **options):  # type: ignore[no-untyped-def]
        from fxfuse.runtime.optimize import optimize

        return optimize(self, **options)

    def deoptimize(self):  # type: ignore[no-untyped-def]
        from fxfuse.runtime.optimize import deoptimize

        return deoptimize(self)

    def report(self):  # type: ignore[no-untyped-def]
        from fxfuse.runtime.optimize import optimization_report

        return optimization_report(self)

    optimize.__doc__ = "Rewrite this model's computation in place and return it; see fxfuse.optimize."
    deoptimize.__doc__ = "Undo optimize() and return the model; see fxfuse.deoptimize."
    modeling.PreTrainedModel.optimize = optimize
    modeling.PreTrainedModel.deoptimize = deoptimize
    modeling.PreTrainedModel.optimization_report = property(
        report, doc="What optimize() rewrote, what it left alone and why: a Report, None for a plain model."
    )
