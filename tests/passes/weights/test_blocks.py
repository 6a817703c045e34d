"""Column windows, transposed blocks, declared repeats and steps, against torch written by hand."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import PlanError
from fxfuse.passes.weights import Draft, RowMap, Rows, TensorSpec, Transform, Usage, WeightPlan


def one(spec: TensorSpec, *panels: RowMap) -> Transform:
    return Transform(spec, panels[0], panels[1:])


def columns_of(name: str, rows: int, first: int, last: int) -> RowMap:
    return RowMap((Rows(name, 0, rows, (first, last)),))


def sharded(world: int, rows: int = 3, width: int = 12) -> WeightPlan:
    """Every rank's columns of one [rows, width] tensor."""
    part = width // world
    return WeightPlan(
        (TensorSpec("o", (rows, width)),),
        tuple(
            one(TensorSpec(f"o.{r}", (rows, part)), columns_of("o", rows, r * part, (r + 1) * part))
            for r in range(world)
        ),
    )


# --- columns


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_column_shards_are_torch_chunks_and_join_again(world: int) -> None:
    weight = torch.randn(3, 12)
    plan = sharded(world)
    shards = plan.apply({"o": weight})
    for rank, chunk in enumerate(weight.chunk(world, dim=1)):
        assert torch.equal(shards[f"o.{rank}"], chunk)
    joined = WeightPlan.from_json(plan.inverse().to_json()).apply(shards)
    assert torch.equal(joined["o"], weight)
    assert plan.inverse().inverse().apply({"o": weight}).keys() == shards.keys()


def test_columns_of_stacked_experts_are_sliced_on_the_last_dimension() -> None:
    weight = torch.randn(2, 3, 8)
    rows = columns_of("down", 6, 4, 8)
    plan = WeightPlan(
        (TensorSpec("down", (2, 3, 8)),),
        (one(TensorSpec("down", (2, 3, 4)), rows),),
        (Usage("down", "partial", "tensor_parallel_shard"),),
    )
    assert torch.equal(plan.apply({"down": weight})["down"], weight[:, :, 4:])


def test_a_transposed_block_is_the_transpose_and_its_own_inverse() -> None:
    weight = torch.randn(3, 5)
    turned = RowMap((Rows("w", 0, 3, (0, 5), transposed=True),))
    plan = WeightPlan((TensorSpec("w", (3, 5)),), (one(TensorSpec("w.t", (5, 3)), turned),))
    there = plan.apply({"w": weight})
    assert torch.equal(there["w.t"], weight.t())
    assert there["w.t"].is_contiguous()
    assert torch.equal(plan.inverse().apply(there)["w"], weight)
    assert plan.inverse().inverse() == plan


def test_transposed_tensors_side_by_side_are_the_transpose_of_their_concatenation() -> None:
    q, k = torch.randn(4, 3), torch.randn(2, 3)
    panels = [RowMap((Rows(n, 0, r, (0, 3), transposed=True),)) for n, r in (("q", 4), ("k", 2))]
    plan = WeightPlan(
        (TensorSpec("q", (4, 3)), TensorSpec("k", (2, 3))), (one(TensorSpec("qk", (3, 6)), *panels),)
    )
    there = plan.apply({"q": q, "k": k})
    assert torch.equal(there["qk"], torch.cat([q, k]).t())
    back = plan.inverse().apply(there)
    assert torch.equal(back["q"], q)
    assert torch.equal(back["k"], k)


def test_experts_stored_transposed_are_turned_one_by_one() -> None:
    stored = torch.randn(3, 4, 6)  # [E, H, 2I]
    rows = RowMap(tuple(Rows("e", 4 * e, 4 * e + 4, (0, 6), transposed=True) for e in range(3)))
    plan = WeightPlan((TensorSpec("e", (3, 4, 6)),), (one(TensorSpec("e", (3, 6, 4)), rows),))
    there = plan.apply({"e": stored})
    assert torch.equal(there["e"], stored.transpose(1, 2))
    assert torch.equal(plan.inverse().apply(there)["e"], stored)


