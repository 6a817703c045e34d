"""What a rewrite has to keep: values, shapes, dtypes and strides of outputs, and writes to inputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Of the largest magnitude, where a rewrite rounds otherwise: operators compute in fp32 inside.
TOLERANCE = 2e-5


def difference(
    original: Callable[..., Any],
    rewritten: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    exact: bool,
    tolerance: float = TOLERANCE,
) -> str | None:
    """How the two differ on copies of the inputs, None where they agree."""
    theirs, ours = copy.deepcopy(list(inputs)), copy.deepcopy(list(inputs))
    with torch.no_grad():
        expected, got = original(*theirs), rewritten(*ours)
    leaves = list(zip(tree_leaves((expected, theirs)), tree_leaves((got, ours)), strict=True))
    for number, (e, g) in enumerate(leaves):
        why = _leaf(e, g, exact, tolerance)
        if why is not None:
            return f"output {number} (inputs follow the outputs): {why}"
    return None


def _strides(x: Tensor) -> list[int]:
    """Of the dimensions that have more than one element: nobody steps along the others."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


def _leaf(expected: Any, got: Any, exact: bool, tolerance: float) -> str | None:
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
    if not exact and expected.is_floating_point():
        scale = expected.nan_to_num(0, 0, 0).abs().max() if expected.numel() else 1.0
        if not torch.allclose(expected, got, rtol=0, atol=float(scale) * tolerance, equal_nan=True):
            return f"largest difference {float((expected - got).abs().max()):.3g} at scale {float(scale):.3g}"
    return None
