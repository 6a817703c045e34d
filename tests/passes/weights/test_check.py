"""What a plan proves about itself: plans that lose rows, use them twice or mix kinds are no plans."""

from dataclasses import replace

import pytest

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform, WeightPlan

A, B = TensorSpec("a", (4, 3)), TensorSpec("b", (2, 3))


def ab(*segments: Rows, shape: tuple[int, ...] = (6, 3), dtype: str | None = None) -> Transform:
    return Transform(TensorSpec("t", shape, dtype), RowMap(segments))


WHOLE = (Rows("a", 0, 4), Rows("b", 0, 2))


@pytest.mark.parametrize(
    ("sources", "transforms", "message"),
    [
        ((A, B), (ab(Rows("a", 0, 4), shape=(4, 3)),), "b: rows 0:2 are used by no transform"),
        ((A,), (ab(Rows("a", 0, 3), shape=(3, 3)),), "a: rows 3:4 are used by no transform"),
        ((A,), (ab(Rows("a", 0, 1), Rows("a", 2, 4), shape=(3, 3)),), "a: rows 1:2 are used by no transform"),
        ((A,), (ab(Rows("a", 0, 3), Rows("a", 2, 4), shape=(5, 3)),), "a: rows 2:3 are used twice"),
        ((A,), (ab(Rows("a", 0, 5), shape=(5, 3)),), r"a: rows up to 5 are used, shape \[4, 3\] has 4"),
        ((A, B), (ab(*WHOLE, shape=(7, 3)),), r"t: shape \[7, 3\] has 7 rows, 6 are given"),
        ((A, B), (ab(*WHOLE, shape=(6, 4)),), "t: rows of width 4 cannot hold those of a"),
        ((A, TensorSpec("b", (3, 2))), (ab(*WHOLE),), "t: rows of width 3 cannot hold those of b"),
        ((A,), (ab(*WHOLE),), "t: takes rows of b, which is not among the sources"),
        ((A, A, B), (ab(*WHOLE),), "a: named as a source twice"),
        (
            (A, B),
            (ab(Rows("a", 0, 4), shape=(4, 3)), ab(Rows("b", 0, 2), shape=(2, 3))),
            "t: filled by two transforms",
        ),
        ((A, replace(B, dtype="float32")), (ab(*WHOLE),), "t: dtype None, but b has float32"),
        (
            (replace(A, dtype="bfloat16"), replace(B, dtype="float32")),
            (ab(*WHOLE, dtype="float32"),),
            "t: dtype float32, but a has bfloat16",
        ),
        ((A, B, TensorSpec("c", (0, 3))), (ab(*WHOLE),), r"c: shape \[0, 3\] has no elements"),
    ],
)
def test_a_plan_that_is_no_bijection_is_refused(
    sources: tuple[TensorSpec, ...], transforms: tuple[Transform, ...], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        WeightPlan(sources, transforms)


def test_all_faults_of_a_plan_are_listed() -> None:
    with pytest.raises(PlanError) as caught:
        WeightPlan((A, B, TensorSpec("c", (1, 3))), (ab(*WHOLE, shape=(6, 4)),))
    assert all(fault in str(caught.value) for fault in ("hold those of a", "hold those of b", "c: rows 0:1"))


def test_a_target_without_a_dtype_takes_its_sources() -> None:
    sources = tuple(replace(s, dtype="bfloat16") for s in (A, B))
    left, right = (WeightPlan(sources, (ab(*WHOLE, dtype=dtype),)) for dtype in (None, "bfloat16"))
    assert left.targets[0].dtype == "bfloat16"
    assert left.digest == right.digest
