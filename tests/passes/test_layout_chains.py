"""split→reshape→cat chains behind a linear: found by what they move, rewritten without changing a bit."""

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.passes.layout_chains import blocks_of
from fxfuse.runtime.ops.gather_features import gather_features
from fxfuse.testing import integer_like_, integer_tensor

H = 8


class GroupedProjection(nn.Module):
    """q, k, v, z and b, a by key-head groups, put into [all q | all k | all v] for a convolution."""

    def __init__(
        self, key_heads: int = 2, ratio: int = 3, dk: int = 4, dv: int = 2, bias: bool = False
    ) -> None:
        super().__init__()
        self.sizes = (key_heads, ratio, dk, dv)
        self.qkvz = nn.Linear(H, key_heads * (2 * dk + 2 * ratio * dv), bias=bias)
        self.ba = nn.Linear(H, key_heads * 2 * ratio, bias=bias)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        heads, ratio, dk, dv = self.sizes
        grouped = self.qkvz(x).view(*x.shape[:-1], heads, -1)
        q, k, v, z = torch.split(grouped, [dk, dk, ratio * dv, ratio * dv], dim=-1)
        b, a = torch.split(self.ba(x).view(*x.shape[:-1], heads, 2 * ratio), [ratio, ratio], dim=-1)
        return q, k, v, z, b, a

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads, ratio, _, dv = self.sizes
        q, k, v, z, b, a = self.pieces(x)
        lead = x.shape[:-1]
        mixed = torch.cat([t.reshape(*lead, -1) for t in (q, k, v)], dim=-1).transpose(1, 2)
        z = z.reshape(*lead, heads * ratio, dv)
        return mixed * 2, z * 3, b.reshape(*lead, -1) * 5, a.reshape(*lead, heads * ratio) + 1


def rewritten(module: nn.Module, **options: object) -> fxfuse.Rewritten:
    x = integer_tensor((2, 5, H), seed=1)
    return fxfuse.rewrite(module, (x,), **options)  # type: ignore[arg-type]


def exact(module: nn.Module, result: fxfuse.Rewritten, *shapes: tuple[int, ...]) -> None:
    for seed, shape in enumerate(shapes or ((2, 5, H), (1, 5, H), (2, 1, H), (3, 2, H))):
        x = integer_tensor(shape, seed)
        ours, theirs = result.graph_module(x), module(x)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def names(result: fxfuse.Rewritten) -> list[str]:
    return [str(node.target) for node in result.graph_module.graph.nodes if node.op == "call_function"]


def matched(result: fxfuse.Rewritten, rule: str = "layout_chains") -> int:
    return sum(row.matched for row in result.report.rows if row.rule == rule)


@pytest.mark.parametrize("weights", ["auto", "copy"])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_a_grouped_projection_is_rewritten_bit_for_bit(ratio: int, bias: bool, weights: str) -> None:
    module = integer_like_(GroupedProjection(ratio=ratio, bias=bias), seed=ratio)
    result = rewritten(module, weights=weights)
    assert matched(result) == 1
    assert not result.report.misses
    exact(module, result)


def test_a_copy_leaves_no_cat_and_no_reshape_behind() -> None:
    result = rewritten(GroupedProjection(), weights="copy")
    assert not {"aten.cat.default", "aten.reshape.default", "aten.clone.default"} & set(names(result))
    assert names(result).count("aten.linear.default") == 1


def test_strided_views_leave_one_gather_for_each_value_out_of_order() -> None:
    result = rewritten(GroupedProjection())
    assert names(result).count("fxfuse.gather_features.default") == 4
    assert "aten.cat.default" not in names(result)


