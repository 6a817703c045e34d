"""Row maps: which rows of which sources the rows of one target are.

A tensor is a stack of rows: all dimensions but the last are flattened, and a row is as wide as the last one.
A tensor [n] of one dimension is n rows of width 1, so that a bias merges by element as its weight merges by
row; a scalar is one row of width 1. A row map knows nothing of widths or dtypes: the plan checks those.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from fxfuse.errors import PlanError


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start..stop-1 of the tensor `source`; raises PlanError when the range is empty or negative."""

    source: str
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise PlanError(
                f"{self.source}: rows {self.start}:{self.stop} are not a range; give 0 <= start < stop"
            )

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.source}[{self.start}:{self.stop}]"


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

    @property
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
                Rows(
                    segment.source,
                    segment.start + max(start - at, 0),
                    min(segment.start + stop - at, segment.stop),
                )
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
                segments.extend(inner.take(segment.start, segment.stop).segments)
        return RowMap(tuple(segments))

    def compose(self, other: "RowMap") -> "RowMap":
        """This map after `other`, which says what this map's only source consists of."""
        if len(self.sources) != 1:
            raise PlanError(f"compose needs a map of one source, not of {list(self.sources)}: use substitute")
        return self.substitute({self.sources[0]: other})

    def renamed(self, names: Mapping[str, str]) -> "RowMap":
        """This map with sources renamed; those that `names` leaves out keep their names."""
        return RowMap(tuple(Rows(names.get(s.source, s.source), s.start, s.stop) for s in self.segments))

    def to_data(self) -> list[list[Any]]:
        """The segments as JSON values: [[source, start, stop], ...]."""
        return [[segment.source, segment.start, segment.stop] for segment in self.segments]

    @classmethod
    def from_data(cls, data: object) -> "RowMap":
        """The map that `to_data` wrote; raises PlanError for anything else."""
        if not isinstance(data, list) or not all(_is_segment(item) for item in data):
            raise PlanError("rows are written as a list of [source, start, stop]")
        return cls(tuple(Rows(*item) for item in data))

    def __str__(self) -> str:
        return " + ".join(map(str, self.segments))


def _coalesced(segments: Iterable[Rows]) -> tuple[Rows, ...]:
    """The same rows in the fewest segments."""
    merged: list[Rows] = []
    for segment in segments:
        if merged and merged[-1].source == segment.source and merged[-1].stop == segment.start:
            merged[-1] = Rows(segment.source, merged[-1].start, segment.stop)
        else:
            merged.append(segment)
    return tuple(merged)


def _is_segment(item: object) -> bool:
    # bool is an int to Python, and JSON's true is no row number
    return isinstance(item, list) and [type(value) for value in item] == [str, int, int]
