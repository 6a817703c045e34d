"""The normal form: each rule with its spellings; writes, random numbers and asserts stay as they were."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import Rewritten, rewrite
from fxfuse.passes import pipeline
from fxfuse.runtime.optimize import optimization_report
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced
from fxfuse.testing.tensors import integer_tensor

X = integer_tensor((2, 3, 4), seed=0)


class Calls(nn.Module):
    """A forward given as a function; the buffer stands for a cache."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute
        self.register_buffer("cache", torch.zeros(2, 5, 4))

    def forward(self, *inputs: Any) -> Any:
        return self.compute(*inputs)


def targets(rewritten: Rewritten) -> list[str]:
    return [str(n.target) for n in rewritten.graph_module.graph.nodes if n.op == "call_function"]


def normal(rewrite_equal: Any, compute: Callable[..., Any], *inputs: Any) -> list[str]:
    """The calls left after normalising alone, values checked."""
    return targets(rewrite_equal(Calls(compute), inputs or (X,), passes=(), fill=False))


IDENTITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "to dtype": lambda x: x.to(torch.float32),
    "to itself": lambda x: x.to(x),
    "to device": lambda x: x.to("cpu"),
    "to device and dtype": lambda x: x.to("cpu", torch.float32),
    "float": lambda x: x.float(),
    "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(),
    "alias": torch.ops.aten.alias.default,
    "dropout in evaluation": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "view of its own shape": lambda x: x.view(2, 3, 4),
    "view there and back": lambda x: x.view(-1, 4).view(x.shape),
    "flatten of one dimension": lambda x: x.flatten(2),
    "whole slice": lambda x: x[:, :, :],
    "expand to its own shape": lambda x: x.expand(2, 3, 4),
    "unsqueeze and squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "transposed twice": lambda x: x.transpose(0, 1).transpose(0, 1),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_what_is_the_same_memory_is_the_same_node(rewrite_equal: Any, name: str) -> None:
    assert normal(rewrite_equal, lambda x: IDENTITIES[name](x) + 1) == ["aten.add.Tensor"]


def test_a_write_after_an_idle_dropout_is_a_write_to_its_input(rewrite_equal: Any) -> None:
    """In evaluation dropout hands back its very input, while its fake kernel makes a copy."""

    def compute(x: Tensor) -> list[Tensor]:
        y = F.dropout(x, 0.5, training=False)
        first = y.view(-1) * 2
        x.add_(1)
        second = y.view(-1) * 2
        y.mul_(3)
        return [first, second, x + 1]

    assert "aten.dropout.default" not in normal(rewrite_equal, compute, X.clone())


READ_BEFORE: dict[str, Callable[[Tensor], tuple[Tensor, Callable[[Tensor], Tensor]]]] = {
    "a mean that gets its dimension back": lambda x: (x.mean(-1), lambda m: m.unsqueeze(-1)),
    "a sum that gets its dimension back": lambda x: (x.sum(1), lambda m: m.unsqueeze(1)),
    "a copied reshape": lambda x: (x[..., :2].reshape(-1), lambda m: m.reshape(3, 4)),
    "a copied reshape, back in its shape": lambda x: (x[..., :2].reshape(-1), lambda m: m.reshape(2, 3, 2)),
    "a flattened copy": lambda x: (x.transpose(0, 1).flatten(), lambda m: m.view(2, 3, 4)),
}


@pytest.mark.parametrize("what", READ_BEFORE)
@pytest.mark.parametrize("late", [False, True])
def test_what_is_read_before_a_write_is_not_read_after_it(rewrite_equal: Any, what: str, late: bool) -> None:
    def compute(x: Tensor) -> Tensor:
        read, spelled = READ_BEFORE[what](x)
        made = spelled(read) if late else None
        x.add_(1)
        return (spelled(read) if made is None else made) * 2

    normal(rewrite_equal, compute, X.clone())


@pytest.mark.parametrize("copy", [lambda x: x.repeat(1, 1, 1), lambda x: torch.cat([x]), lambda x: x * 1])
@pytest.mark.parametrize("view", [lambda x: x.view(2, 6), lambda x: x.view_as(x.reshape(2, 6))])
def test_a_view_of_a_copy_that_goes_is_a_reshape(rewrite_equal: Any, copy: Any, view: Any) -> None:
    names = normal(rewrite_equal, lambda x: view(copy(x[..., 1:3])).sum(0))
    assert names[0] == "aten.slice.Tensor" and set(names[1:-1]) <= {"aten.reshape.default"}
    assert names[-1] == "aten.sum.dim_IntList"


