"""A product of few rows becomes a reduction over each row's own expert: only such a one, exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  registers its own grouped product
from torch import Tensor, nn

from fxfuse import Rewritten, rewrite
from fxfuse.passes import expert_rows
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced
from fxfuse.testing.tensors import integer_tensor

PASS = "expert_rows"
OFFSETS = {
    "one for each": [1, 2, 3, 4, 5],
    "some have none": [0, 3, 3, 5, 5],
    "all for the first": [5] * 5,
    "all for the last": [0, 0, 0, 0, 5],
}


class Grouped(nn.Module):
    """transformers' `own` product, or torch's, which takes bfloat16 alone in a graph."""

    def __init__(self, own: bool = True, row_by_row: bool = True) -> None:
        super().__init__()
        shape = (5, 16, 8) if row_by_row else (5, 8, 16)
        self.own, self.row_by_row, self.weight = own, row_by_row, nn.Parameter(torch.empty(shape))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        weight = self.weight.transpose(-2, -1) if self.row_by_row else self.weight
        if self.own:
            return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offsets)
        return F.grouped_mm(x, weight, offs=offsets)


def matches(rewritten: Rewritten) -> list[Any]:
    return rewritten.report.graphs[0].outcomes[PASS].matches


def offsets(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


@pytest.mark.parametrize(
    ("own", "dtype"),
    [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float16), (True, torch.float32)],
)
@pytest.mark.parametrize("ends", OFFSETS.values(), ids=OFFSETS)
def test_each_row_meets_its_expert(
    rewrite_equal: Any, ends: list[int], own: bool, dtype: torch.dtype
) -> None:
    x = integer_tensor((5, 8), 0).to(dtype)
    rewritten = rewrite_equal(Grouped(own).to(dtype), [x, offsets(*ends)], passes=PASS, dynamic=False)
    assert [match.detail for match in matches(rewritten)] == ["5 rows of 5 experts → reduction"]
    targets = {str(node.target) for node in rewritten.graph_module.graph.nodes}
    assert targets.isdisjoint(expert_rows.GROUPED)


def test_offsets_are_read_at_every_call(rewrite_equal: Any) -> None:
    module, x = Grouped(), integer_tensor((5, 8), 0)
    rewritten = rewrite_equal(module, [x, offsets(1, 2, 3, 4, 5)], passes=PASS, dynamic=False)
    for ends in OFFSETS.values():
        assert torch.equal(rewritten.graph_module(x, offsets(*ends)), module(x, offsets(*ends)))


@pytest.mark.parametrize("ends", [(1, 2, 2, 2, 3), (0, 0, 0, 0, 0)])
def test_rows_that_belong_to_nobody_are_zero(rewrite_equal: Any, ends: tuple[int, ...]) -> None:
    """With transformers' loop to compare with: torch's leaves there what was in memory."""
    x = integer_tensor((5, 8), 0)
    rewritten = rewrite_equal(Grouped(), [x, offsets(*ends)], passes=PASS, dynamic=False)
    assert len(matches(rewritten)) == 1


def test_rows_in_another_layout(rewrite_equal: Any) -> None:
    x = integer_tensor((8, 5), 0).t()
    rewritten = rewrite_equal(Grouped(), [x, offsets(1, 2, 3, 4, 5)], passes=PASS, dynamic=False)
    assert len(matches(rewritten)) == 1


@pytest.mark.parametrize("written", [False, True])
def test_a_copy_of_the_weights_is_looked_through_unless_they_are_written(
    rewrite_equal: Any, written: bool
) -> None:
    class Copied(Grouped):
        def forward(self, x: Tensor, offsets: Tensor) -> Any:
            stored = self.weight * 2
            copy = stored.transpose(-2, -1).contiguous()
            if written:
                stored.zero_()
            return torch.ops.transformers.grouped_mm_fallback(x, copy, offs=offsets), stored

    given = [integer_tensor((5, 8), 0), offsets(1, 2, 3, 4, 5)]
    found = matches(rewrite_equal(Copied(), given, passes=PASS, dynamic=False))
    assert len(found) == (0 if written else 1)


@pytest.mark.parametrize("copy", [lambda w: w.clone(), lambda w: w.contiguous()], ids=["clone", "contiguous"])
def test_a_copy_that_is_written_itself_is_read(rewrite_equal: Any, copy: Any) -> None:
    class Edited(Grouped):
        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            weight = copy(self.weight.transpose(-2, -1))
            weight[0].zero_()
            return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offsets)

    rewrite_equal(Edited(), [integer_tensor((5, 8), 0), offsets(1, 2, 3, 4, 5)], passes=PASS, dynamic=False)


@pytest.mark.parametrize("idle", [lambda w: w.neg().neg(), lambda w: w * 1], ids=["negatives", "product"])
def test_experts_in_the_memory_of_one_stay_a_copy(rewrite_equal: Any, idle: Any) -> None:
    """torch's product takes no weights of stride 0, which the copy does not have."""

    class Repeated(Grouped):
        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            weight = idle(self.weight[:1, :1].expand(5, 16, 8))
            return F.grouped_mm(x, weight.transpose(-2, -1), offs=offsets)

    given = [integer_tensor((5, 8), 0).bfloat16(), offsets(1, 2, 3, 4, 5)]
    rewrite_equal(Repeated(False).bfloat16(), given, passes="layout_chains", dynamic=False)