@given(st.data())
def test_any_grid_of_blocks_inverts_bit_for_bit(data: st.DataObject) -> None:
    """A matrix cut at any rows and columns, each block turned or not, dealt to tensors of their own."""
    rows, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    row_cuts = [0, *sorted(data.draw(st.sets(st.integers(1, max(rows - 1, 1)))) - {rows}), rows]
    col_cuts = [0, *sorted(data.draw(st.sets(st.integers(1, max(width - 1, 1)))) - {width}), width]
    transforms, expected = [], {}
    weight = torch.arange(rows * width).view(rows, width)
    for (r0, r1), (c0, c1) in itertools.product(itertools.pairwise(row_cuts), itertools.pairwise(col_cuts)):
        turned = data.draw(st.booleans())
        name, block = f"b{r0}.{c0}", weight[r0:r1, c0:c1]
        expected[name] = block.t() if turned else block
        spec = TensorSpec(name, tuple(expected[name].shape))
        transforms.append(one(spec, RowMap((Rows("w", r0, r1, (c0, c1), turned),))))
    plan = WeightPlan((TensorSpec("w", (rows, width)),), tuple(transforms))
    there = plan.apply({"w": weight})
    assert all(torch.equal(there[name], block) for name, block in expected.items())
    assert torch.equal(plan.inverse().apply(there)["w"], weight)
    assert WeightPlan.from_json(plan.to_json()) == plan


