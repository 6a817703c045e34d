"""Sums and products by another name have one spelling; what only looks like one stays; no bit changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse.testing.tensors import integer_tensor

X, R = integer_tensor((2, 3, 4), seed=1), integer_tensor((2, 3), seed=2)
Compute = Callable[[Tensor, Tensor], Tensor]


class Calls(nn.Module):
    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *inputs: Any) -> Any:
        return self.compute(*inputs)


def normal(rewrite_equal: Any, compute: Callable[..., Any], *inputs: Any) -> list[str]:
    """The calls left after normalising alone, values checked."""
    rewritten = rewrite_equal(Calls(compute), inputs, passes=(), fill=False, dynamic=False)
    return [str(n.target) for n in rewritten.graph_module.graph.nodes if n.op == "call_function"]


def after_a_write(x: Tensor, r: Tensor) -> Tensor:
    both = torch.stack([x, x + 1])
    x.mul_(2)
    return both.sum(0) + x


def signed_before_a_write(x: Tensor, r: Tensor) -> Tensor:
    signed = -x
    x.mul_(2)
    return -(signed * 3) + x


def _turned_glu(x: Tensor) -> Tensor:
    """[1, 2, 4, 3], row by row: of a and b themselves, neither is."""
    return F.glu(torch.cat([x.mT, x.mT * 0], -1))[None] * 2


PLAIN: dict[str, tuple[Compute, str, str]] = {
    "rows": (lambda x, r: torch.einsum("...d,...->...d", x, r) + 1, "aten.einsum", "aten.mul"),
    "the smaller first": (lambda x, r: torch.einsum("bt,btd->btd", r, x) + 1, "aten.einsum", "aten.mul"),
    "outer": (lambda x, r: torch.einsum("btd,bte->btde", x, x) + 1, "aten.einsum", "aten.mul"),
    "matrices": (lambda x, r: torch.einsum("btd,bsd->bts", x, x) + 1, "aten.einsum", "aten.matmul"),
    "matrices, permuted": (
        lambda x, r: torch.einsum("btd,bsd->sbt", x[:, :2], x).contiguous() + 1,
        "aten.einsum",
        "aten.matmul",
    ),
    "columns": (lambda x, r: torch.einsum("bts,bsd->btd", x @ x.mT, x) + 1, "aten.einsum", "aten.matmul"),
    "glu of one": (lambda x, r: F.glu(torch.cat([x, x], -1)).round(), "aten.glu", "aten.silu"),
    "glu of one twice": (
        lambda x, r: F.glu(x[..., None, :].expand(2, 3, 2, 4).flatten(-2)).round(),
        "aten.glu",
        "aten.silu",
    ),
    "glu of two": (lambda x, r: F.glu(torch.cat([x, x + 1], 1), 1).round(), "aten.glu", "aten.sigmoid"),
    "signs": (lambda x, r: -(-x * r[..., None]) + 1, "aten.neg", "aten.mul"),
    "signs of a quotient": (lambda x, r: -(x / -(x + 9)), "aten.neg", "aten.div"),
    "signs of factors of factors": (lambda x, r: -((-x * r[..., None]) * 2) + 1, "aten.neg", "aten.mul"),
    "signs around a cast": (lambda x, r: -((r[..., None] / -(x + 9)).double() * 2), "aten.neg", "aten.div"),
    "a turned glu that is reshaped": (
        lambda x, r: F.glu(torch.cat([x.mT, x.mT + 1], -1)).round().reshape(2, -1),
        "aten.glu",
        "aten.sigmoid",
    ),
    "an order that attention keeps": (
        lambda x, r: F.scaled_dot_product_attention(_turned_glu(x), *[x.mT[None]] * 2).round(),
        "aten.glu",
        "aten.sigmoid",
    ),
    "an order that a product keeps": (
        lambda x, r: torch.einsum("cbdt,d,t->cbdt", _turned_glu(x), x[0, 0], r[0]),
        "aten.glu",
        "aten.sigmoid",
    ),
    "an order that a cut keeps": (lambda x, r: F.pad(_turned_glu(x)[0], (-1, 0)), "aten.glu", "aten.sigmoid"),
    "a stack": (lambda x, r: torch.stack([x, x * 2]).sum(0) + 1, "aten.stack", "aten.add"),
    "full": (lambda x, r: x + torch.full_like(x, 3.0), "aten.full", "aten.add"),
    "ones": (lambda x, r: torch.ones_like(x) / (x + 9), "aten.ones", "aten.reciprocal"),
    "a number in front, rounded": (lambda x, r: torch.tensor(0.1) * (x + 40), "aten.lift_fresh", "aten.mul"),
    "ones for whole numbers": (
        lambda x, r: x.long().add_(torch.ones_like(x.long())),
        "aten.ones",
        "aten.add",
    ),
}
OTHERS: dict[str, tuple[Compute, str]] = {
    "a sum of one of the two": (lambda x, r: torch.einsum("bt,bs->bs", r, r) + 1, "aten.einsum"),
    "a sum over rows": (lambda x, r: torch.einsum("btd,bt->bd", x, r) + 1, "aten.einsum"),
    "a diagonal": (lambda x, r: torch.einsum("btt->bt", x[:, :, :3]) + 1, "aten.einsum"),
    "two sums": (lambda x, r: torch.einsum("btd,btd->b", x, x) + 1, "aten.einsum"),
    "one for all of the batch": (lambda x, r: torch.einsum("btd,bsd->bts", x, x[:1]) + 1, "aten.einsum"),
    "glu of halves of another dimension": (lambda x, r: F.glu(torch.cat([x, x], 0)).round(), "aten.glu"),
    "glu of one next to itself": (
        lambda x, r: F.glu(x[..., None].expand(2, 3, 4, 2).flatten(-2)).round(),
        "aten.glu",
    ),
    "glu of one four times": (
        lambda x, r: F.glu(x[..., None, :].expand(2, 3, 4, 4).flatten(-2)).round(),
        "aten.glu",
    ),
    "glu of unequal parts": (
        lambda x, r: F.glu(torch.cat([x[..., :1], x, x[..., :1]], -1)).round(),
        "aten.glu",
    ),
    "written after it was stacked": (after_a_write, "aten.stack"),
    "written after its sign": (signed_before_a_write, "aten.neg"),
    "more rows than x": (lambda x, r: x[:1] + torch.full((2, 3, 4), 2.0), "aten.full"),
    "a wider dtype": (lambda x, r: x.half() + torch.full_like(x, 0.1), "aten.full"),
    "a sum of three": (lambda x, r: torch.stack([x, x * 2, x * 3]).sum(0) + 1, "aten.stack"),
    "more dimensions than letters": (
        lambda x, r: torch.einsum("...ab,...cb->...ac", *[x.view(*[1] * 8, 2, 3, 4)] * 2) + 1,
        "aten.einsum",
    ),
    "signs of bytes": (lambda x, r: -(-x.byte() / (r[..., None] + 9)), "aten.neg"),
    "signs of bytes that grow": (lambda x, r: -(-x.byte() * r[..., None].int()), "aten.neg"),
    "signs of bytes that become numbers": (lambda x, r: -((-x.byte()).float() * 2), "aten.neg"),
    "one sign of a square": (lambda x, r: -((p := -x * r[..., None]) * p), "aten.neg"),
    "signs of what others read": (lambda x, r: -((y := -x * r[..., None]) * 2) + y.sum(), "aten.neg"),
    "complex ones": (
        lambda x, r: torch.view_as_real(torch.complex(x, x) * torch.ones(4, dtype=torch.complex64)),
        "aten.ones",
    ),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_products_have_one_spelling(rewrite_equal: Any, name: str, dtype: torch.dtype) -> None:
    compute, gone, there = PLAIN[name]
    calls = normal(rewrite_equal, compute, X.to(dtype), R.to(dtype))
    assert not [call for call in calls if call.startswith(gone)]
    assert [call for call in calls if call.startswith(there)]


@pytest.mark.parametrize("number", [2**60 + 1, 2**63 - 1])
def test_large_whole_numbers_are_themselves(rewrite_equal: Any, number: int) -> None:
    calls = normal(rewrite_equal, lambda x: x - torch.full_like(x, number), torch.tensor([1, 2]))
    assert calls == ["aten.sub.Tensor"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_looks_like_one_stays(rewrite_equal: Any, name: str) -> None:
    compute, there = OTHERS[name]
    assert [call for call in normal(rewrite_equal, compute, X, R) if call.startswith(there)]


@pytest.mark.parametrize("dim", [1, -2])
def test_positions_that_are_repeated_are_an_index_copy(rewrite_equal: Any, dim: int) -> None:
    def compute(cache: Tensor, p: Tensor, y: Tensor) -> Tensor:
        cache.scatter_(dim, p.view(1, -1, 1).expand_as(y), y)
        return cache + 1

    given = [integer_tensor((2, 5, 4), seed=1), torch.tensor([3, 0, 2]), X]
    assert "aten.index_copy_.default" in normal(rewrite_equal, compute, *given)


@pytest.mark.parametrize(
    "places",
    [
        lambda p, y: p[:, None, None].expand(-1, 3, 4),
        lambda p, y: p.view(1, -1, 1).repeat(2, 1, 4),
        lambda p, y: p.view(1, -1, 1)[:, 1:2].expand(3, 3, 4),
    ],
)
def test_positions_along_another_dimension_are_scattered(
    rewrite_equal: Any, places: Callable[..., Tensor]
) -> None:
    def compute(cache: Tensor, p: Tensor, y: Tensor) -> Tensor:
        index = places(p, y)
        return cache.scatter_(1, index, y[: index.shape[0]]) + 1

    given = [integer_tensor((3, 5, 4), seed=1), torch.tensor([3, 0, 2]), integer_tensor((3, 3, 4), seed=2)]
    assert "aten.scatter_.src" in normal(rewrite_equal, compute, *given)


def test_a_write_leaves_out_dimensions_of_one_element(rewrite_equal: Any) -> None:
    def compute(cache: Tensor, p: Tensor, y: Tensor) -> Tensor:
        cache[:, :, p] = y
        return cache + 1

    given = [integer_tensor((1, 1, 5, 4), seed=1), torch.tensor([3, 0]), integer_tensor((1, 1, 2, 4), seed=2)]
    assert "aten.index_copy_.default" in normal(rewrite_equal, compute, *given)