def test_the_plan_of_a_copy_permutes_the_rows_of_both_sources() -> None:
    module = integer_like_(GroupedProjection(), seed=3)
    result = rewritten(module, weights="copy")
    heads, ratio, dk, dv = module.sizes
    grouped = module.qkvz.weight.view(heads, -1, H).split([dk, dk, ratio * dv, ratio * dv], dim=1)
    b, a = module.ba.weight.view(heads, 2 * ratio, H).split(ratio, dim=1)
    q, k, v, z = (part.reshape(-1, H) for part in grouped)
    cuts = {"qkv": torch.cat([q, k, v]), "z": z, "b": b.reshape(-1, H), "a": a.reshape(-1, H)}
    [fused] = result.plan.apply(module.state_dict()).values()
    assert sorted(map(tuple, fused.tolist())) == sorted(map(tuple, torch.cat(list(cuts.values())).tolist()))
    for part in cuts.values():
        starts = range(len(fused) - len(part) + 1)
        assert any(torch.equal(fused[i : i + len(part)], part) for i in starts)


def test_a_rewritten_chain_is_no_candidate_again() -> None:
    for weights in ("auto", "copy"):
        once = rewritten(GroupedProjection(), weights=weights)
        again = fxfuse.rewrite(once.graph_module, (integer_tensor((2, 5, H), seed=0),), weights=weights)
        assert matched(again) == 0
        assert not again.report.misses


class Swapped(GroupedProjection):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, z, b, a = self.pieces(x)
        return (torch.cat([t.reshape(*x.shape[:-1], -1) for t in (k, v, q)], dim=-1) * 2, z + 1, b + 1, a + 1)


def test_another_order_of_the_cat_is_another_order_of_features() -> None:
    module = integer_like_(Swapped(), seed=5)
    for weights in ("auto", "copy"):
        exact(module, rewritten(module, weights=weights))


class UsedTwice(GroupedProjection):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, z, b, a = self.pieces(x)
        mixed = torch.cat([t.reshape(*x.shape[:-1], -1) for t in (q, k, v)], dim=-1)
        return mixed * 2, (q * 3).sum(), z + 1, b + 1, a + 1


class UsedWhole(GroupedProjection):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, z, b, a = self.pieces(x)
        mixed = torch.cat([t.reshape(*x.shape[:-1], -1) for t in (q, k, v)], dim=-1)
        return mixed * 2, self.qkvz(x).transpose(0, 1) * 3, z + 1, b + 1, a + 1


class Written(GroupedProjection):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        *_, z, b, a = self.pieces(x)
        grouped = self.qkvz(x).view(*x.shape[:-1], self.sizes[0], -1)
        grouped.narrow(-1, 0, self.sizes[2]).mul_(2)
        parts = (grouped.narrow(-1, start, self.sizes[2]) for start in (0, self.sizes[2]))
        mixed = torch.cat([t.reshape(*x.shape[:-1], -1) for t in parts], dim=-1)
        return mixed * 2, z + 1, b + 1, a + grouped.sum()


@pytest.mark.parametrize(
    ("kind", "weights", "reason"),
    [(UsedTwice, "copy", "exactly once"), (Written, "auto", "in place"), (Written, "copy", "in place")],
)
def test_a_near_miss_is_left_alone_with_its_reason(kind: type, weights: str, reason: str) -> None:
    module = integer_like_(kind(), seed=7)
    result = rewritten(module, weights=weights)
    own = [miss.reason for miss in result.report.misses if miss.rule == "layout_chains"]
    assert any(reason in each for each in own), own
    exact(module, result, (2, 5, H))


@pytest.mark.parametrize("kind", [UsedTwice, UsedWhole])
def test_other_uses_of_the_features_see_what_they_saw(kind: type) -> None:
    for weights in ("auto", "copy"):
        module = integer_like_(kind(), seed=9)
        exact(module, rewritten(module, weights=weights), (2, 5, H), (3, 4, H))


@pytest.mark.parametrize(
    "features",
    [
        [0],
        [3, 4, 5],
        [0, 1, 6, 7, 12, 13],
        [4, 5, 0, 1],
        [5, 4, 3],
        [0, 1, 2, 4, 5, 9, 10, 11],
        [7, 0, 1, 8, 9],
    ],
)
def test_blocks_spell_any_order_of_features(features: list[int]) -> None:
    x = integer_tensor((2, 3, 16), seed=0)
    assert torch.equal(gather_features(x, blocks_of(features), [len(features)]), x[..., features])


