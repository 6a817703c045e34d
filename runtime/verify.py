"""verify=True: the original graph runs once beside the compiled one, on the first real inputs.

Both draw random numbers from the same state. Inductor has a generator of its own, so that a graph with active
dropout counts as different there. A wrong layout or a lost write is found, not a rounding: for those there is
fxfuse.testing.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxfuse.errors import VerificationError
from fxfuse.runtime.report import GraphRecord, Report

log = logging.getLogger("fxfuse")

# Roundings that two orders of summation may differ by, in units of the dtype's own epsilon.
ROUNDINGS = 16.0


def relative_error(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference; 0.0 where equal, inf where they cannot be compared."""
    if candidate.shape != reference.shape or candidate.dtype != reference.dtype:
        return float("inf")
    if torch.equal(candidate, reference):
        return 0.0
    difference = (candidate.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)
    return float(difference.nan_to_num(float("inf")))


def _worst(candidate: Any, reference: Any) -> float:
    """The largest error over all tensors, in units of what their dtype may differ by."""
    leaves = tree_leaves(candidate), tree_leaves(reference)
    if len(leaves[0]) != len(leaves[1]):
        return float("inf")
    errors = [0.0]
    for ours, theirs in zip(*leaves, strict=True):
        if isinstance(theirs, torch.Tensor):
            floating = theirs.is_floating_point()
            allowed = ROUNDINGS * max(torch.finfo(theirs.dtype).eps, 1e-5) if floating else 1.0
            errors.append(
                relative_error(ours, theirs) / allowed if floating else 2.0 * (not torch.equal(ours, theirs))
            )
    return max(errors)


def verified(
    call: Callable[..., Any], original: Callable[..., Any], record: GraphRecord, strict: bool, report: Report
) -> Callable[..., Any]:
    """`call`, compared with `original` on its first arguments; where they differ the original steps in.

    Raises VerificationError in that case under strict.
    """
    verdict: bool | None = None

    def run(*args: Any) -> Any:
        nonlocal verdict
        if verdict is not None:
            return call(*args) if verdict else original(*args)
        ours = [
            a.clone() if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) else a for a in args
        ]
        devices = {a.device.index or 0 for a in args if isinstance(a, torch.Tensor) and a.is_cuda}
        with torch.random.fork_rng(sorted(devices)):
            expected = original(*args)
        got = call(*ours)  # draws the same random numbers, such as those of a dropout
        error = _worst((got, ours), (expected, list(args)))
        verdict = error <= 1.0
        if not verdict:
            text = (
                f"a compiled {record.phase} graph does not reproduce the original ({error:.1f} times the "
                "allowed difference): the original stays in its place"
            )
            report.note(text)
            if strict:
                raise VerificationError(text)
            log.warning("%s", text)
        return expected

    return run
