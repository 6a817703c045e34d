"""Row maps: which rows of which sources the rows of one target are.

A tensor is a stack of rows: all dimensions but the last are flattened, and a row is as wide as the last one.
A tensor [n] of one dimension is n rows of width 1, so that a bias merges by element as its weight merges by
row; a scalar is one row of width 1. A row map knows nothing of widths or dtypes: the plan checks those.

Two things are not whole rows: a column window (row-parallel shards) and a transposed block. Both are kinds of
segments, so that everything below (take, substitute, rename, serialise) has one form.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from fxfuse.errors import PlanError

_SEGMENT_FORMS = ((str, int, int), (str, int, int, int, int), (str, int, int, int, int, str))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start..stop-1 of the tensor `source`: all of their columns, or columns[0]..columns[1]-1.

    `transposed` says that the block is turned after it was cut: its columns become target rows. Raises
    PlanError when a range is empty or negative, and when a transposed block does not name its columns.
    """

    source: str
    start: int
    stop: int
    columns: tuple[int, int] | None = None
    transposed: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise PlanError(
                f"{self.source}: rows {self.start}:{self.stop} are not a range; give 0 <= start < stop"
            )
        if self.columns is None and self.transposed:
            raise PlanError(f"{self.source}: a transposed block names its columns; give 0 <= start < stop")
        if self.columns is not None and not 0 <= self.columns[0] < self.columns[1]:
            raise PlanError(
                f"{self.source}: columns {self.columns[0]}:{self.columns[1]} are not a range; "
                "give 0 <= start < stop"
            )

    def __len__(self) -> int:
        if self.transposed and self.columns is not None:
            return self.columns[1] - self.columns[0]
        return self.stop - self.start

    def width(self, source_width: int) -> int:
        """Target columns that the block fills, its source being `source_width` wide."""
        if self.transposed:
            return self.stop - self.start
        return source_width if self.columns is None else self.columns[1] - self.columns[0]

    def take(self, start: int, stop: int) -> "Rows":
        """The part of the block that is its target rows start..stop-1."""
        if self.transposed and self.columns is not None:
            return replace(self, columns=(self.columns[0] + start, self.columns[0] + stop))
        return replace(self, start=self.start + start, stop=self.start + stop)

    def across(self, start: int, stop: int) -> "Rows":
        """The part of the block that is its target columns start..stop-1."""
        if self.transposed:
            return replace(self, start=self.start + start, stop=self.start + stop)
        first = self.columns[0] if self.columns else 0
        return replace(self, columns=(first + start, first + stop))

    def __str__(self) -> str:
        window = f", {self.columns[0]}:{self.columns[1]}" if self.columns else ""
        return f"{self.source}[{self.start}:{self.stop}{window}]" + (".T" if self.transposed else "")