def test_reshapes_of_what_lies_in_a_row_are_one_where_strides_show(rewrite_equal: Any) -> None:
    """A part of it leaves the graph: its strides are the same either way."""
    names = normal(rewrite_equal, lambda x: (x + 1).reshape(-1).reshape(6, 4).reshape(3, 2, 4)[..., 1:] * 2)
    assert names.count("aten.reshape.default") == 1


@pytest.mark.parametrize("idle", [lambda x: x**1, lambda x: x[None].squeeze(0), lambda x: x.neg().neg()])
@pytest.mark.parametrize("before", [False, True])
def test_an_idle_copy_of_what_is_written_goes_where_no_write_follows(
    rewrite_equal: Any, idle: Any, before: bool
) -> None:
    def compute(x: Tensor, cache: Tensor) -> Tensor:
        early = idle(cache[:, 1:])
        cache.index_copy_(1, torch.tensor([2, 0, 3]), x)
        return (early if before else idle(cache[:, 1:])).sum(0)

    names = normal(rewrite_equal, compute, X, integer_tensor((2, 5, 4), seed=1))
    left = {"aten.pow.Tensor_Scalar", "aten.neg.default", "aten.squeeze.dim"} & set(names)
    assert left == set() or before


def test_a_copy_that_is_written_in_a_list_stays_a_copy(rewrite_equal: Any) -> None:
    """Without it the input would be written."""

    def compute(x: Tensor) -> Tensor:
        copied = x.clone()
        torch._foreach_add_([copied], 1.0)
        return copied.mul_(2) + 1

    normal(rewrite_equal, compute)


def test_reshapes_around_a_flatten_are_one(rewrite_equal: Any) -> None:
    around = Calls(lambda x: x.reshape(2, 12).reshape(4, 6).flatten().reshape(3, 8))
    assert not rewrite_equal(around, [X], passes=(), fill=False).report.misses


def _turned_beside_another(x: Tensor) -> list[Tensor]:
    turned = x.view(6, 4)
    turned.t_()
    return [turned * 1.5, x.view(6, 4) * 2]


def _one_more_dimension(x: Tensor) -> list[Tensor]:
    y = x * 2
    longer = y.view(6, 4)
    longer.unsqueeze_(0)
    return [longer.sum(1), y.view(6, 4).sum(1)]


def _turned_by_itself(x: Tensor) -> Tensor:
    same = x.view(x.shape)
    same.transpose_(0, 1)
    return same * 2


@pytest.mark.parametrize("compute", [_turned_beside_another, _one_more_dimension, _turned_by_itself])
def test_a_graph_that_turns_tensors_in_place_is_left_alone(rewrite_equal: Any, compute: Any) -> None:
    rewritten = rewrite_equal(Calls(compute), [X], passes=(), fill=False)
    assert any("in place" in miss.reason for miss in rewritten.report.misses)
    x = X.clone()
    rewritten.graph_module(x)
    assert x.shape == X.shape


def test_a_write_after_a_detached_view_reaches_the_gradient() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in range(2))
            self.w = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            memory = torch.zeros(6)
            first = memory.detach().view(2, 3)
            second = memory.view(2, 3)
            memory.add_(self.w)
            return (self.a(x) * self.b(x)).sum() + (second * 2).sum() + (first * 5).sum()

    module = Written()
    model = fxfuse.optimize(module, inner="eager")
    model(X[0]).backward()
    assert torch.equal(module.w.grad, torch.full((6,), 2.0))  # type: ignore[arg-type]


STATE_TIMES_WEIGHT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a clone": lambda s, w: s.clone() * w,
    "chosen rows": lambda s, w: s.index_select(0, torch.arange(4)) * w,
    "a stack": lambda s, w: torch.stack([s])[0] * w,
    "parts": lambda s, w: torch.cat(s.split(2)) * w,
    "a reshape of turned rows": lambda s, w: s.view(2, 2).t().reshape(4).reshape(2, 2) * w.view(2, 2),
    "a sign": lambda s, w: -(-s * w),
    "a gate": lambda s, w: F.glu(torch.cat([s, w - w]), 0) * w,
}


