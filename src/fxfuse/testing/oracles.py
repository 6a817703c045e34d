"""The two oracles: equality on small integers, and the reference's own error against a wider run."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxfuse.errors import VerificationError
from fxfuse.testing.report import TensorComparison

__all__ = [
    "compare_exactly",
    "compare_to_oracle",
    "default_slack",
    "oracle_dtype",
    "widen",
    "widened_arithmetic",
]

# Above this many parameters a float64 copy (8 bytes each) no longer fits beside the model everywhere.
_LARGE = 250_000_000
# From this hidden width on, errors average over enough terms for a tenth to be a tight bound; below, single
# roundings show, and two correct computations differ by more.
_REAL_WIDTH = 512

_NARROWING = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


def oracle_dtype(parameters: int, working: torch.dtype) -> torch.dtype:
    """The dtype for the reference oracle: float64, or fp32 for 16-bit models of over 250 M parameters.

    A large fp32 model still gets float64: an oracle in the working dtype would have no error to compare with.
    """
    return torch.float32 if parameters > _LARGE and working.itemsize < 4 else torch.float64


def default_slack(width: int) -> float:
    """The allowed ratio of RMS errors for a hidden width: 1.10 from 512 on, 1.50 for toy widths below."""
    return 1.10 if width >= _REAL_WIDTH else 1.50


class _Widened(TorchFunctionMode):
    """Turns every request for a narrower floating dtype into one for `dtype`.

    Models cast to fp32 by name (norms, softmax, rotary embeddings, the delta rule): without this a float64
    run would be rounded to fp32 in the middle, and could not judge an fp32 candidate.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _wide(self, value: Any) -> Any:
        if (
            isinstance(value, torch.dtype)
            and value.is_floating_point
            and value.itemsize < self.dtype.itemsize
        ):
            return self.dtype
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: self._wide(value) for key, value in (kwargs or {}).items()}
        if func in _NARROWING:
            return args[0].to(self.dtype, **kwargs)
        result = func(*(self._wide(arg) for arg in args), **kwargs)
        # A constant made from nothing has the default dtype, and would not multiply with a wide matrix.
        if type(result) is Tensor and self._wide(result.dtype) != result.dtype and not _has_tensor(args):
            return result.to(self.dtype)
        return result


def _has_tensor(values: Any) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and _has_tensor(value))
        for value in values
    )


