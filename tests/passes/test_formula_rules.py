"""Norms, gates and products become one call each, however they are spelled; what is almost one stays."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse import Rewritten, rewrite

H, EPS = 12, 1e-5
PASSES = ("gated_rms_norm", "rms_norm", "add_rms_norm", "swiglu", "sigmoid_gate")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}
Spelling = Callable[..., Any]


class Spelled(nn.Module):
    """A function of inputs and, last, of one weight."""

    def __init__(self, function: Spelling, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.7, H).to(dtype), requires_grad=False)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, self.weight)


def inputs_of(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, H, generator=generator).to(dtype) for _ in range(count)]


def rewrite_and_compare(function: Spelling, inputs: Sequence[Tensor]) -> Rewritten:
    """The rewritten graph, whose results are the function's up to the roundings of its dtype."""
    dtype = inputs[0].dtype
    module = Spelled(function, dtype)
    found = rewrite(module, inputs, passes=PASSES)
    with torch.no_grad():
        theirs = module(*(x.clone() for x in inputs))
        ours = found.graph_module(*(x.clone() for x in inputs))
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, theirs)), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    return found


def calls(found: Rewritten) -> list[str]:
    names = (str(node.target) for node in found.graph_module.graph.nodes)
    return [name.split(".")[1] for name in names if name.startswith("fxfuse.")]


