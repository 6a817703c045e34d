"""What an equivalence check found: one row for each tensor compared, and one table for people."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["EquivalenceReport", "TensorComparison"]

# A cache of a deep model has hundreds of tensors: the table shows what failed, then the worst of what passed.
_ROWS_SHOWN = 40


@dataclass(frozen=True)
class TensorComparison:
    """One tensor (or plain value) of the output, or of the inputs after the run.

    Attributes:
        path: where it is, as `logits`, `past_key_values.layers[0].keys` or `input.hidden_states`.
        reason: why it does not agree, in words; None when it does.
        rms_error: root mean square of candidate - oracle.
        reference_rms_error: the same for the reference itself, run in the working dtype.
        ratio: rms_error / reference_rms_error; None where the reference's own error is 0.
        cosine: cosine between candidate and oracle; None where one of them is all zero.
        max_abs_error: largest absolute difference.
        worst_index: where that is, as an index into the tensor.
        top1_agreement: share of rows whose arg max is the oracle's (logits only).
        reference_top1_agreement: the same for the reference itself.
        kl: mean divergence of the candidate's softmax from the oracle's, in nats (logits only).
        reference_kl: the same for the reference itself.
    """

    path: str
    reason: str | None = None
    rms_error: float | None = None
    reference_rms_error: float | None = None
    ratio: float | None = None
    cosine: float | None = None
    max_abs_error: float | None = None
    worst_index: tuple[int, ...] | None = None
    top1_agreement: float | None = None
    reference_top1_agreement: float | None = None
    kl: float | None = None
    reference_kl: float | None = None

    @property
    def ok(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class EquivalenceReport:
    """The result of `assert_equivalent`.

    Attributes:
        oracle: `exact`, or the dtype the reference was run in for comparison (`float64`, `float32`).
        comparisons: one per tensor, in the order of the output.
        problems: what is wrong with the run as a whole, such as a compiled callable that did not run.
        slack: the allowed ratio of RMS errors; None under the exact oracle.
    """

    oracle: str
    comparisons: tuple[TensorComparison, ...]
    problems: tuple[str, ...] = ()
    slack: float | None = None

    @property
    def ok(self) -> bool:
        return not self.problems and all(row.ok for row in self.comparisons)

    @property
    def failures(self) -> tuple[TensorComparison, ...]:
        return tuple(row for row in self.comparisons if not row.ok)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        rows = self.comparisons
        hidden = ""
        if len(rows) > _ROWS_SHOWN:
            rows = tuple(sorted(rows, key=lambda row: (row.ok, -(row.ratio or 0.0))))[:_ROWS_SHOWN]
            left = self.comparisons
            failed = len(self.failures) - sum(not row.ok for row in rows)
            hidden = f"... {len(left) - len(rows)} more tensors, {failed} of them failed"
        verdict = "equivalent" if self.ok else "NOT equivalent"
        allowed = "" if self.slack is None else f", RMS error ratio allowed {self.slack:.2f}"
        head = f"{verdict}: oracle {self.oracle}{allowed}, {len(self.comparisons)} tensors compared"
        lines = [head, *(f"problem: {problem}" for problem in self.problems), *_table(rows), hidden]
        return "\n".join(line for line in lines if line)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(rows: Sequence[TensorComparison]) -> list[str]:
    """Rows as aligned plain text; a column that would be empty is left out."""
    cells: dict[str, list[str]] = {
        "tensor": [row.path for row in rows],
        "rms error": [_number(row.rms_error, ".2e") for row in rows],
        "reference's": [_number(row.reference_rms_error, ".2e") for row in rows],
        "ratio": [_number(row.ratio, ".3f") for row in rows],
        "cosine": [_number(row.cosine, ".6f") for row in rows],
        "max error": [_number(row.max_abs_error, ".2e") for row in rows],
        "at": ["" if row.worst_index is None else str(list(row.worst_index)) for row in rows],
        "top-1": [_number(row.top1_agreement, ".4f") for row in rows],
        "ref top-1": [_number(row.reference_top1_agreement, ".4f") for row in rows],
        "KL": [_number(row.kl, ".2e") for row in rows],
        "ref KL": [_number(row.reference_kl, ".2e") for row in rows],
        "verdict": [row.reason or "ok" for row in rows],
    }
    columns = [(name, column) for name, column in cells.items() if any(column)]
    widths = [max(len(name), *map(len, column)) for name, column in columns]
    lines = [[name for name, _ in columns], *zip(*(column for _, column in columns), strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
