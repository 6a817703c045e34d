"""What looks like a spelling and is none: values that a rule of the normal form must not change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from equality import difference
from torch import Tensor, nn

from fxfuse import rewrite
from fxfuse.testing.tensors import integer_like_, integer_tensor


class Calls(nn.Module):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(4, 8), requires_grad=False)
        self.b = nn.Parameter(torch.empty(4), requires_grad=False)
        self.compute = compute
        integer_like_(self, seed=1)

    def forward(self, x: Tensor) -> Any:
        return self.compute(x, self.w, self.b)


def written_through_a_part(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, 0]
    y.add_(1)
    part.mul_(3)
    return y + 1


def a_list_of_views_before_a_write(x: Tensor) -> Tensor:
    y = x * 2
    parts = y.split(4, dim=-1)
    y.add_(1)
    return parts[0] + parts[1]


def a_written_idle_result(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    y = x * 1
    y.add_(by)
    return y * 2, x * 3


def a_returned_idle_result(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 0
    x.add_(1)
    return y, x


def a_copy_whose_source_is_written(x: Tensor, copy: Callable[[Tensor], Tensor]) -> Tensor:
    y = x * 2
    kept = copy(y)
    y.add_(1)
    return kept * 3 + y


def a_part_is_written(x: Tensor) -> Tensor:
    y = x * 2
    part = y[..., :4]
    part.relu_()
    return y + 1


def the_result_is_read_elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.ones(2, 3, 4)
    before = out + 1
    made = torch.matmul(x, w.t(), out=out)
    return made * 2 + out, before


def written_through_a_detached_part(x: Tensor) -> Tensor:
    y = x * 2
    y.detach()[:, 0].mul_(3)
    return y + 1


def written_constant(x: Tensor) -> Tensor:
    c = torch.tensor(2.0)
    y = x + c
    c.add_(1)
    return y * c


def selected(x: Tensor) -> Tensor:
    return x.index_select(-1, torch.arange(3, 0, -1)) + x.index_select(-1, torch.arange(0, 6, 2))


CASES: dict[str, Callable[..., Any]] = {
    "scaled addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, 8), w.t(), alpha=2),
    "addmm with beta": lambda x, w, b: torch.addmm(b, x.reshape(-1, 8), w.t(), beta=0.5),
    "sum that others read": lambda x, w, b: (lambda y: (y + b, y * 2))(x @ w.t()),
    "scaled bias": lambda x, w, b: torch.add(x @ w.t(), b, alpha=3),
    "einsum into another order": lambda x, w, b: torch.einsum("bti,oi->bot", x, w),
    "einsum that repeats a column": lambda x, w, b: torch.einsum("bti,oi->bto", x[..., :1], w),
    "einsum that sums rows": lambda x, w, b: torch.einsum("bti,oi->bo", x, w),
    "einsum over the rows of w": lambda x, w, b: torch.einsum("bto,oi->bti", x[..., :4], w),
    "x + 2": lambda x, w, b: (x + 2) @ w.t(),
    "x * 3": lambda x, w, b: (x * 3) @ w.t(),
    "x / 2": lambda x, w, b: (x / 2) @ w.t(),
    "1 - x": lambda x, w, b: (1 - x) @ w.t(),
    "0 - x": lambda x, w, b: (0 - x) @ w.t(),
    "a wider type": lambda x, w, b: (x.to(torch.int64) * 1.0) @ w.t(),
    "a broadcast": lambda x, w, b: (x[:1] + torch.zeros_like(x)) @ w.t(),
    "mean, another dimension": lambda x, w, b: x.sum(-1).unsqueeze(0) + x.sum(0).unsqueeze(-1).sum(),
    "sum over two, one back": lambda x, w, b: x.sum((0, 1)).unsqueeze(0),
    "written through a part": lambda x, w, b: written_through_a_part(x),
    "a list of views, then a write": lambda x, w, b: a_list_of_views_before_a_write(x),
    "an idle result that is written": lambda x, w, b: a_written_idle_result(x, 1),
    "an idle result that is returned": lambda x, w, b: a_returned_idle_result(x),
    "index_select in another order": lambda x, w, b: selected(x),
    "index by a range of another step": lambda x, w, b: x[..., torch.arange(0, 6, 2)] * 2,
    "stack joined with another dimension": lambda x, w, b: torch.stack([x, x + 1], 1).flatten(0, 1) * 2,
    "stack joined at the end": lambda x, w, b: torch.stack([x, x + 1], -1).flatten(-2) * 2,
    "repeat of more than one": lambda x, w, b: x[..., :1].repeat(1, 2, 3) * 2,
    "repeat into more dimensions": lambda x, w, b: x.repeat(1, 1, 1, 1) * 2,
    "repeat_interleave of all": lambda x, w, b: x.repeat_interleave(1) * 2,
    "a reshape of a transposed reshape": lambda x, w, b: x.view(6, 8).t().reshape(2, 3, 8) * 2,
    "a copy, then a write": lambda x, w, b: a_copy_whose_source_is_written(x, torch.clone),
    "stored, then a write": lambda x, w, b: a_copy_whose_source_is_written(
        x, lambda y: torch.empty_like(y).copy_(y)
    ),
    "a cat of one, then a write": lambda x, w, b: a_copy_whose_source_is_written(x, lambda y: torch.cat([y])),
    "a stack of one, then a write": lambda x, w, b: a_copy_whose_source_is_written(
        x, lambda y: torch.stack([y])[0]
    ),
    "a selection, then a write": lambda x, w, b: a_copy_whose_source_is_written(
        x, lambda y: y.index_select(0, torch.arange(0, 2))
    ),
    "a part is written in place": lambda x, w, b: a_part_is_written(x),
    "written through a detached part": lambda x, w, b: written_through_a_detached_part(x),
    "a result that is read elsewhere": lambda x, w, b: the_result_is_read_elsewhere(x, w),
    "W @ x.mT that leaves with its strides": lambda x, w, b: ((w @ x.mT).mT * 2, x @ w.t()),
    "a cat of one that leaves with its strides": lambda x, w, b: torch.cat([x.mT]) * 2,
    "W @ x.mT of another x": lambda x, w, b: (w.t() @ x[..., :4].mT).mT @ w.t(),
    "tensordot over other dimensions": lambda x, w, b: (
        torch.tensordot(x[..., :4], w, dims=([2], [0])) @ w.t()
    ),
    "tensordot over two": lambda x, w, b: torch.tensordot(x[0, :1], w[:1], dims=2) + b,
    "scaled baddbmm": lambda x, w, b: torch.baddbmm(b, x, w.t().expand(2, 8, 4), alpha=2, beta=3),
    "baddbmm with a bias of rows": lambda x, w, b: torch.baddbmm(x[..., :4], x, w.t().expand(2, 8, 4)),
    "mv of an input": lambda x, w, b: torch.mv(x[0], w[0]) * 2,
    "subtracted negative that is written": lambda x, w, b: (lambda y: (x - y.mul_(2), y * 1))(-x),
    "integers over -1": lambda x, w, b: x.to(torch.int64) / -1,
    "x ** 3": lambda x, w, b: x.pow(3),
    "convolution with a stride": lambda x, w, b: torch.convolution(
        x, w[:3, None, :2], None, [2], [1], [1], False, [0], 3
    ),
    "transposed convolution": lambda x, w, b: torch.convolution(
        x, w[:3, None, :2], None, [1], [0], [1], True, [0], 3
    ),
    "convolution padded to the same size": lambda x, w, b: torch.conv1d(
        x, w[:3, None, :3], None, 1, "same", 1, 3
    ),
    "dropout in training at rate one": lambda x, w, b: torch.dropout(x, 1.0, True) @ w.t(),
    "a constant that is written": lambda x, w, b: written_constant(x),
    "a constant that leaves": lambda x, w, b: (lambda c: (x + c, c))(torch.tensor(2.0)),
    "a whole constant": lambda x, w, b: x * torch.tensor(3) + torch.tensor(True),
    "a constant of doubles": lambda x, w, b: x * torch.tensor(0.5, dtype=torch.float64),
    "a constant minus x": lambda x, w, b: torch.tensor(2.0) - x,
    "a constant over x": lambda x, w, b: torch.tensor(8.0) / (x.abs() + 1),
    "constants of whole numbers": lambda x, w, b: x.to(torch.int64) + torch.tensor(2.0),
    "constants alone": lambda x, w, b: (torch.tensor(2.0) + torch.tensor(3.0)) * x,
    "a constant twice": lambda x, w, b: (lambda c: c * c * x)(torch.tensor(3.0)),
    "a constant of one element": lambda x, w, b: b.sum() + torch.tensor([2.0]) + x[0, 0, 0],
    "a constant that is no number": lambda x, w, b: (x + torch.tensor(float("inf"))) - torch.tensor(1.0),
    "a scaled constant": lambda x, w, b: torch.add(x, torch.tensor(2.0), alpha=3),
    "a sum, reshaped to another place": lambda x, w, b: x.sum(-1).reshape(1, 2, 3) + x.sum(-1).view(3, 2, 1),
    "a sum, reshaped and written": lambda x, w, b: (lambda y: (y.view(2, 3, 1).mul_(2), y * 1))(x.sum(-1)),
    "a copied transpose that is written": lambda x, w, b: (lambda t: (x @ t, x @ t.mul_(2), t[0] * 1))(
        w.t().contiguous()
    ),
    "a copied transpose of what is written": lambda x, w, b: (
        lambda v: (lambda t: (v.mul_(2), x @ t))(v.t().contiguous())
    )(w * 1),
    "a copied transpose of a batch that is read": lambda x, w, b: (
        lambda t: (torch.bmm(x, t), t[0] * 1, t.stride(1))
    )(w.t().contiguous()[None].expand(2, -1, -1)),
    "a copied transpose on the left": lambda x, w, b: w.t().contiguous() @ x[..., :4].mT,
    "rows put back in other sizes": lambda x, w, b: (
        (x.reshape(6, 8) @ w.t()).view(3, 2, 2, 2) + 1,
        x @ w.t(),
    ),
    "rows put back in other sizes alone": lambda x, w, b: (x.flatten(0, 1) @ w.t()).unflatten(0, (3, 2)) * 2,
    "rows of one row": lambda x, w, b: (x[0, 0].view(1, 8) @ w.t()).view(1, 2, 2) * 2,
    "heads of a weight": lambda x, w, b: torch.einsum("bti,hki->bthk", x, w.view(2, 2, 8)) + 1,
    "heads of a weight that leave": lambda x, w, b: torch.einsum("bti,hki->bthk", x, w.view(2, 2, 8)),
    "heads of a weight first": lambda x, w, b: torch.einsum("bti,hki->bhtk", x, w.view(2, 2, 8)) + 1,
    "heads in another order": lambda x, w, b: torch.einsum("bti,hki->btkh", x, w.view(2, 2, 8)) + 1,
    "columns by heads": lambda x, w, b: (
        torch.einsum("bthk,ohk->bto", x.view(2, 3, 2, 4), w.view(4, 2, 4)) * 2
    ),
    "columns by heads, of one head": lambda x, w, b: (
        torch.einsum("bthk,ohk->bto", x[..., :4].unsqueeze(2), w.view(4, 2, 4)) * 2
    ),
    "columns by heads, turned": lambda x, w, b: (
        torch.einsum("btkh,ohk->bto", x.view(2, 3, 4, 2), w.view(4, 2, 4)) * 2
    ),
    "heads of a column": lambda x, w, b: torch.einsum("bti,hki->bthk", x[..., :1], w.view(2, 2, 8)) + 1,
    "zeros that are written before they are added": lambda x, w, b: (
        lambda z: torch.addmm(z.add_(b), x[0], w.t())
    )(torch.zeros(4)),
    "zeros of more rows": lambda x, w, b: torch.baddbmm(torch.zeros(2, 3, 4), x, w.t().expand(2, 8, 4)),
    "a convolution of one tap that leaves": lambda x, w, b: torch.conv1d(x.mT, w[:, :, None], b) * 2,
    "a convolution of one tap, every other token": lambda x, w, b: (
        torch.conv1d(x.mT, w[:, :, None], b, stride=2).mT @ w
    ),
    "a convolution of one tap in groups": lambda x, w, b: (
        torch.conv1d(x.mT, w[:, :4, None], b, groups=2).mT @ w
    ),
    "a convolution of one tap, padded": lambda x, w, b: (
        torch.conv1d(x.mT, w.unsqueeze(-1), b, padding=1).mT @ w
    ),
    "a convolution of one tap from a part": lambda x, w, b: (
        torch.conv1d(x[..., :4].mT, w[:, :4, None]).mT @ w
    ),
    "a result in memory of its own that leaves": lambda x, w, b: torch.matmul(
        x, w.t(), out=x.new_empty(2, 3, 4)
    ),
    "a result in turned memory that leaves": lambda x, w, b: torch.mul(x, 2, out=torch.empty(2, 8, 3).mT),
    "a result in a part of memory that leaves": lambda x, w, b: torch.mul(
        x, 2, out=torch.zeros(2, 3, 16)[..., :8]
    ),
    "a result in memory that leaves itself": lambda x, w, b: (lambda y: (torch.mul(x, 2, out=y), y))(
        torch.zeros(2, 3, 8)
    ),
    "a result whose strides are read": lambda x, w, b: torch.mul(
        x.transpose(0, 1), 2, out=torch.empty(3, 2, 8)
    ).as_strided((2, 8), (8, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_looks_like_a_spelling_keeps_its_values(name: str) -> None:
    module, x = Calls(CASES[name]), integer_tensor((2, 3, 8), 0)
    rewritten = rewrite(module, [x])
    assert [miss.reason for miss in rewritten.report.misses if "undone" in miss.reason] == []
    assert difference(module, rewritten.graph_module, [x], exact=True) is None


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "a part of other memory like it": lambda y: torch.empty_like(y).copy_(y)[:, :3] * 2,
    "memory like it": lambda y: torch.zeros_like(y) + 1,
    "a cast": lambda y: y.type_as(torch.zeros((), dtype=torch.float64)),
    "turned round": lambda y: y.flip(1),
    "a product by its other name": lambda y: torch.multiply(y, 2),
    "less, by its other name": lambda y: torch.less(y, 2),
    "a choice of a number": lambda y: torch.where(y > 0, y, 0.0),
    "rows chosen": lambda y: y[torch.tensor([1, 0, 1])],
    "sorted": lambda y: y.sort(-1),
    "a part is put": lambda y: torch.slice_scatter(y, y[:1] * 2, 0, 1, 2),
    "added up": lambda y: y.cumsum(1),
    "side by side": lambda y: torch.cat([y, y], 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_laid_out_as_its_input_leaves_with_its_strides(name: str) -> None:
    """Behind a convolution of one tap, whose linear would be turned."""
    module = Calls(lambda x, w, b: KEPT[name](torch.conv1d(x.mT, w[:, :, None], b)))
    x = integer_tensor((2, 3, 8), 0)
    rewritten = rewrite(module, [x])
    assert difference(module, rewritten.graph_module, [x], exact=True) is None


def test_vmap_is_no_obstacle() -> None:
    """Inside vmap a value has no storage to ask for."""

    def masked(x: Tensor) -> Tensor:
        rows = torch.vmap(lambda i: torch.vmap(lambda j: i >= j)(torch.arange(3)))(torch.arange(3))
        return (x @ rows.to(x.dtype)).relu()

    module = Calls(lambda x, w, b: (masked(x[..., :3]), x @ w.t(), x @ w[:2].t()))
    compiled = torch.compile(module, backend="fxfuse", options={"inner": "eager", "report": "off"})
    x = integer_tensor((2, 3, 8), 0)
    assert difference(module, compiled, [x], exact=True) is None