ZERO_CENTRED: dict[str, Spelling] = {
    "as transformers": lambda x, w: (
        x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w.float())
    ).type_as(x),
    "divided by a root": lambda x, w: x / torch.sqrt(EPS + (x * x).mean(dim=-1, keepdim=True)) * (w + 1),
    "a power": lambda x, w: (x.square().mean(-1, True) + EPS) ** -0.5 * ((1 + w) * x),
    "one over": lambda x, w: (1 + w) * (x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))),
    "a sum": lambda x, w: x * ((x**2).sum(-1, keepdim=True) / H + EPS).rsqrt() * (1 - -w),
    "a sum times": lambda x, w: x * (1 / H * (x * x).sum(-1, keepdim=True) + EPS).pow(-0.5) * (1 + w),
    "torch's own": lambda x, w: F.rms_norm(x, (H,), 1.0 + w, EPS),
    "a weight with dimensions": lambda x, w: (
        (1 + w.view(1, 1, H)).expand(2, 3, H) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    ),
    "copies": lambda x, w: (
        x.contiguous().clone() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (1 + w)
    ).contiguous(),
    "the numerator of a quotient": lambda x, w: (
        (x * (1 + w)) / (x.pow(2).mean(-1, keepdim=True) + EPS) ** 0.5
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", ZERO_CENTRED)
def test_a_norm_is_found_in_every_spelling(spelling: str, dtype: torch.dtype) -> None:
    found = rewrite_and_compare(ZERO_CENTRED[spelling], inputs_of(1, dtype))
    (norm,) = (n for n in found.graph_module.graph.nodes if str(n.target) == "fxfuse.rms_norm.default")
    assert list(norm.args[2:]) == [pytest.approx(EPS), True]
    assert [n.target for n in found.graph_module.graph.nodes if n.op == "call_function"] == [norm.target]


def by_head(x: Tensor) -> Tensor:
    return x.reshape(2, 3, 2, 6).transpose(1, 2).contiguous().transpose(1, 2)


def norm(x: Tensor, eps: float = EPS) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


FOUND: dict[str, tuple[int, Spelling, list[str]]] = {
    "plain": (1, lambda x, w: w * norm(x), ["rms_norm"]),
    "another epsilon": (1, lambda x, w: w * norm(x, 0.125), ["rms_norm"]),
    "of a product": (2, lambda x, y, w: norm(x * y) * (1 + w), ["rms_norm"]),
    "twice": (1, lambda x, w: norm(norm(x) * w) * (1 + w), ["rms_norm", "rms_norm"]),
    "gated": (2, lambda x, z, w: F.silu(z) * (w * norm(x)), ["gated_rms_norm"]),
    "gated by parts": (2, lambda x, z, w: w * (norm(x) * (z * torch.sigmoid(z))), ["gated_rms_norm"]),
    "of a sum": (2, lambda x, y, w: (norm(x + y) * (1 + w), x + y), ["add_rms_norm"]),
    "of a sum that is used": (2, lambda x, y, w: (lambda h: (norm(h) * (1 + w), h))(x + y), ["add_rms_norm"]),
    "silu times": (2, lambda g, u, w: F.silu(g) * u, ["silu_mul"]),
    "sigmoid of itself times": (2, lambda g, u, w: (u * g) * torch.sigmoid(g), ["silu_mul"]),
    "a quotient": (2, lambda g, u, w: u * (g / (1 + torch.exp(-g))), ["silu_mul"]),
    "a gate": (2, lambda x, g, w: x * g.sigmoid(), ["sigmoid_gate_mul"]),
    "a gate as a quotient": (2, lambda x, g, w: x / (1 + (-g).exp()), ["sigmoid_gate_mul"]),
    "a gate by head": (
        2,
        lambda x, g, w: by_head(x + w).flatten(2) * by_head(g * w).flatten(2).sigmoid(),
        ["sigmoid_gate_mul"],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_an_idiom_becomes_its_call(name: str) -> None:
    count, function, expected = FOUND[name]
    assert calls(rewrite_and_compare(function, inputs_of(count))) == expected


def read_twice(x: Tensor, w: Tensor) -> Any:
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x * inverse * (1 + w), inverse


def written_between(x: Tensor, w: Tensor) -> Tensor:
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    x.view(-1).add_(1)
    return x * inverse * w


def written_inside(x: Tensor, w: Tensor) -> Tensor:
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    inverse.add_(1)
    return x * inverse * w


def gated_by_itself(x: Tensor, w: Tensor) -> Tensor:
    normed = norm(x)
    return F.silu(normed) * (normed * w)


def of_two(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * w


LEFT: dict[str, tuple[int, Spelling]] = {
    "an intermediate is read": (1, read_twice),
    "its input is written": (1, written_between),
    "a value inside is written": (1, written_inside),
    "another tensor's mean": (2, of_two),
    "the mean of all": (1, lambda x, w: x * torch.rsqrt(x.pow(2).mean() + EPS) * w),
    "another dimension": (1, lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * w),
    "a sum without its size": (1, lambda x, w: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS) * w),
    "a root too many": (1, lambda x, w: x * torch.rsqrt(torch.sqrt(x.pow(2).mean(-1, True)) + EPS) * w),
    "the mean of cubes": (1, lambda x, w: x * torch.rsqrt(x.pow(3).abs().mean(-1, True) + EPS) * w),
    "two plus the weight": (1, lambda x, w: norm(x) * (2 * (1 + w))),
    "rounded inside to another dtype": (1, lambda x, w: norm(x.half().float()) * w + norm(x).half() * w),
    "a norm gated by itself": (1, gated_by_itself),
    "half a silu": (2, lambda g, u, w: g * torch.sigmoid(2 * g) * u),
    "a broadcast gate": (2, lambda x, g, w: x * torch.sigmoid(g[..., :1])),
    "a tanh": (2, lambda x, g, w: x * torch.tanh(g)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_quite_the_idiom_stays(name: str) -> None:
    count, function = LEFT[name]
    found = rewrite_and_compare(function, inputs_of(count))
    parts = (
        "two plus the weight",
        "half a silu",
        "rounded inside to another dtype",
        "a norm gated by itself",
    )
    if name in parts:
        return  # a part of it is one: what is left computes the same
    assert calls(found) == []


def test_a_gated_norm_of_rows_is_one_of_the_heads_that_they_are() -> None:
    def function(x: Tensor, z: Tensor, w: Tensor) -> Tensor:
        rows, gates = (t[..., 1:-1, :].reshape(-1, H) for t in (x, z))
        return (w * norm(rows) * F.silu(gates)).reshape(2, -1)

    found = rewrite_and_compare(function, inputs_of(2))
    (gated,) = (n for n in found.graph_module.graph.nodes if "gated_rms_norm" in str(n.target))
    assert ["reshape" in str(n.target) for n in gated.args[:2]] == [False, False]


def test_one_gate_for_a_whole_row_is_not_even_a_candidate() -> None:
    found = rewrite_and_compare(lambda x, g, w: x * torch.sigmoid(g[..., :1]), inputs_of(2))
    assert not found.report.misses


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (read_twice, "is used by output outside"),
        (written_between, "writes to what the computation reads"),
        (gated_by_itself, "is read by nothing but"),
    ],
)
def test_what_stays_is_reported_with_its_node_and_the_reason(function: Spelling, reason: str) -> None:
    report = rewrite(Spelled(function, torch.float32), inputs_of(1), passes=PASSES).report
    assert any(reason in miss.reason and miss.node for miss in report.misses)


def test_a_result_that_leaves_the_graph_keeps_its_strides() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return norm(x.transpose(0, 1)) * (1 + w)

    found = rewrite_and_compare(function, inputs_of(1))
    assert calls(found) == []
    reasons = {miss.reason.partition(" ")[2] for miss in found.report.misses}
    assert reasons == {"leaves the graph, or its strides are read"}


def test_a_sum_that_is_read_before_its_norm_stays_a_sum() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> Any:
        total = x + y
        weight = w * total.mean()
        return norm(total) * (1 + w), weight

    found = rewrite_and_compare(function, inputs_of(2))
    assert sorted(calls(found)) in (["add_rms_norm"], ["rms_norm"])


def test_nothing_is_raised_where_gradients_are_wanted() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            return norm(x) * (1 + w)

    found = rewrite(Spelled(function, torch.float32), inputs_of(1), passes=PASSES)
    assert calls(found) == []
    assert any("grad mode" in miss.reason for miss in found.report.misses)