@pytest.mark.parametrize("name", STATE_TIMES_WEIGHT)
def test_copies_of_a_state_stay_for_the_backward(name: str) -> None:
    """Which comes when another call has written the state."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(4, 4, bias=False).requires_grad_(False) for _ in range(2))
            self.w = nn.Parameter(torch.ones(4))
            self.register_buffer("state", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.state.add_(x[0])
            return (self.a(x) * self.b(x)).sum() + STATE_TIMES_WEIGHT[name](self.state, self.w).sum()

    module = Counted()
    twin, x = copy.deepcopy(module), torch.ones(2, 4)
    for each in (fxfuse.optimize(module, inner="eager"), twin):
        (each(x) + each(x)).backward()
    assert optimization_report(module).matched and torch.equal(module.w.grad, twin.w.grad)  # type: ignore[arg-type]


def test_a_sum_that_is_written_shows_it_with_its_dimension_back(rewrite_equal: Any) -> None:
    def compute(x: Tensor) -> Tensor:
        total = x.sum(-1)
        kept = total[..., None]
        total.copy_(total.flip(0))
        return kept * 2

    normal(rewrite_equal, compute)


def _partly_doubled(y: Tensor) -> Tensor:
    y[0].mul_(2)
    return y + 1


def test_what_copies_is_kept(rewrite_equal: Any) -> None:
    assert normal(rewrite_equal, lambda x: x.to(torch.float64) + 1)[0].startswith("aten.to.")
    assert normal(rewrite_equal, lambda x: x.transpose(0, 1).contiguous().sum(0))[1].startswith("aten.contig")
    assert "aten.clone.default" in normal(rewrite_equal, lambda x: (x.clone(), x + 1))
    assert "aten.clone.default" in normal(rewrite_equal, lambda x: _partly_doubled(x.clone()))


def test_a_copy_that_nobody_writes_is_none(rewrite_equal: Any) -> None:
    assert normal(rewrite_equal, lambda x: x.clone() + 1) == ["aten.add.Tensor"]
    assert normal(rewrite_equal, lambda x: torch.empty_like(x).copy_(x) + 1) == ["aten.add.Tensor"]


def test_results_in_memory_made_for_them_may_follow_from_each_other(rewrite_equal: Any) -> None:
    def compute(x: Tensor) -> Tensor:
        doubled = torch.add(x, x, out=torch.empty_like(x))
        return torch.mul(doubled, x, out=torch.empty_like(x)) + 1

    assert normal(rewrite_equal, compute) == ["aten.add.Tensor", "aten.mul.Tensor", "aten.add.Tensor"]


def test_what_is_stored_has_the_dtype_and_the_device_of_its_memory(rewrite_equal: Any) -> None:
    names = normal(rewrite_equal, lambda x: torch.empty_like(x, dtype=torch.int32).copy_(x / 2) + 1)
    assert names == ["aten.div.Tensor", "aten.to.dtype", "aten.add.Tensor"]
    elsewhere = rewrite(Calls(lambda x: torch.empty_like(x, device="meta").copy_(x) + 1), [X], passes=())
    assert elsewhere.graph_module(X).is_meta


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: x.view(6, 4),
    "view with -1": lambda x: x.view(-1, 4),
    "reshape": lambda x: x.reshape(6, 4),
    "flatten": lambda x: x.flatten(0, 1),
    "unsafe view": lambda x: torch.ops.aten._unsafe_view.default(x, [6, 4]),
    "two steps": lambda x: x.view(24).reshape(-1, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_change_of_shape_has_one_spelling(rewrite_equal: Any, name: str) -> None:
    calls = normal(rewrite_equal, lambda x: SHAPES[name](x) + 1)
    assert set(calls) <= {"aten.reshape.default", "aten.flatten.using_ints", "aten.add.Tensor"}
    both = normal(rewrite_equal, lambda x: SHAPES[name](x) + x.view(6, 4))
    assert len(both) == len(calls), "the same view was taken twice"


def test_a_view_that_leaves_the_graph_is_still_a_view(rewrite_equal: Any) -> None:
    module = Calls(lambda x: [x.view(6, 4), x.view(2, 3, 4), x.contiguous()])
    rewritten = rewrite_equal(module, [X], passes=(), fill=False)
    first, second, third = rewritten.graph_module(X)
    assert first.data_ptr() == second.data_ptr() == third.data_ptr() == X.data_ptr()
    assert second is not X


def test_a_sum_and_its_kept_form_leave_the_graph_in_one_memory(rewrite_equal: Any) -> None:
    module = Calls(lambda x: (lambda y: [y, y.view(2, 3, 1), y.unsqueeze(-1)])(x.sum(-1)))
    made = rewrite_equal(module, [X], passes=(), fill=False).graph_module(X)
    assert len({y.data_ptr() for y in made}) == 1


W = integer_tensor((4, 4), seed=1)

CHAINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "heads in, heads out": lambda x, w: torch.einsum(
        "bthk,ohk->bto", torch.einsum("bti,hki->bthk", x, w.view(2, 2, 4)), w.view(4, 2, 2)
    ),
    "convolutions of one tap": lambda x, w: F.conv1d(F.conv1d(x.mT, w[:, :, None]), w.unsqueeze(2)).mT,
}


@pytest.mark.parametrize("name", CHAINED)
def test_what_is_spelled_anew_may_be_read_by_the_next(name: str) -> None:
    module = Calls(lambda x, w: CHAINED[name](x, w) @ w)
    rewritten = rewrite(module, [X, W], passes=(), dynamic=False)
    assert torch.equal(module(X, W), rewritten.graph_module(X, W))
    assert targets(rewritten).count("aten.linear.default") == 2


def test_what_nobody_reads_is_dropped(rewrite_equal: Any) -> None:
    assert normal(rewrite_equal, lambda x: [(x * 2).exp().split(1), x + 1][1]) == ["aten.add.Tensor"]


def test_numbers_drawn_that_nobody_reads_are_drawn_all_the_same(rewrite_equal: Any) -> None:
    def compute(x: Tensor) -> Tensor:
        torch.rand(3)
        F.dropout(x, 0.5, training=True)
        return x + torch.rand(4)

    module = Calls(compute)
    rewritten = rewrite(module, [X], passes=())
    torch.manual_seed(0)
    expected = module(X), torch.rand(2)
    torch.manual_seed(0)
    got = rewritten.graph_module(X), torch.rand(2)
    assert all(map(torch.equal, got, expected))


POSITIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    "positions": (lambda c, p, y: c.__setitem__((slice(None), p), y), True),
    "positions along the last dimension": (lambda c, p, y: c.__setitem__((..., p), y.mT), True),
    "added up": (lambda c, p, y: torch.ops.aten.index_put_(c, [None, p], y, True), False),
    "one row for all": (lambda c, p, y: c.__setitem__((slice(None), p), y[:, :1]), False),
    "two indices": (lambda c, p, y: c.__setitem__((p - p, p), y[0]), False),
    "a table of positions": (lambda c, p, y: c.__setitem__((slice(None), p[None]), y[:, None]), False),
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("positions", [[0, 3, 2], [-1, 1, -4]])
def test_a_write_at_positions_is_an_index_copy(name: str, positions: list[int]) -> None:
    write, one_dimension = POSITIONS[name]

    def compute(cache: Tensor, p: Tensor, y: Tensor) -> Tensor:
        write(cache, p, y)
        return cache + 1

    cache = integer_tensor((2, 4, 4) if "last" in name else (2, 5, 4), seed=1)
    given = [cache, torch.tensor(positions), integer_tensor((2, 3, 4), seed=2)]
    rewritten = rewrite(Calls(compute), given, passes=(), dynamic=False)
    theirs, ours = ([x.clone() for x in given] for _ in range(2))
    assert torch.equal(rewritten.graph_module(*ours), compute(*theirs))
    assert torch.equal(ours[0], theirs[0])
    assert not rewritten.report.misses
    assert ("aten.index_copy_.default" in targets(rewritten)) == one_dimension
    assert ("aten.index_put_.default" in targets(rewritten)) != one_dimension


def test_positions_in_memory_of_any_length_count_from_the_front(rewrite_equal: Any) -> None:
    def compute(cache: Tensor, p: Tensor) -> Tensor:
        cache[:, p] = cache[:, : p.shape[0]] * 2
        return cache + 1

    calls = normal(rewrite_equal, compute, integer_tensor((2, 5, 4), seed=1), torch.tensor([-1, 4, -2])[:2])
    assert "aten.index_copy_.default" in calls


def test_a_size_is_asked_of_an_input() -> None:
    def compute(x: Tensor, y: Tensor) -> Tensor:
        joined = torch.cat([x, y], 1) * 2
        return joined.reshape(joined.shape[0] * 2, joined.shape[1], -1) + joined.shape[2]

    module, given = Calls(compute), [X, integer_tensor((2, 2, 4), seed=1)]
    rewritten = rewrite(module, given, passes=())
    assert torch.equal(rewritten.graph_module(*given), module(*given))
    graph = rewritten.graph_module.graph
    asked = graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert asked and any(n.args[0].op == "placeholder" for n in asked)
    assert len({n.args for n in asked}) == len(asked)


def test_asserts_are_kept(rewrite_equal: Any) -> None:
    def compute(x: Tensor) -> Tensor:
        torch._assert_async((x > 0).all(), "not positive")
        return x + 1

    rewritten = rewrite_equal(Calls(compute), [X.abs() + 1], passes=(), fill=False)
    with pytest.raises(RuntimeError, match="not positive"):
        rewritten.graph_module(-X.abs())


# Writes: kept, in order, and visible through every view.


def copy_(x: Tensor, y: Tensor) -> list[Tensor]:
    before = x + 1
    x.copy_(y)
    return [before, x + 1]


def set_item(x: Tensor, y: Tensor) -> list[Tensor]:
    before = x * 2
    x[0, 1:] = y[1, 1:]
    return [before, x * 2]


def out(x: Tensor, y: Tensor) -> list[Tensor]:
    before = x.sum()
    torch.add(x, y, out=x)
    return [before, x.sum()]


def index_put(x: Tensor, y: Tensor) -> list[Tensor]:
    before = x.view(-1) * 1
    x.index_put_((torch.tensor([1]),), y[:1])
    return [before, x.view(-1) * 1]


def through_a_reshape(x: Tensor, y: Tensor) -> list[Tensor]:
    before = x.reshape(-1) + 1
    flat = x.reshape(-1)
    flat[3] = 7
    flat.view(6, 4)[2].mul_(y.view(-1)[:4])
    return [before, x + 1, flat + 1]


def through_an_identity(x: Tensor, y: Tensor) -> list[Tensor]:
    x.contiguous().to(torch.float32).add_(y)
    return [x + 1]


def of_a_temporary(x: Tensor, y: Tensor) -> list[Tensor]:
    z = x * y
    view = z.view(6, 4)
    z.add_(1)
    again = z.view(6, 4)
    view.mul_(2)
    return [view + 0, again + 0, z + 0]


def read_back_the_old_view(x: Tensor, y: Tensor) -> list[Tensor]:
    old = x.view(6, 4)[1:3]
    x.fill_(5)
    return [old + y.view(6, 4)[1:3]]


def unused_result(x: Tensor, y: Tensor) -> list[Tensor]:
    x.unsqueeze(0).transpose(1, 2)[:, 0].sub_(y[:, 0])
    torch._foreach_add_([x, y], 1)
    return [x + y]


WRITES = [
    copy_,
    set_item,
    out,
    index_put,
    through_a_reshape,
    through_an_identity,
    of_a_temporary,
    read_back_the_old_view,
    unused_result,
]


@pytest.mark.parametrize("compute", WRITES)
def test_a_write_is_kept_in_its_place(rewrite_equal: Any, compute: Callable[..., Any]) -> None:
    inputs = X.clone(), integer_tensor((2, 3, 4), seed=1)
    rewritten = rewrite_equal(Calls(compute), inputs, passes=(), fill=False)
    again = [x.clone() for x in inputs]
    rewritten.graph_module(*again)
    assert not torch.equal(again[0], inputs[0]) or compute is of_a_temporary


def test_a_view_of_written_memory_stays_a_view_whatever_a_pass_does_to_its_layout(rewrite_equal: Any) -> None:
    """A reshape would copy where the layout does not allow a view, and the write would be lost."""
    calls = normal(rewrite_equal, lambda x: [x.view(-1).add_(1).sum(), x * 2], X.clone())
    assert "aten.view.default" in calls and "aten.reshape.default" not in calls


def test_a_copy_that_turns_rows_stays_before_a_view_that_is_written(rewrite_equal: Any) -> None:
    """A view of what is computed from it would have no strides to be one."""

    def compute(x: Tensor) -> Tensor:
        y = torch.cat([x.mT]) * 2
        y.view(-1).mul_(2)
        return y @ torch.ones(x.shape[1], 2)

    assert "aten.clone.default" in normal(rewrite_equal, compute, X)


@pytest.mark.parametrize("early", [False, True])
def test_a_stack_is_a_cat_where_no_part_is_written_in_between(rewrite_equal: Any, early: bool) -> None:
    def compute(state: Tensor, x: Tensor) -> Tensor:
        stack = torch.stack([state, x], -2)
        if early:
            state.mul_(2)
        joined = stack.flatten(-2)
        state.copy_(joined[..., 4:])
        return joined * 2

    calls = normal(rewrite_equal, compute, X.clone(), integer_tensor((2, 3, 4), seed=1))
    assert ("aten.cat.default" in calls) is not early


def test_a_write_into_a_cache_through_views_is_not_lost(rewrite_equal: Any) -> None:
    class Cached(Calls):
        def forward(self, *inputs: Any) -> Any:
            new, position = inputs
            cache = torch.ops.aten.alias.default(self.cache)
            before = cache.sum()
            cache[:, 1:2].copy_(new[:, :1])
            cache.view(2, -1)[:, 8:12] = new[:, 1]
            cache.index_copy_(1, position, new[:, 2:])
            heads = cache.view(2, 5, 2, 2).transpose(1, 2)
            return before, heads @ heads.transpose(-1, -2)

    rewritten = rewrite_equal(Cached(lambda: None), [X, torch.tensor([4])], passes=(), fill=False)
    assert rewritten.graph_module.cache.abs().sum() > 0


def test_running_statistics_are_written_though_no_schema_says_so(rewrite_equal: Any) -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x.flatten(0, 1))  # for its statistics alone
            return x + self.norm.running_mean

    rewritten = rewrite_equal(Watched().train(), [X], passes=(), fill=False)
    assert rewritten.graph_module.norm.running_mean.abs().sum() > 0


def test_the_grad_mode_is_what_it_was_after_a_call(rewrite_equal: Any) -> None:
    def compute(x: Tensor) -> Tensor:
        with torch.no_grad():
            return x + 1

    rewritten = rewrite_equal(Calls(compute), [X], passes=(), fill=False)
    rewritten.graph_module(X)
    assert torch.is_grad_enabled()
    assert targets(rewritten) == ["aten.add.Tensor"]


def test_a_constant_without_dimensions_is_a_number(rewrite_equal: Any) -> None:
    compute = Calls(
        lambda x: (torch.tensor(3.0) * (x + torch.tensor(0.5)) - torch.tensor(1.0)) / torch.tensor(2.0)
    )
    graph = rewrite_equal(compute, [X], passes=(), fill=False).graph_module.graph
    numbers = [node.args[1] for node in graph.nodes if node.op == "call_function"]
    assert numbers == [0.5, 3.0, 1.0, 2.0]


def test_constants_of_the_module_stay_in_the_graph(rewrite_equal: Any) -> None:
    normal(rewrite_equal, lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_symbolic_sizes_gain_no_guard() -> None:
    """A guard that a pass adds would make Dynamo compile again for sizes that the graph serves."""

    def compute(x: Tensor, y: Tensor) -> list[Tensor]:
        rows = x.view(-1, 4)
        same = x.reshape(x.shape[0] * x.shape[1], 4)
        return [rows @ y.t(), same.view(x.shape), x.transpose(0, 1).contiguous(), y.view(-1, 4) + 1]

    program = traced(Calls(compute), {}, [X, integer_tensor((6, 4), 1)], Options())
    guards = len(program.fake_mode.shape_env.guards)
    pipeline.apply(program, pipeline.PASSES)
    assert len(program.fake_mode.shape_env.guards) == guards


@pytest.mark.parametrize("multiplier", [1, 2])
def test_as_many_groups_as_rows_are_a_number_and_others_gain_no_guard(multiplier: int) -> None:
    """Inductor guards the number of groups itself."""
    module = nn.Conv1d(3, 3 * multiplier, 2, groups=3)
    run = Calls(lambda x: F.conv1d(x, module.weight, groups=x.shape[1]))
    run.conv = module
    program = traced(run, dict(run.named_parameters()), [X], Options())
    guards = len(program.fake_mode.shape_env.guards)
    rewritten, _ = pipeline.apply(program, ())
    (conv,) = (n for n in rewritten.graph.nodes if str(n.target) == "aten.conv1d.default")
    assert (conv.args[6] == 3) is (multiplier == 1)
    assert len(program.fake_mode.shape_env.guards) == guards + (multiplier == 1)


@pytest.mark.parametrize("flat", [lambda x: x, lambda x: x.reshape(-1, 4), lambda x: x.flatten(0, 1)])
def test_a_vector_added_to_one_of_several_linears_is_no_bias(flat: Callable[[Tensor], Tensor]) -> None:
    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
            self.dt_bias = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(flat(x)) + self.dt_bias).reshape(2, 1, 3) * self.b(x)

    merged = rewrite(Gates(), [torch.randn(2, 1, 4)], passes=["same_input_linears"])
    assert merged.report.matched == 1 and not merged.report.misses