@contextlib.contextmanager
def widened_arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Within this, casts and constants that ask for a dtype narrower than `dtype` get `dtype`."""
    with _Widened(dtype):
        yield


def widen(reference: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """A copy of a module (or of a module's bound method) in `dtype`; another callable as it is."""
    if isinstance(reference, nn.Module):
        return copy.deepcopy(getattr(reference, "_orig_mod", reference)).to(dtype)
    owner = getattr(reference, "__self__", None)
    if isinstance(owner, nn.Module):
        return getattr(widen(owner, dtype), reference.__name__)
    return reference


def _mismatch(path: str, own: Any, candidate: Any) -> TensorComparison | None:
    """A row for what can be said without looking at values: kind, shape, dtype; None if all agree."""
    reason = None
    if isinstance(own, Tensor) != isinstance(candidate, Tensor):
        reason = f"{_kind(candidate)}, expected {_kind(own)}"
    elif isinstance(own, Tensor):
        if own.shape != candidate.shape:
            reason = f"shape {list(candidate.shape)}, expected {list(own.shape)}"
        elif own.dtype != candidate.dtype:
            reason = f"{candidate.dtype}, expected {own.dtype}"
        elif own.device != candidate.device:
            reason = f"on {candidate.device}, expected {own.device}"
    return None if reason is None else TensorComparison(path, reason)


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _numbers(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).to(torch.float64)


def _not_finite(own: Tensor, candidate: Tensor) -> str | None:
    """Why NaN and infinities of two float64 tensors do not agree, or None."""
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(own) != test(candidate)
        if differs.any():
            index = tuple(differs.nonzero()[0].tolist())
            side = "candidate" if test(candidate)[index] else "reference"
            return f"{name} only in the {side} at {list(index)}, {int(differs.sum())} such places"
    return None


def _largest(error: Tensor) -> tuple[float, tuple[int, ...]]:
    position = int(error.argmax())
    index = torch.unravel_index(torch.tensor(position), error.shape)
    return float(error.flatten()[position]), tuple(int(part) for part in index)


def compare_exactly(path: str, own: Any, candidate: Any) -> TensorComparison:
    """One row under the exact oracle: `torch.equal`, with NaN equal to NaN.

    Plain values are compared with `==`.
    """
    row = _mismatch(path, own, candidate)
    if row is not None:
        return row
    if not isinstance(own, Tensor):
        # True == 1 in Python, and a flag that became a count is a different output.
        same = type(own) is type(candidate) and own == candidate
        return TensorComparison(path, None if same else f"{candidate!r}, expected {own!r}")
    if torch.equal(own, candidate):
        return TensorComparison(path, max_abs_error=0.0)
    a, b = _numbers(own), _numbers(candidate)
    reason = _not_finite(a, b)
    error = (a - b).abs().nan_to_num(0.0, 0.0, 0.0)
    # Integers beyond 2**53 may differ where their float64 images do not: `own != candidate` decides.
    differing = int(((own != candidate) & ~(own.isnan() & candidate.isnan())).sum())
    if reason is None and differing:
        reason = f"{differing} of {own.numel()} elements differ"
    largest, index = _largest(error)
    return TensorComparison(path, reason, max_abs_error=largest, worst_index=index if reason else None)


def compare_to_oracle(
    path: str, own: Any, oracle: Any, candidate: Any, slack: float, floor: float | None, logits: bool
) -> TensorComparison:
    """One row under the reference oracle.

    The candidate's RMS error against `oracle` may be `slack` times that of `own`, or `floor` where that is
    larger. The default floor is a quarter of the dtype's epsilon times the oracle's RMS: the error of a
    result that was computed exactly and rounded once. Tensors that are not floating are compared exactly
    with `own`.
    """
    if not (isinstance(own, Tensor) and (own.is_floating_point() or own.is_complex())):
        return compare_exactly(path, own, candidate)
    row = _mismatch(path, own, candidate)
    if row is not None:
        return row
    if not isinstance(oracle, Tensor) or oracle.shape != own.shape:
        raise VerificationError(
            f"{path}: the wide run of the reference gave {_kind(oracle)} for {_kind(own)}"
        )
    truth, a, b = _numbers(oracle), _numbers(own), _numbers(candidate)
    reason = _not_finite(a, b)
    finite = truth.isfinite() & a.isfinite() & b.isfinite()
    if not finite.any():
        return TensorComparison(path, reason)
    masked = [tensor.masked_fill(~finite, -1e9) for tensor in (truth, a, b)]  # as softmax sees a masked entry
    truth, a, b = (tensor.masked_fill(~finite, 0.0) for tensor in (truth, a, b))
    count = int(finite.sum())
    error = _rms(b - truth, count)
    own_error = _rms(a - truth, count)
    if floor is None:
        floor = torch.finfo(own.dtype).eps / 4 * _rms(truth, count)
    if reason is None and not error <= max(slack * own_error, floor):
        reason = f"RMS error {error:.2e} exceeds {max(slack * own_error, floor):.2e}"
    largest, index = _largest((b - truth).abs())
    norms = float(b.norm() * truth.norm())
    judged = logits and own.ndim > 0 and own.shape[-1] > 1
    return TensorComparison(
        path,
        reason,
        rms_error=error,
        reference_rms_error=own_error,
        ratio=error / own_error if own_error else None,
        cosine=float((b * truth).sum()) / norms if norms else None,
        max_abs_error=largest,
        worst_index=index,
        top1_agreement=_top1(masked[0], masked[2]) if judged else None,
        reference_top1_agreement=_top1(masked[0], masked[1]) if judged else None,
        kl=_kl(masked[0], masked[2]) if judged else None,
        reference_kl=_kl(masked[0], masked[1]) if judged else None,
    )


def _rms(error: Tensor, count: int) -> float:
    return math.sqrt(float(error.square().sum()) / count)


def _top1(truth: Tensor, logits: Tensor) -> float:
    return float((truth.argmax(-1) == logits.argmax(-1)).double().mean())


def _kl(truth: Tensor, logits: Tensor) -> float:
    expected = truth.log_softmax(-1)
    return float((expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean())
