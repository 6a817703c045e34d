"""What a rewrite has to keep: values, shapes, dtypes and strides of outputs, and writes to inputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fxfuse.testing.oracles import widen, widened_arithmetic

# Of the largest magnitude, where a rewrite rounds otherwise: operators compute in fp32 inside. What differs
# by more is judged by what roundings do to the original.
TOLERANCE = 2e-5
# Of the largest magnitude: an original that is further off has lost the number, in an overflow say.
LOST = 0.05
# Runs of the original in which inputs and parameters are off in their last place.
DRAWS = 8
# How much more of an error than the original's a rewrite may have; and, under autocast, what one rounding to
# bfloat16 adds at most to a result that happened to be exact.
SLACK = 1.5
ONE_ROUNDING = 2.0**-9
ROUNDED = "largest difference"


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
    They are, too, where results differ by more than a tolerance: there the original runs in float64, and
    again on numbers off in their last place.
    """
    theirs, ours = copy.deepcopy(list(inputs)), copy.deepcopy(list(inputs))
    with torch.no_grad():
        expected, got = original(*theirs), rewritten(*ours)
        unrounded = copy.deepcopy(list(inputs))
        truth = expected if reference is None else reference(*unrounded)
    truths = tree_leaves((truth, theirs if reference is None else unrounded))
    pairs = zip(tree_leaves((expected, theirs)), tree_leaves((got, ours)), truths, strict=True)
    wide: list[list[Any]] = []
    for number, (e, g, t) in enumerate(pairs):
        why = _leaf(e, g, exact, None if reference is None else t)
        if why is not None and why.startswith(ROUNDED):
            wide = wide or [_in_float64(original, inputs, draw) for draw in range(1 + DRAWS)]
            truth, *moved = (run[number] for run in wide)
            further = _further(e, g, truth, moved)
            why = None if further is None else f"{why}: {further}"
        if why is not None:
            return f"output {number} (inputs follow the outputs): {why}"
    return None


def _in_float64(original: Callable[..., Any], inputs: Sequence[Tensor], draw: int) -> list[Any]:
    """Outputs of the original, and inputs as it leaves them, where nothing is rounded to less.

    In all draws but the first each number of inputs and parameters is off by up to a unit in its last place.
    """
    generator = torch.Generator().manual_seed(draw)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        off = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return x.double() * (1 + (off * torch.finfo(x.dtype).eps if draw else 0))

    given = tree_map_only(Tensor, moved, copy.deepcopy(list(inputs)))
    with torch.no_grad():
        module = widen(original, torch.float64)
        if isinstance(original, nn.Module) and isinstance(module, nn.Module):
            for own, theirs in zip(module.parameters(), original.parameters(), strict=True):
                own.copy_(moved(theirs))
        with widened_arithmetic(torch.float64):
            return tree_leaves((module(*given), given))


def _further(expected: Tensor, got: Tensor, truth: Tensor, moved: Sequence[Tensor]) -> str | None:
    """Whether the rewritten graph is further from what is true than roundings can bring it, in what words.

    That is what the original's own bring it, or those of inputs alone: the original may be exact by chance.
    """
    e, g, t = (x.double() for x in (expected, got, truth))
    own, ours, apart = _distance(e, t), _distance(g, t), _distance(e, g)
    scale = float(t.nan_to_num(0, 0, 0).abs().max())
    lost = own > LOST * scale
    if bool((torch.minimum(ours, apart)[lost] > TOLERANCE * scale).any()):
        return "numbers that the original loses are neither its own nor the true ones"
    by_roundings = (own, *(_distance(x.double(), t) for x in moved))
    allowed = max(_rms(each[~lost & each.isfinite()]) for each in by_roundings)
    if not _rms(ours[~lost]) <= SLACK * allowed:
        return f"RMS error {_rms(ours[~lost]):.3g} where roundings make {allowed:.3g}"
    return None


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """0 between equal infinities and between NaNs, infinite where one of two is not finite."""
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).abs().nan_to_num(torch.inf, torch.inf).masked_fill(same, 0.0)


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
            return f"{ROUNDED} {float((expected - got).abs().max()):.3g} at scale {float(scale):.3g}"
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