def test_a_product_may_feed_another(rewrite_equal: Any) -> None:
    class Two(Grouped):
        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            weight = self.weight.transpose(-2, -1)
            once = torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offsets)
            return torch.ops.transformers.grouped_mm_fallback(once, weight, offs=offsets)

    given = [integer_tensor((5, 8), 0), offsets(1, 2, 3, 4, 5)]
    module = Two()
    module.weight = nn.Parameter(torch.empty(5, 8, 8))
    assert len(matches(rewrite_equal(module, given, passes=PASS, dynamic=False))) == 2


def test_half_precision_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        module = Grouped().to(dtype)
        nn.init.normal_(module.weight)
        x = torch.randn(5, 8, dtype=dtype)
        got = rewrite(module, [x, offsets(1, 2, 3, 4, 5)], passes=PASS, dynamic=False)
        exact = (module.weight.double() @ x.double().unsqueeze(-1)).squeeze(-1)
        error = (got.graph_module(x, offsets(1, 2, 3, 4, 5)).double() - exact).abs()
        assert bool((error <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all())


def test_many_rows_columns_of_weights_and_varying_rows_stay(rewrite_equal: Any) -> None:
    ends = offsets(1, 2, 3, 4, expert_rows.MOST_ROWS + 1)
    many = integer_tensor((expert_rows.MOST_ROWS + 1, 8), 0)
    assert matches(rewrite_equal(Grouped(), [many, ends], passes=PASS, dynamic=False)) == []
    few, ends = integer_tensor((5, 8), 0), offsets(1, 2, 3, 4, 5)
    assert matches(rewrite_equal(Grouped(row_by_row=False), [few, ends], passes=PASS, dynamic=False)) == []
    assert matches(rewrite_equal(Grouped(), [few, ends], passes=PASS, dynamic=True)) == []


def test_with_gradients_it_stays() -> None:
    module = Grouped()
    given = [integer_tensor((5, 8), 0), offsets(1, 2, 3, 4, 5)]
    program = traced(module, {"weight": module.weight}, given, Options(), dynamic=False)
    program.grad_enabled = True
    assert expert_rows.run(program).matches == []


# The product of weights that are chosen by number with a row for each of them

Compute = Callable[[Tensor, Tensor, Tensor], Any]
TAKEN: dict[str, Compute] = {
    "bmm": lambda w, ids, x: torch.bmm(w[ids], x.unsqueeze(-1)),
    "the row first": lambda w, ids, x: x[:, None] @ w.index_select(0, ids).mT,
    "turned before they are chosen": lambda w, ids, x: x[:, None] @ w.mT[ids],
    "einsum": lambda w, ids, x: torch.einsum("soi,si->so", w[ids], x),
    "sum": lambda w, ids, x: (w[ids] * x[:, None]).sum(-1),
    "half of the rows": lambda w, ids, x: [part @ x[..., None] for part in w[ids].chunk(2, 1)][1],
    "one row for all": lambda w, ids, x: w[ids] @ x[1],
    "numbers in two dimensions": lambda w, ids, x: torch.einsum("tkoi,ti->tko", w[ids.view(2, 2)], x[::2]),
    "both of a pair": lambda w, ids, x: w[ids.view(2, 2)] @ x.view(2, 2, 8, 1),
    "one that is chosen twice": lambda w, ids, x: w[ids * 0] @ x[..., None],
    "counted from the end": lambda w, ids, x: w[ids - 5] @ x[..., None],
}
NOT_TAKEN: dict[str, Compute] = {
    "the columns of square weights": lambda w, ids, x: x[:, None] @ w[:, :8][ids],
    "summed over the chosen": lambda w, ids, x: torch.einsum("soi,si->o", w[ids], x),
    "each with every row": lambda w, ids, x: torch.einsum("soi,ti->sto", w[ids], x),
    "in another order": lambda w, ids, x: torch.einsum("soi,si->os", w[ids], x),
    "by rows in another order": lambda w, ids, x: torch.einsum(
        "stoi,tsi->sto", w[ids.view(2, 2)], x.view(2, 2, 8)
    ),
    "products that are read": lambda w, ids, x: (p := w[ids] * x[:, None]).sum(-1, keepdim=True) + p,
    "of what is no parameter": lambda w, ids, x: x.view(2, 2, 8)[ids[1:3] % 2] @ x[0],
    "doubled in between": lambda w, ids, x: w[ids].mul_(2) @ x[0],
    "of many rows": lambda w, ids, x: w[ids.repeat(9)] @ x[0],
}


class Chosen(Grouped):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return (self.compute(self.weight, ids, x) * 2).contiguous()


IDS = torch.tensor([3, 0, 4, 3])


@pytest.mark.parametrize("name", TAKEN)
def test_chosen_weights_are_read_where_they_lie(rewrite_equal: Any, name: str) -> None:
    x, module = integer_tensor((4, 8), 0), Chosen(TAKEN[name])
    rewritten = rewrite_equal(module, [x, IDS], passes=PASS, dynamic=False)
    assert [match.detail for match in matches(rewritten)] == ["4 rows of 5 experts → reduction"]
    for ids in (IDS.flip(0), IDS * 0 + 2):
        assert torch.equal(rewritten.graph_module(x, ids), module(x, ids))
    assert matches(rewrite(rewritten.graph_module, [x, IDS], passes=PASS, dynamic=False)) == []


def test_a_product_of_chosen_weights_may_feed_another(rewrite_equal: Any) -> None:
    module = Chosen(lambda w, ids, x: torch.einsum("soi,si->so", w[ids], w[ids] @ x[0]))
    module.weight = nn.Parameter(torch.empty(5, 8, 8))
    assert (
        len(matches(rewrite_equal(module, [integer_tensor((4, 8), 0), IDS], passes=PASS, dynamic=False))) == 2
    )


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_other_products_of_chosen_weights_stay(rewrite_equal: Any, name: str) -> None:
    given = [integer_tensor((4, 8), 0), IDS]
    assert matches(rewrite_equal(Chosen(NOT_TAKEN[name]), given, passes=PASS, dynamic=False)) == []


def test_products_of_chosen_weights_stay_where_gradients_are_on() -> None:
    module = Chosen(TAKEN["bmm"])
    given = [integer_tensor((4, 8), 0), IDS]
    program = traced(module, {"weight": module.weight}, given, Options(), dynamic=False)
    program.grad_enabled = True
    assert expert_rows.run(program).matches == []


def test_chosen_weights_in_half_precision_are_summed_in_fp32() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        module = Chosen(TAKEN["sum"]).to(dtype)
        nn.init.normal_(module.weight)
        x = torch.randn(4, 8, dtype=dtype)
        got = rewrite(module, [x, IDS], passes=PASS, dynamic=False)
        exact = 2 * (module.weight.double()[IDS] @ x.double().unsqueeze(-1)).squeeze(-1)
        error = (got.graph_module(x, IDS).double() - exact).abs()
        assert len(matches(got)) == 1
        assert bool((error <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all())
