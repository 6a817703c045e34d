"""The options of optimize() and of the backend, checked at one door."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from fxfuse.errors import OptionError
from fxfuse.passes import pipeline

Inner = Literal["inductor", "aot_eager", "eager"]
Target = Literal["auto", "cuda", "cpu"]
Weights = Literal["auto", "copy"]
Show = Literal["auto", "log", "off"]
Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


@dataclass(frozen=True)
class Options:
    """What to rewrite and how to run it; raises OptionError, with what is allowed, for anything else.

    Attributes:
        passes: "default", or names of passes (one may be "default") and passes of your own, which run last.
            `one_row_linears` and `expert_rows` rewrite what is faster so on this machine, and all when named.
        weights: "auto" lays parameters out in shared memory and never copies; "copy" also folds permutations
            of rows into a copy of the weight, which does not see writes that leave no trace on the parameter
            (`p.data.copy_()`, fused optimizers, numpy).
        inner: what compiles the rewritten graph.
        target: for which kind of device to lower; "auto" is the one that the inputs of the graph are on.
        mode: a mode of torch.compile, for the inner backend inductor. Those that record CUDA graphs record a
            decoded token whose sizes do not vary, as over a static cache; other graphs run by launches.
        strict: raise where the default leaves the original computation alone, unless it is faster so here.
        round_beta: round the rate of Gated DeltaNet, β = sigmoid(b), to the dtype of b, as transformers' code
            does; kernels otherwise keep it in float32, with which the state drifts less. For "cuda" only.
        verify: run the original graph once beside each compiled one and compare.
        report: what is said of each compiled graph: "auto" prints a table on a terminal and logs one line
            elsewhere, "log" logs one line, "off" nothing but warnings.
    """

    passes: str | tuple[str | pipeline.Pass, ...] = "default"
    weights: Weights = "auto"
    inner: Inner = "inductor"
    target: Target = "auto"
    mode: Mode | None = None
    round_beta: bool = False
    strict: bool = False
    verify: bool = False
    report: Show = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (("weights", Weights), ("inner", Inner), ("target", Target), ("report", Show)):
            _check_choice(name, getattr(self, name), get_args(allowed))
        _check_choice("mode", self.mode, (None, *get_args(Mode)))
        for name in ("round_beta", "strict", "verify"):
            _check_choice(name, getattr(self, name), (True, False))
        if not isinstance(self.passes, str):
            own = (str, pipeline.Pass)
            if not isinstance(self.passes, Sequence) or not all(isinstance(p, own) for p in self.passes):
                raise OptionError(
                    f"passes={self.passes!r}: give 'default', or a sequence of names and of "
                    "fxfuse.passes.pipeline.Pass"
                )
            chosen = tuple(self.passes)
            object.__setattr__(self, "passes", "default" if chosen == ("default",) else chosen)
        if self.mode not in (None, "default") and self.inner != "inductor":
            raise OptionError(f"mode={self.mode!r} is for inner='inductor', not inner={self.inner!r}")
        pipeline.selected(self.passes, self.inner, self.target)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None) -> "Options":
        """Options from a mapping; an unknown name is an OptionError that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given or {} if name not in known]
        if unknown:
            raise OptionError(f"unknown option {unknown[0]!r}: known are {', '.join(known)}")
        return cls(**(given or {}))

    def target_for(self, inputs: Iterable[Any]) -> str:
        """The target of a graph with these inputs."""
        if self.target != "auto":
            return self.target
        return "cuda" if any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs) else "cpu"

    def given(self) -> dict[str, Any]:
        """The options that differ from the defaults."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


def _check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name}={value!r}: allowed are {', '.join(map(repr, allowed))}")