def test_one_regular_block_is_a_view() -> None:
    x = integer_tensor((2, 3, 12), seed=0)
    picked = gather_features(x, blocks_of([1, 2, 5, 6, 9, 10]), [3, 2])
    assert torch.equal(picked, x[..., [1, 2, 5, 6, 9, 10]].unflatten(-1, (3, 2)))
    assert picked.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


class Tail(GroupedProjection):
    """What follows the cat depends on the length of the sequence."""

    def __init__(self, tail: str) -> None:
        super().__init__()
        self.tail = tail

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, z, b, a = self.pieces(x)
        mixed = torch.cat([t.reshape(*x.shape[:-1], -1) for t in (q, k, v)], dim=-1)
        length = x.shape[1]
        if self.tail == "last":
            mixed = mixed[:, -4:]
        elif self.tail == "first":
            mixed = mixed[:, :4]
        elif self.tail == "all but first":
            mixed = mixed[:, 1:]
        elif self.tail == "rolled rows":
            mixed = torch.cat([mixed[:, 1:], mixed[:, :1]], dim=1)
        elif self.tail == "rolled features":
            mixed = torch.cat([mixed[..., length:], mixed[..., :length]], dim=-1)
        return mixed * 2, z * 3, b + 1, a + 1


@pytest.mark.parametrize("weights", ["auto", "copy"])
@pytest.mark.parametrize("tail", ["last", "first", "all but first", "rolled rows", "rolled features"])
def test_what_depends_on_the_length_is_right_at_every_length(tail: str, weights: str) -> None:
    module = integer_like_(Tail(tail), seed=11)
    result = fxfuse.rewrite(module, (integer_tensor((2, 9, H), seed=1),), weights=weights)
    for length in (5, 6, 9, 12):
        x = integer_tensor((2, length, H), seed=length)
        assert all(torch.equal(a, b) for a, b in zip(result.graph_module(x), module(x), strict=True))


class Returns(GroupedProjection):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v, z, b, a = self.pieces(x)
        mixed = torch.cat([t.reshape(*x.shape[:-1], -1) for t in (q, k, v)], dim=-1)
        return mixed, z.reshape(*x.shape[:-1], -1), k.contiguous(), b + 1, a + 1


@pytest.mark.parametrize("weights", ["auto", "copy"])
def test_values_that_leave_the_graph_stay_laid_out_as_they_were(weights: str) -> None:
    module = integer_like_(Returns(), seed=13)
    result, x = rewritten(module, weights=weights), integer_tensor((2, 5, H), seed=2)
    ours, theirs = result.graph_module(x), module(x)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.untyped_storage().nbytes() == b.untyped_storage().nbytes()


def test_gradients_survive_a_copy_that_is_asked_for() -> None:
    module = GroupedProjection(bias=True)
    x = torch.randn(2, 5, H)
    expected = torch.autograd.grad(sum(part.sum() for part in module(x)), module.qkvz.bias)
    fxfuse.optimize(module, weights="copy", inner="eager")
    got = torch.autograd.grad(sum(part.sum() for part in module(x)), module.qkvz.bias)
    assert torch.allclose(got[0], expected[0])


def test_a_module_called_twice_shares_its_copy() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = GroupedProjection()

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (*self.inner(x), *self.inner(x + 1))

    module = integer_like_(Twice(), seed=15)
    result = rewritten(module, weights="copy")
    assert matched(result) == 1 and not result.report.misses
    assert len(result.plan.targets) == 1
    exact(module, result, (2, 5, H))


def test_too_many_elements_to_number_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.passes.numbered_features.MOST_ELEMENTS", 10)
    result = rewritten(GroupedProjection())
    assert any("let lengths vary" in miss.reason for miss in result.report.misses)
