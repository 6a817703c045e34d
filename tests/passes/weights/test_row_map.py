"""Row maps against row indices written out one by one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import PlanError
from fxfuse.passes.weights.row_map import RowMap, Rows

RANGES = st.builds(
    lambda source, start, length: Rows(source, start, start + length),
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 8),
    st.integers(1, 5),
)
SEGMENTS = st.lists(RANGES, min_size=1, max_size=8).map(tuple)


def rows_of(segments: tuple[Rows, ...]) -> list[tuple[str, int]]:
    """(source, row) for every target row."""
    return [(s.source, row) for s in segments for row in range(s.start, s.stop)]


@given(SEGMENTS)
def test_coalescing_keeps_the_rows_and_leaves_no_adjacent_segments(segments: tuple[Rows, ...]) -> None:
    row_map = RowMap(segments)
    assert rows_of(row_map.segments) == rows_of(segments)
    assert row_map.rows == len(rows_of(segments))
    pairs = zip(row_map.segments, row_map.segments[1:], strict=False)
    assert not any(a.source == b.source and a.stop == b.start for a, b in pairs)


@given(SEGMENTS)
def test_maps_are_equal_when_their_rows_are(segments: tuple[Rows, ...]) -> None:
    one_by_one = tuple(Rows(source, row, row + 1) for source, row in rows_of(segments))
    assert RowMap(one_by_one) == RowMap(segments)
    assert hash(RowMap(one_by_one)) == hash(RowMap(segments))


@given(SEGMENTS, st.data())
def test_take_is_a_slice(segments: tuple[Rows, ...], data: st.DataObject) -> None:
    row_map = RowMap(segments)
    start = data.draw(st.integers(0, row_map.rows - 1))
    stop = data.draw(st.integers(start + 1, row_map.rows))
    assert rows_of(row_map.take(start, stop).segments) == rows_of(segments)[start:stop]


@given(SEGMENTS, st.lists(RANGES, min_size=13, max_size=16).map(tuple))
def test_substitute_looks_each_row_up(segments: tuple[Rows, ...], inner: tuple[Rows, ...]) -> None:
    wanted = [rows_of(inner)[row] if source == "a" else (source, row) for source, row in rows_of(segments)]
    assert rows_of(RowMap(segments).substitute({"a": RowMap(inner)}).segments) == wanted


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_compose_of_permutations_is_their_product(outer: list[int], inner: list[int]) -> None:
    composed = RowMap.permute("middle", outer).compose(RowMap.permute("source", inner))
    assert composed == RowMap.permute("source", [inner[row] for row in outer])


@given(SEGMENTS)
def test_json_gives_the_same_map_back(segments: tuple[Rows, ...]) -> None:
    row_map = RowMap(segments)
    assert RowMap.from_data(json.loads(json.dumps(row_map.to_data()))) == row_map


def test_constructors() -> None:
    assert RowMap.identity("a", 4).segments == (Rows("a", 0, 4),)
    assert RowMap.concat([("a", 2), ("b", 3)]).segments == (Rows("a", 0, 2), Rows("b", 0, 3))
    assert RowMap.permute("a", [2, 3, 0, 1]).segments == (Rows("a", 2, 4), Rows("a", 0, 2))
    assert RowMap.concat([("b", 2), ("a", 3), ("c", 1)]).sources == ("b", "a", "c")


def test_a_large_permutation_composes_quickly() -> None:
    # 20,000 segments: a walk through all of them for each would take minutes
    rows = 20_000
    reverse = RowMap.permute("a", range(rows - 1, -1, -1))
    assert len(reverse.segments) == rows
    assert reverse.compose(reverse) == RowMap.identity("a", rows)


@pytest.mark.parametrize("permutation", [[0, 0, 1], [1, 2, 3], [0, 1, -1]])
def test_what_is_no_permutation_is_refused(permutation: list[int]) -> None:
    with pytest.raises(PlanError, match="a: not a permutation"):
        RowMap.permute("a", permutation)


@pytest.mark.parametrize(("start", "stop"), [(2, 2), (3, 1), (-1, 2)])
def test_what_is_no_range_is_refused(start: int, stop: int) -> None:
    with pytest.raises(PlanError, match="are not a range"):
        Rows("a", start, stop)


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(PlanError, match="outside of a target with 4 rows"):
        RowMap.identity("a", 4).take(2, 5)
    with pytest.raises(PlanError, match=r"a\[0:4\] is used, but the map given for it has 3 rows"):
        RowMap.identity("a", 4).substitute({"a": RowMap.identity("b", 3)})
    with pytest.raises(PlanError, match="use substitute"):
        RowMap.concat([("a", 1), ("b", 1)]).compose(RowMap.identity("c", 1))
    with pytest.raises(PlanError, match="at least one segment"):
        RowMap(())


@pytest.mark.parametrize(
    "data", [None, {}, [["a", 0]], [["a", 0, True]], [["a", 0, 1.0]], [[0, 0, 1]], ["abc"]]
)
def test_json_that_is_no_map_is_refused(data: object) -> None:
    with pytest.raises(PlanError, match="written as a list"):
        RowMap.from_data(data)
