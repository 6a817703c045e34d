"""`assert_equivalent`: does a rewritten computation give what the original gives?"""

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import OptionError, VerificationError
from fxfuse.testing.oracles import (
    compare_exactly,
    compare_to_oracle,
    default_slack,
    oracle_dtype,
    widen,
    widened_arithmetic,
)
from fxfuse.testing.report import EquivalenceReport, TensorComparison
from fxfuse.testing.trees import Opaque, cast_floating, flatten

__all__ = ["assert_equivalent"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class _Run:
    """Leaves of the output, and of the inputs as the run left them, by path."""

    outputs: dict[str, Any]
    inputs: dict[str, Any]


def assert_equivalent(
    reference: Function,
    candidate: Function,
    inputs: Any,
    *,
    exact: bool = False,
    slack: float | None = None,
    floor: float | None = None,
    dtype: torch.dtype | None = None,
    high_precision: Function | None = None,
    check_mutation: bool = True,
    logits: Collection[str] = ("logits",),
    must_run: Callable[[], int] | None = None,
    grad: bool = False,
    seed: int = 0,
) -> EquivalenceReport:
    """Run `reference` and `candidate` on the same inputs and require equivalent outputs.

    Two oracles. *Exact* (`exact=True`): every output tensor is `torch.equal` to the reference's, for
    rewrites that only move data or merge matrix products, on small integers (`integer_like_`,
    `integer_tensor`). *Reference* (the default): the reference also runs in a wider dtype, and the
    candidate's RMS error against that run may not exceed `slack` times the reference's own RMS error in the
    working dtype. Integer and boolean tensors and plain values are compared exactly with the reference's
    own under both oracles.

    Outputs may be nested: tuples, dicts, ModelOutput, dataclasses, caches (each layer's tensors and
    counters). Kind, shape, dtype, device and the places of NaN and infinities have to agree. Every run gets
    a copy of the inputs of its own and the same random seed; inputs that the reference leaves alone must
    come out of the candidate bit for bit.

    Args:
        reference: a module or callable. For the wide run a module, or the module of a bound method, is
            deep-copied and cast; for another callable only the inputs are cast.
        candidate: a module or callable, not the same object as `reference`.
        inputs: a tuple of positional arguments, a dict of keyword arguments or a single tensor; or a list
            of those, each of which is a run of its own.
        slack: allowed ratio of RMS errors. None: 1.10, or 1.50 for toy widths. The width is
            `config.hidden_size` (of the text part) if the reference has a config, otherwise the largest
            last dimension among its floating matrices and the floating inputs; it is a toy below 512.
        floor: RMS error that always passes. None: a quarter of the dtype's epsilon times the RMS of the
            wide result, which is the error of a result computed exactly and rounded once.
        dtype: dtype of the wide run. None: float64, or float32 for 16-bit models of over 250 M parameters.
        high_precision: what to run as the oracle, for references that cannot be cast (closures, quantised
            modules). It gets the inputs cast to `dtype`.
        check_mutation: compare the inputs as the two runs left them.
        logits: last components of the paths for which top-1 agreement and KL divergence are reported.
        must_run: returns a count that has to increase in each of the candidate's runs, such as
            `lambda: model.optimization_report.calls`; catches a candidate that silently ran the original.
        grad: run with gradients enabled instead of under `torch.no_grad`.

    Returns:
        The report, which is `ok`.

    Raises:
        VerificationError: the two differ, nothing comparable came out, `must_run` did not increase, or the
            reference could not be run in the wide dtype. Its text is the report's table.
        OptionError: `reference` and `candidate` are one object, or there are no inputs.
    """
    if reference is candidate:
        raise OptionError(
            "reference and candidate are the same object, as model and model.optimize() are: "
            "compare with copy.deepcopy(model) taken before"
        )
    cases = inputs if isinstance(inputs, list) else [inputs]
    if not cases:
        raise OptionError(
            "no inputs to run on: pass a tuple, a dict or a tensor, or a non-empty list of those"
        )
    wide = None if exact else _wide_function(reference, high_precision, cases, dtype)
    if slack is None:
        slack = default_slack(_width(reference, cases))
    rows: list[TensorComparison] = []
    problems: list[str] = []
    compared = False
    for index, case in enumerate(cases):
        place = f"inputs[{index}]: " if isinstance(inputs, list) else ""
        own = _run(reference, copy.deepcopy(case), grad, seed)
        oracle = None if wide is None else _run_wide(*wide, copy.deepcopy(case), grad, seed)
        before = must_run() if must_run else 0
        result = _run(candidate, copy.deepcopy(case), grad, seed)
        if must_run and must_run() <= before:
            problems.append(f"{place}the compiled callable did not run")
        compared |= any(_has_finite(leaf) for leaf in own.outputs.values())
        for path, values in _aligned(own.outputs, oracle.outputs if oracle else None, result.outputs):
            row = _compare(place + path, *values, slack, floor, _last(path) in logits)
            if isinstance(values[0], Tensor) or not row.ok:  # flags and counters only where they differ
                rows.append(row)
        if check_mutation:
            untouched = flatten(case, "input")
            for path, values in _aligned(own.inputs, oracle.inputs if oracle else None, result.inputs):
                changed = _compare_input(place + path, untouched.get(path), *values, slack, floor)
                if changed is not None:
                    rows.append(changed)
    if not compared:
        problems.append("the reference gave no finite number to compare")
    report = EquivalenceReport(
        oracle="exact" if wide is None else str(wide[1]).removeprefix("torch."),
        comparisons=tuple(rows),
        problems=tuple(problems),
        slack=None if exact else slack,
    )
    if not report.ok:
        raise VerificationError(str(report))
    return report


def _arguments(case: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(case, tuple):
        return case, {}
    if isinstance(case, dict):
        return (), case
    if isinstance(case, Tensor):
        return (case,), {}
    raise OptionError(
        f"inputs of type {type(case).__name__}: pass a tuple, a dict, a tensor, or a list of those"
    )


def _run(function: Function, case: Any, grad: bool, seed: int) -> _Run:
    args, kwargs = _arguments(case)
    with torch.random.fork_rng(), torch.set_grad_enabled(grad):
        torch.manual_seed(seed)
        outputs = function(*args, **kwargs)
    return _Run(flatten(outputs), flatten(case, "input"))


def _run_wide(function: Function, dtype: torch.dtype, case: Any, grad: bool, seed: int) -> _Run:
    advice = "pass high_precision=, a callable that computes the reference in a wider dtype"
    with widened_arithmetic(dtype):
        try:
            run = _run(function, cast_floating(case, dtype), grad, seed)
        except Exception as error:
            raise VerificationError(f"the reference does not run in {dtype} ({error}): {advice}") from error
    floating = [
        leaf for leaf in run.outputs.values() if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if floating and all(leaf.dtype.itemsize < dtype.itemsize for leaf in floating):
        raise VerificationError(f"the reference gives {floating[0].dtype} when asked for {dtype}: {advice}")
    return run


def _parameters(function: Function) -> list[Tensor]:
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return list(owner.parameters()) if isinstance(owner, nn.Module) else []


def _floating(tensors: Collection[Any]) -> list[Tensor]:
    return [leaf for leaf in tensors if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _wide_function(
    reference: Function, high_precision: Function | None, cases: list[Any], dtype: torch.dtype | None
) -> tuple[Function, torch.dtype]:
    """What to run as the oracle, and in which dtype."""
    parameters = _floating(_parameters(reference))
    if dtype is None:
        tensors = parameters or _floating([leaf for case in cases for leaf in flatten(case).values()])
        # A model that keeps a few parameters in fp32 works in the dtype of the most.
        sizes: dict[torch.dtype, int] = {}
        for tensor in tensors:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
        working = max(sizes, key=lambda key: sizes[key], default=torch.float32)
        dtype = oracle_dtype(sum(tensor.numel() for tensor in parameters), working)
    return high_precision or widen(reference, dtype), dtype


def _width(reference: Function, cases: list[Any]) -> int:
    owner = reference if isinstance(reference, nn.Module) else getattr(reference, "__self__", None)
    config = getattr(owner, "config", None)
    hidden = getattr(getattr(config, "text_config", config), "hidden_size", None)
    if isinstance(hidden, int):
        return hidden
    matrices = [tensor for tensor in _parameters(reference) if tensor.ndim > 1]
    matrices += _floating([leaf for case in cases for leaf in flatten(case).values()])
    return max((tensor.shape[-1] for tensor in matrices if tensor.ndim), default=0)


def _has_finite(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.numel() > 0 and bool(leaf.isfinite().any())


def _last(path: str) -> str:
    return path.rpartition(".")[2]


class _Missing:
    def __repr__(self) -> str:
        return "missing"


_MISSING = _Missing()


def _aligned(
    own: dict[str, Any], oracle: dict[str, Any] | None, candidate: dict[str, Any]
) -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    """Leaves of the runs by path; without an oracle run, its leaf is `_MISSING`."""
    for path in {**own, **candidate}:
        yield (
            path,
            (own.get(path, _MISSING), (oracle or {}).get(path, _MISSING), candidate.get(path, _MISSING)),
        )


def _compare(
    path: str, own: Any, oracle: Any, candidate: Any, slack: float, floor: float | None, logits: bool
) -> TensorComparison:
    if own is _MISSING or candidate is _MISSING:
        missing, present = ("reference", candidate) if own is _MISSING else ("candidate", own)
        what = f"{present.dtype} {list(present.shape)}" if isinstance(present, Tensor) else repr(present)
        return TensorComparison(path, f"missing from the {missing}: {what}")
    if isinstance(own, Opaque):
        return TensorComparison(path, f"output of type {own.type_name}: return the tensors inside it instead")
    if oracle is _MISSING:
        return compare_exactly(path, own, candidate)
    return compare_to_oracle(path, own, oracle, candidate, slack, floor, logits)


def _compare_input(
    path: str, before: Any, own: Any, oracle: Any, candidate: Any, slack: float, floor: float | None
) -> TensorComparison | None:
    """A row for an input after the runs; None for what neither run touched."""
    if not isinstance(own, Tensor) and not isinstance(candidate, Tensor) and own == candidate:
        return None
    if isinstance(before, Tensor) and isinstance(own, Tensor) and compare_exactly(path, before, own).ok:
        row = compare_exactly(path, before, candidate)
        if row.ok:
            return None
        return TensorComparison(
            path, f"changed by the candidate only: {row.reason}", max_abs_error=row.max_abs_error
        )
    return _compare(path, own, oracle, candidate, slack, floor, logits=False)
