"""What a demonstration found, what must be equal in it, and the verdict, which admits a loss."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Demonstration", "Timing", "differing_tensors", "equal_prefix", "pays_after", "rms_error"]

EAGER, COMPILE, FXFUSE = "eager", "torch.compile", "fxfuse"


@dataclass
class Timing:
    """Times of one way to run the model: medians of steady calls, and what the first call took longer."""

    name: str
    seconds_per_token: float
    prompt_seconds: float
    compile_seconds: float
    pays_after_tokens: int | None = None


@dataclass
class Demonstration:
    """What one run found. `differences` is empty exactly when everything that must be equal is."""

    checkpoint: str
    model: str
    device: str
    prompt_tokens: int
    new_tokens: int
    equal_tokens: int = 0
    distinct_tokens: int = 0
    eager_error: float = math.nan
    fxfuse_error: float = math.nan
    error_limit: float = math.nan
    weights_changed: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    not_timed: dict[str, str] = field(default_factory=dict)
    load_before: float = 0.0
    report: Any = None

    @property
    def differences(self) -> list[str]:
        """Each thing that differs from what it must be, in words."""
        found = []
        if self.equal_tokens < self.new_tokens:
            found.append(f"fp32: {self.equal_tokens} of {self.new_tokens} tokens equal")
        if not self.fxfuse_error <= self.error_limit * self.eager_error:
            found.append(f"bf16: error above {self.error_limit} times eager's own")
        found += [f"{dtype}: the compiled callable never ran" for dtype, n in self.calls.items() if not n]
        if self.weights_changed:
            first = ", ".join(self.weights_changed[:3])
            found.append(f"{len(self.weights_changed)} tensors changed after deoptimize() ({first})")
        return found

    @property
    def speedup(self) -> tuple[float, str]:
        """fxfuse's speed per token over that of the fastest other way, and the name of that way."""
        others = [timing for name, timing in self.timings.items() if name != FXFUSE]
        best = min(others, key=lambda timing: timing.seconds_per_token)
        return best.seconds_per_token / self.timings[FXFUSE].seconds_per_token, best.name

    @property
    def verdict(self) -> str:
        """One line: what differs, or else whether it was faster, and than what."""
        if self.differences:
            return "DIFFERS: " + "; ".join(self.differences)
        ratio, other = self.speedup
        if ratio < 1:
            return f"EQUAL BUT SLOWER: {ratio:.2f} times the speed of {other}, so here fxfuse is a loss"
        return f"EQUAL AND FASTER: {ratio:.2f} times the speed of {other}, the fastest other way"

    def to_json(self) -> str:
        """Everything above as JSON, the report included."""
        data = asdict(replace(self, report=None)) | {"report": self.report.to_dict()}
        return json.dumps(data | {"differences": self.differences, "verdict": self.verdict}, indent=2)


def pays_after(compile_seconds: float, before: float, after: float) -> int | None:
    """Tokens after which compiling has paid for itself; 0 if it cost nothing, None if it never pays."""
    if compile_seconds <= 0:
        return 0
    return math.ceil(compile_seconds / (before - after)) if after < before else None


def rms_error(logits: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference."""
    return (logits.float() - reference.float()).square().mean().sqrt().item()


def equal_prefix(found: Tensor, expected: Tensor) -> int:
    """How many tokens [1, T] are equal before the first that is not."""
    return int((found == expected)[0].long().cumprod(0).sum())


def differing_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ in presence, dtype, shape or any bit."""
    return [
        name
        for name in {**expected, **found}
        if name not in found or name not in expected or not _same_bits(found[name], expected[name])
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Bytes, because NaN is not equal to itself and -0.0 is equal to 0.0.
    left, right = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b.to(a.device)))
    return torch.equal(left, right)
