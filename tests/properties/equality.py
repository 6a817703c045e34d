"""What a rewrite has to keep: values, shapes, dtypes and strides of outputs, and writes to inputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Of the largest magnitude, where a rewrite rounds otherwise: operators compute in fp32 inside.
TOLERANCE = 2e-5
# Under autocast: how much more of an error than the original's a rewrite may have, and what one rounding to
# bfloat16 adds at most to a result that happened to be exact.
SLACK = 1.5
ONE_ROUNDING = 2.0**-9


def difference(
    original: Callable[..., Any],
    rewritten: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    exact: bool,
    reference: Callable[..., Any] | None = None,
) -> str | None:
    """How the two differ on copies of the inputs, None where they agree.

    Where results are rounded on the way (autocast), `reference` computes them without: errors are compared.
    """
    theirs, ours = copy.deepcopy(list(inputs)), copy.deepcopy(list(inputs))
    with torch.no_grad():
        expected, got = original(*theirs), rewritten(*ours)
        unrounded = copy.deepcopy(list(inputs))
        truth = expected if reference is None else reference(*unrounded)
    truths = tree_leaves((truth, theirs if reference is None else unrounded))
    pairs = zip(tree_leaves((expected, theirs)), tree_leaves((got, ours)), truths, strict=True)
    for number, (e, g, t) in enumerate(pairs):
        why = _leaf(e, g, exact, None if reference is None else t)
        if why is not None:
            return f"output {number} (inputs follow the outputs): {why}"
    return None


def _strides(x: Tensor) -> list[int]:
    """Of the dimensions that have more than one element: nobody steps along the others."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


def _leaf(expected: Any, got: Any, exact: bool, truth: Any) -> str | None:
    if not isinstance(expected, Tensor):
        return None if expected == got else f"{got} instead of {expected}"
    for name in ("dtype", "shape"):
        a, b = getattr(expected, name), getattr(got, name)
        if a != b:
            return f"{name} {b} instead of {a}"
    if _strides(expected) != _strides(got):
        return f"strides {got.stride()} instead of {expected.stride()}"
    if exact and not torch.equal(expected.nan_to_num(7e7), got.nan_to_num(7e7)):
        return f"{int((expected != got).sum())} of {expected.numel()} elements differ"
    if not exact and expected.is_floating_point() and truth is not None:
        return _errors(expected, got, truth)
    if not exact and expected.is_floating_point():
        scale = expected.nan_to_num(0, 0, 0).abs().max() if expected.numel() else 1.0
        if not _close(expected, got, float(scale) * TOLERANCE):
            return f"largest difference {float((expected - got).abs().max()):.3g} at scale {float(scale):.3g}"
    return None


def _close(expected: Tensor, got: Tensor, atol: float) -> bool:
    """Within the tolerance; one element in fifty may be rounded to the dtype's neighbouring number."""
    off = ~torch.isclose(expected, got, rtol=0, atol=atol, equal_nan=True)
    if int(off.sum()) > max(1, expected.numel() // 50):
        return False
    return torch.allclose(expected, got, rtol=torch.finfo(expected.dtype).eps, atol=atol, equal_nan=True)


def _errors(expected: Tensor, got: Tensor, truth: Tensor) -> str | None:
    """Whether the rewritten graph is further from the truth than the original is, and one rounding."""
    if not torch.equal(expected.isfinite(), got.isfinite()):
        return "other elements are finite"
    there = expected.isfinite() & truth.isfinite()
    wide = truth.double()[there]
    own, ours = (_rms(x.double()[there] - wide) for x in (expected, got))
    if ours > SLACK * own + ONE_ROUNDING * _rms(wide):
        return f"RMS error {ours:.3g}, the original's is {own:.3g}, RMS {_rms(wide):.3g}"
    return None


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