@dataclass(frozen=True)
class RowMap:
    """Ordered segments that fill a target from its first row to its last; equal maps have equal segments."""

    segments: tuple[Rows, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", _coalesced(self.segments))
        if not self.segments:
            raise PlanError(
                "a row map needs at least one segment: a tensor without rows is left out of a plan"
            )

    @classmethod
    def identity(cls, name: str, rows: int) -> "RowMap":
        """The `rows` rows of `name`, unchanged."""
        return cls((Rows(name, 0, rows),))

    @classmethod
    def concat(cls, parts: Iterable[tuple[str, int]]) -> "RowMap":
        """All rows of each (name, rows), one after another."""
        return cls(tuple(Rows(name, 0, rows) for name, rows in parts))

    @classmethod
    def permute(cls, name: str, permutation: Sequence[int]) -> "RowMap":
        """Target row i is row permutation[i] of `name`; raises PlanError unless each row comes once."""
        if sorted(permutation) != list(range(len(permutation))):
            raise PlanError(f"{name}: not a permutation of its rows 0..{len(permutation) - 1}")
        return cls(tuple(Rows(name, row, row + 1) for row in permutation))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The target row that each segment starts at, and last the number of target rows."""
        return tuple(accumulate(map(len, self.segments), initial=0))

    @property
    def rows(self) -> int:
        """Number of rows of the target."""
        return self.starts[-1]

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in order of first use."""
        return tuple(dict.fromkeys(segment.source for segment in self.segments))

    def take(self, start: int, stop: int) -> "RowMap":
        """The map of target rows start..stop-1; raises PlanError when the target has no such rows."""
        if not 0 <= start < stop <= self.rows:
            raise PlanError(f"rows {start}:{stop} are outside of a target with {self.rows} rows")
        first, last = bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop)
        return RowMap(
            tuple(
                segment.take(max(start - at, 0), min(stop - at, len(segment)))
                for at, segment in zip(self.starts[first:last], self.segments[first:last], strict=True)
            )
        )

    def substitute(self, mapping: Mapping[str, "RowMap"]) -> "RowMap":
        """This map with every source that `mapping` names replaced by the rows that source consists of."""
        segments: list[Rows] = []
        for segment in self.segments:
            inner = mapping.get(segment.source)
            if inner is None:
                segments.append(segment)
            elif segment.stop > inner.rows:
                raise PlanError(f"{segment} is used, but the map given for it has {inner.rows} rows")
            else:
                segments.extend(_looked_up(segment, inner))
        return RowMap(tuple(segments))

    def compose(self, other: "RowMap") -> "RowMap":
        """This map after `other`, which says what this map's only source consists of."""
        if len(self.sources) != 1:
            raise PlanError(f"compose needs a map of one source, not of {list(self.sources)}: use substitute")
        return self.substitute({self.sources[0]: other})

    def renamed(self, names: Mapping[str, str]) -> "RowMap":
        """This map with sources renamed; those that `names` leaves out keep their names."""
        return RowMap(tuple(replace(s, source=names.get(s.source, s.source)) for s in self.segments))

    def divided(self, block: tuple[int, int], sizes: Mapping[str, tuple[int, int]]) -> "RowMap":
        """The map of the scale tables of these rows, one scale for each block of `block` rows and columns.

        `sizes` holds rows and width of each source. A block that a source's end cuts off may only stand at
        the target's end. Raises PlanError where a boundary falls inside a block: that would need new scales.
        """
        segments = []
        for at, segment in zip(self.starts, self.segments, strict=False):
            rows, width = sizes[segment.source]
            first, last = segment.columns or (0, width)
            last_of_all = at + len(segment) == self.rows
            ends_fit = segment.stop % block[0] == 0 or (
                segment.stop == rows and (last_of_all or segment.transposed)
            )
            sides_fit = last % block[1] == 0 or (last == width and (last_of_all or not segment.transposed))
            if segment.start % block[0] or first % block[1] or not (ends_fit and sides_fit):
                raise PlanError(
                    f"{segment}: does not begin and end at blocks of {block[0]}x{block[1]}, "
                    "which share one scale each; leave these tensors unmerged"
                )
            columns = None if segment.columns is None else (first // block[1], -(-last // block[1]))
            segments.append(
                replace(
                    segment,
                    start=segment.start // block[0],
                    stop=-(-segment.stop // block[0]),
                    columns=columns,
                )
            )
        return RowMap(tuple(segments))

    def to_data(self) -> list[list[Any]]:
        """The segments as JSON values: [[source, start, stop], ...], a window as two, "T" as one more."""
        return [
            [s.source, s.start, s.stop, *(s.columns or ()), *(["T"] if s.transposed else [])]
            for s in self.segments
        ]

    @classmethod
    def from_data(cls, data: object) -> "RowMap":
        """The map that `to_data` wrote; raises PlanError for anything else."""
        if not isinstance(data, list) or not all(_is_segment(item) for item in data):
            raise PlanError(
                'rows are written as a list of [source, start, stop, two columns if any, "T" if turned]'
            )
        return cls(
            tuple(
                Rows(source, start, stop, tuple(more[:2]) or None, len(more) == 3)
                for source, start, stop, *more in data
            )
        )

    def __str__(self) -> str:
        return " + ".join(map(str, self.segments))


def _coalesced(segments: Iterable[Rows]) -> tuple[Rows, ...]:
    """The same rows in the fewest segments."""
    merged: list[Rows] = []
    for segment in segments:
        joined = _joined(merged[-1], segment) if merged else None
        if joined is None:
            merged.append(segment)
        else:
            merged[-1] = joined
    return tuple(merged)


def _joined(upper: Rows, lower: Rows) -> Rows | None:
    """Both blocks as one, if the second continues the first."""
    if upper.source != lower.source or upper.transposed != lower.transposed:
        return None
    if not upper.transposed:
        follows = upper.stop == lower.start and upper.columns == lower.columns
        return replace(upper, stop=lower.stop) if follows else None
    if upper.columns is None or lower.columns is None or upper.columns[1] != lower.columns[0]:
        return None
    same_rows = (upper.start, upper.stop) == (lower.start, lower.stop)
    return replace(upper, columns=(upper.columns[0], lower.columns[1])) if same_rows else None


def _looked_up(segment: Rows, inner: RowMap) -> Iterable[Rows]:
    """The blocks that `segment` consists of, its source consisting of `inner`."""
    blocks: Iterable[Rows] = inner.take(segment.start, segment.stop).segments
    if segment.columns is not None:
        blocks = [block.across(*segment.columns) for block in blocks]
    if not segment.transposed:
        return blocks
    blocks = tuple(blocks)
    if len(blocks) > 1:
        raise PlanError(f"{segment}: made of {len(blocks)} blocks, which turned would lie side by side")
    return [replace(block, transposed=not block.transposed) for block in blocks]


def _is_segment(item: object) -> bool:
    # bool is an int to Python, and JSON's true is no row number
    return (
        isinstance(item, list)
        and tuple(type(value) for value in item) in _SEGMENT_FORMS
        and item[5:] in ([], ["T"])
    )
