"""What optimize() gained, measured on demand: the model's own forward and the optimised call in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxfuse.errors import OptionError, UnsupportedModelError


@dataclass(frozen=True)
class Measurement:
    """Medians in milliseconds a call, of rounds in which both took turns."""

    before_ms: float
    after_ms: float
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times as fast the optimised call is."""
        return self.before_ms / self.after_ms

    def __str__(self) -> str:
        verdict = "slower" if self.ratio < 1 else f"{self.ratio:.2f} times as fast"
        rounds = "one round" if self.rounds == 1 else f"median of {self.rounds} rounds in turns"
        times = f"as it was {self.before_ms:.2f} ms, optimised {self.after_ms:.2f} ms a call"
        return f"{times}: {verdict} ({rounds})"


def measure(
    model: nn.Module, inputs: Mapping[str, Any], calls: Callable[[], int], rounds: int = 7
) -> Measurement:
    """Time `model(**inputs)` as it was and optimised, without gradients; the first call of each is not timed.

    Args:
        model: an optimised model.
        inputs: keyword arguments of one call, copied before each: a cache does not grow from call to call.
        calls: how often a compiled graph has run so far.
        rounds: how many times each is timed.

    Raises OptionError for less than one round and for inputs without names, UnsupportedModelError where no
    compiled graph ran.
    """
    check_named(inputs)
    if rounds < 1:
        raise OptionError(f"rounds={rounds}: at least 1 is needed")
    ran = calls()
    with torch.no_grad():
        _timed(nn.Module._call_impl, model, inputs)
        _timed(nn.Module.__call__, model, inputs)
        if calls() == ran:
            raise UnsupportedModelError(
                f"no compiled graph of {type(model).__name__} ran for these inputs, so there is nothing to "
                "measure: print(model.optimization_report) has the reason"
            )
        pairs = [
            (_timed(nn.Module._call_impl, model, inputs), _timed(nn.Module.__call__, model, inputs))
            for _ in range(rounds)
        ]
    before, after = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    return Measurement(before, after, rounds)


def check_named(inputs: Any) -> None:
    """Raise OptionError for what are no keyword arguments."""
    if not isinstance(inputs, Mapping):
        raise OptionError(
            f"inputs is a {type(inputs).__name__}: give keyword arguments of the call by name, such as "
            '{"input_ids": ids}'
        )


def _timed(call: Callable[..., Any], model: nn.Module, inputs: Mapping[str, Any]) -> float:
    own = copy.deepcopy(dict(inputs))
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    for device in devices:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call(model, **own)
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