W = TensorSpec("w", (4, 6))


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (
            [one(TensorSpec("t", (4, 3)), columns_of("w", 4, 0, 3))],
            r"w: rows 0:4 of columns 3:6 are used by no",
        ),
        (
            [
                one(TensorSpec("t", (4, 4)), columns_of("w", 4, 0, 4)),
                one(TensorSpec("u", (4, 3)), columns_of("w", 4, 3, 6)),
            ],
            r"w: rows 0:4 of columns 3:4 are used twice",
        ),
        ([one(TensorSpec("t", (4, 7)), columns_of("w", 4, 0, 7))], r"t: w\[0:4, 0:7\] is outside of w"),
        (
            [one(TensorSpec("t", (4, 6)), columns_of("w", 4, 0, 3), columns_of("w", 4, 3, 5))],
            "t: rows of width 3 cannot hold those of",
        ),
        (
            [one(TensorSpec("t", (4, 6)), columns_of("w", 4, 0, 3), columns_of("w", 3, 3, 6))],
            r"t: shape \[4, 6\] has 4 rows, 3 are given",
        ),
        (
            [one(TensorSpec("t", (4, 6)), RowMap((Rows("w", 0, 4, (0, 6), transposed=True),)))],
            r"t: shape \[4, 6\] has 4 rows, 6 are given",
        ),
    ],
)
def test_blocks_that_do_not_tile_are_refused(transforms: list[Transform], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        WeightPlan((W,), tuple(transforms))


def test_ranges_that_are_none_are_refused() -> None:
    for arguments in (("w", 0, 2, (3, 3)), ("w", 0, 2, (-1, 3)), ("w", 0, 2, None, True)):
        with pytest.raises(PlanError, match="give 0 <= start < stop"):
            Rows(*arguments)


@pytest.mark.parametrize(
    "data", [["w", 0, 1, 0], ["w", 0, 1, 0, 1, "X"], ["w", 0, 1, "T"], ["w", 0, 1, 0, True]]
)
def test_json_that_is_no_block_is_refused(data: list[object]) -> None:
    with pytest.raises(PlanError, match="written as a list"):
        RowMap.from_data([data])


def test_blocks_that_cannot_be_put_together_have_no_inverse() -> None:
    """A pinwheel: five blocks that tile a square, in no grid of columns."""
    tiles = [(0, 1, 0, 2), (0, 2, 2, 3), (2, 3, 1, 3), (1, 3, 0, 1), (1, 2, 1, 2)]
    transforms = tuple(
        one(TensorSpec(f"t{i}", (b - a, d - c)), RowMap((Rows("w", a, b, (c, d)),)))
        for i, (a, b, c, d) in enumerate(tiles)
    )
    plan = WeightPlan((TensorSpec("w", (3, 3)),), transforms)
    with pytest.raises(PlanError, match="no grid"):
        plan.inverse()


# --- scale tables


@pytest.mark.parametrize(("rows", "ok"), [((256, 128, 384), True), ((256, 100), True), ((100, 256), False)])
def test_block_scale_tables_concatenate_when_blocks_divide(rows: tuple[int, ...], ok: bool) -> None:
    names = [f"w{i}" for i in range(len(rows))]
    merged = RowMap.concat(zip(names, rows, strict=True))
    sizes = {name: (count, 300) for name, count in zip(names, rows, strict=True)}
    if not ok:
        with pytest.raises(PlanError, match=r"w0\[0:100\]: does not begin and end at blocks of 128x128"):
            merged.divided((128, 128), sizes)
        return
    tables = RowMap.concat((name, -(-count // 128)) for name, count in zip(names, rows, strict=True))
    assert merged.divided((128, 128), sizes) == tables


def test_block_scale_tables_follow_windows_and_interleaved_rows() -> None:
    sizes = {"w": (512, 512)}
    window = RowMap((Rows("w", 0, 512, (256, 512)),))
    assert window.divided((128, 128), sizes) == RowMap((Rows("w", 0, 4, (2, 4)),))
    turned = RowMap((Rows("w", 0, 256, (128, 512), transposed=True),))
    assert turned.divided((128, 128), sizes) == RowMap((Rows("w", 0, 2, (1, 4), transposed=True),))
    swapped = RowMap((Rows("w", 256, 512), Rows("w", 0, 256)))
    assert swapped.divided((128, 128), sizes) == RowMap((Rows("w", 2, 4), Rows("w", 0, 2)))
    for cut in (RowMap((Rows("w", 64, 512),)), RowMap((Rows("w", 0, 512, (0, 200)),))):
        with pytest.raises(PlanError, match="share one scale each"):
            cut.divided((128, 128), sizes)


# --- declared exceptions


def scale(repeats: int, usages: tuple[Usage, ...], shape: tuple[int, ...] = ()) -> WeightPlan:
    rows = RowMap(tuple(Rows("s", 0, 1) for _ in range(repeats)))
    return WeightPlan((TensorSpec("s", shape),), (one(TensorSpec("t", (repeats,)), rows),), usages)


REPEATED = Usage("s", "repeated", "per_tensor_scale")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_declared_scale_is_given_to_every_shard_and_comes_back(shape: tuple[int, ...]) -> None:
    plan = scale(3, (REPEATED,), shape)
    value = torch.randn(shape)
    there = plan.apply({"s": value})
    assert torch.equal(there["t"], value.reshape(1).expand(3))
    assert torch.equal(plan.inverse().apply(there)["s"], value)
    assert WeightPlan.from_json(plan.to_json()).digest == plan.digest


def test_one_element_alone_is_no_reason_to_repeat() -> None:
    with pytest.raises(PlanError, match=r"s: rows 0:1 are used twice"):
        scale(3, ())


def test_declarations_that_are_not_so_are_refused() -> None:
    with pytest.raises(PlanError, match=r"s: declared as repeated \(per_tensor_scale\), and is not"):
        scale(1, (REPEATED,))
    with pytest.raises(PlanError, match="x: declared as partial, and no source"):
        scale(1, (Usage("x", "partial", "copies"),))
    with pytest.raises(PlanError, match="'repeated' as 'one element' is not known; known are repeated"):
        Usage("s", "repeated", "one element")
    whole = TensorSpec("s", (2, 1))
    twice = RowMap((Rows("s", 0, 2), Rows("s", 0, 2)))
    with pytest.raises(PlanError, match="the scale of a tensor is one number"):
        WeightPlan((whole,), (one(TensorSpec("t", (4, 1)), twice),), (REPEATED,))


def test_what_is_partial_has_no_inverse_and_says_why() -> None:
    plan = WeightPlan(
        (W,),
        (one(TensorSpec("w", (2, 6)), RowMap((Rows("w", 0, 2),))),),
        (Usage("w", "partial", "tensor_parallel_shard"),),
    )
    with pytest.raises(PlanError, match=r"w: only a part of it is here \(tensor_parallel_shard\)"):
        plan.inverse()


def test_copies_that_no_target_needs_leave_the_state_dict() -> None:
    """Key-value heads on two ranks: what comes back is the first copy, and the second is used up."""
    copies = [one(TensorSpec(f"{r}.k", (4, 6)), RowMap.identity("w", 4)) for r in range(2)]
    plan = WeightPlan((W,), tuple(copies), (Usage("w", "repeated", "tensor_parallel_replica"),))
    weight = torch.randn(4, 6)
    there = plan.apply({"w": weight})
    back = plan.inverse().apply(there)
    assert list(back) == ["w"]
    assert torch.equal(back["w"], weight)


def test_a_plan_without_exceptions_is_digested_as_before() -> None:
    plan = WeightPlan(
        (TensorSpec("a", (4, 3)), TensorSpec("b", (2, 3))),
        (one(TensorSpec("t", (6, 3)), RowMap.concat([("a", 4), ("b", 2)])),),
    )
    assert plan.digest == "e0312a840ca7855ca2599e6fd0ff759616a0e70396f11570187672447dff1a3b"


# --- steps


def test_steps_join_into_the_plan_that_does_all_at_once() -> None:
    specs = {name: TensorSpec(name, (4, 3), "float32") for name in ("q", "k", "other")}
    weights = {name: torch.randn(4, 3) for name in specs}
    halves = [one(TensorSpec(n, (2, 3)), RowMap((Rows(n, 2, 4),))) for n in ("q", "k")]
    draft = Draft(specs).then(halves, [Usage(n, "partial", "tensor_parallel_shard") for n in ("q", "k")])
    draft.then([one(TensorSpec("qk", (4, 3)), RowMap.concat([("q", 2), ("k", 2)]))])
    turned = RowMap((Rows("qk", 1, 4, (0, 3), transposed=True),))
    plan = draft.plan()
    assert set(draft.tensors) == {"qk", "other"}
    got = plan.apply(weights)
    assert torch.equal(got["qk"], torch.cat([weights["q"][2:], weights["k"][2:]]))
    assert got["other"] is weights["other"]
    with pytest.raises(PlanError, match="which turned would lie side by side"):
        draft.then([one(TensorSpec("t", (3, 3)), turned)])


def test_a_step_and_its_inverse_leave_the_empty_plan() -> None:
    specs = {name: TensorSpec(name, (3, 12)) for name in ("o", "w")}
    there = sharded(3)
    draft = Draft(specs).then(there.transforms)
    assert draft.plan() == there
    draft.then(there.inverse().transforms)
    assert draft.tensors == specs
    halves = Draft(specs).then([one(TensorSpec("a", (3, 12)), RowMap.permute("w", [2, 0, 1]))])
    halves.then([one(TensorSpec("w", (3, 12)), RowMap.permute("a", [1, 2, 0]))])
    assert halves.plan() == WeightPlan()


def test_a_step_refuses_absent_and_taken_names() -> None:
    specs = {"w": W, "v": TensorSpec("v", (4, 6))}
    with pytest.raises(PlanError, match="t: needs x, which are not there"):
        Draft(specs).then([one(TensorSpec("t", (4, 6)), RowMap.identity("x", 4))])
    with pytest.raises(PlanError, match="v: the name is taken"):
        Draft(specs).then([one(TensorSpec("v", (4, 6)), RowMap.identity("w", 4))])
    with pytest.raises(PlanError, match="fills one tensor twice"):
        Draft(specs).then([one(TensorSpec("t", (4, 6)), RowMap.identity(n, 4)) for n in "wv"])
