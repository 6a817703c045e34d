"""The inverse of a plan's transforms, by turning each block around."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fxfuse.errors import PlanError
from fxfuse.passes.weights.row_map import RowMap, Rows
from fxfuse.passes.weights.tensor_spec import TensorSpec
from fxfuse.passes.weights.transform import Transform
from fxfuse.passes.weights.usage import Usage


class _Piece(NamedTuple):
    """The rows `start` to `stop` of one source's column window, and where a target has them."""

    start: int
    stop: int
    block: Rows


def invert(
    sources: Sequence[TensorSpec], transforms: Iterable[Transform], usages: Iterable[Usage]
) -> tuple[tuple[Transform, ...], tuple[Usage, ...]]:
    """Transforms that fill `sources` from the targets, and the copies that they leave out.

    Raises PlanError for a source of which rows are missing, or that is cut into no grid of columns and rows.
    """
    partial = {usage.source: usage.role for usage in usages if usage.how == "partial"}
    if partial:
        name, role = next(iter(partial.items()))
        raise PlanError(
            f"{name}: only a part of it is here ({role}), so nothing gives the whole back; "
            "join the parts of all ranks, or start from the original"
        )
    widths = {source.name: source.width for source in sources}
    windows: dict[str, dict[tuple[int, int], list[_Piece]]] = {source.name: {} for source in sources}
    for transform in transforms:
        width = transform.target.width
        for at, left, rows in transform.blocks(widths):
            right = left + rows.width(widths[rows.source])
            whole = (left, right) == (0, width) and not rows.transposed
            block = Rows(
                transform.target.name,
                at,
                at + len(rows),
                None if whole else (left, right),
                rows.transposed,
            )
            window = rows.columns or (0, widths[rows.source])
            windows[rows.source].setdefault(window, []).append(_Piece(rows.start, rows.stop, block))
    inverted, copied = [], set()
    for source in sources:
        panels = []
        across = 0
        for window, pieces in sorted(windows[source.name].items(), key=_by_window):
            kept, left_out = _each_row_once(pieces)
            copied |= left_out
            covered = sum(piece.stop - piece.start for piece in kept)
            if window[0] != across or covered != source.rows:
                raise PlanError(
                    f"{source.name}: its blocks are no grid of columns and rows; invert each step by itself"
                )
            across = window[1]
            panels.append(RowMap(tuple(piece.block for piece in kept)))
        inverted.append(Transform(source, panels[0], tuple(panels[1:])))
    return tuple(inverted), tuple(Usage(name, "partial", "copies") for name in sorted(copied))


def _each_row_once(pieces: list[_Piece]) -> tuple[list[_Piece], set[str]]:
    """The pieces in order, every row by the first that has it, and the names of those that are left out."""
    kept: list[_Piece] = []
    left_out = set()
    reached = 0
    for piece in sorted(pieces, key=_by_rows):
        if piece.start < reached:
            left_out.add(piece.block.source)
        if piece.stop <= reached:
            continue
        block, skipped = piece.block, max(reached - piece.start, 0)
        size = piece.stop - piece.start
        if skipped:
            block = block.across(skipped, size) if block.transposed else block.take(skipped, size)
        kept.append(_Piece(piece.start + skipped, piece.stop, block))
        reached = piece.stop
    return kept, left_out


def _by_window(item: tuple[tuple[int, int], list[_Piece]]) -> tuple[int, int]:
    return item[0]


def _by_rows(piece: _Piece) -> tuple[int, int]:
    return piece.start, -piece.stop
