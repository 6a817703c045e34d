"""Bugs that graph rewriters of other projects had, each on a small graph; see docs/upstream-cases.md."""

import copy
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ROOT
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxfuse
from fxfuse import rewrite
from fxfuse.passes import pipeline, regions, same_input_linears
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.pipeline import PASSES
from fxfuse.passes.program import Program
from fxfuse.runtime.backend import backend
from fxfuse.runtime.optimize import optimization_report
from fxfuse.testing.tensors import integer_like_, integer_tensor

ALL = tuple(each.name for each in PASSES)
H = 8


class Three(nn.Module):
    """q, k and v of one input, given to a function."""

    def __init__(self, then: Callable[..., Any], wide: int = H) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(H, n, bias=False) for n in (wide, H, H))
        self.then = then
        integer_like_(self, seed=1)

    def forward(self, x: Tensor) -> Any:
        return self.then(x, self.q(x), self.k(x), self.v(x))


class Chain(nn.Module):
    """One linear and what a function makes of its output."""

    def __init__(self, width: int, then: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(H, width, bias=False), then
        integer_like_(self, seed=1)

    def forward(self, x: Tensor) -> Any:
        return self.then(self.linear(x))


def undone(result: fxfuse.Rewritten) -> list[str]:
    """The passes that failed, with what they said."""
    return [miss.reason for miss in result.report.misses if "undone" in miss.reason]


def exact(module: nn.Module, x: Tensor | None = None, **options: Any) -> fxfuse.Rewritten:
    """Rewritten by every pass, and equal bit for bit on two lengths."""
    x = integer_tensor((2, 5, H), 0) if x is None else x
    result = rewrite(module, [x], passes=ALL, **options)
    assert undone(result) == []
    with torch.no_grad():
        theirs, ours = module(x.clone()), result.graph_module(x.clone())
    theirs, ours = (t if isinstance(t, tuple) else (t,) for t in (theirs, ours))
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return result


def test_pytorch_99686_a_permuted_cat_is_no_identity() -> None:
    def permuted(y: Tensor) -> Tensor:
        a, b, c = y.split([2, 3, 3], dim=-1)
        return torch.cat([b, a, c], dim=-1) * 2

    for weights in ("auto", "copy"):
        exact(Chain(8, permuted), weights=weights)


def test_pytorch_122379_some_parts_of_a_split_and_one_twice() -> None:
    def some(y: Tensor) -> Tensor:
        a, _, c = y.split([2, 3, 3], dim=-1)
        return torch.cat([c, a, c], dim=-1) * 2

    for weights in ("auto", "copy"):
        exact(Chain(8, some), weights=weights)


def test_pytorch_197080_a_split_that_does_not_divide() -> None:
    exact(Chain(10, lambda y: torch.cat(y.split(4, dim=-1)[::-1], dim=-1) * 2))
    exact(Chain(10, lambda y: torch.cat(y.chunk(4, dim=-1)[::-1], dim=-1) * 2))


def test_pytorch_178676_a_size_of_minus_one_in_a_chain_of_varying_length() -> None:
    def chain(y: Tensor) -> Tensor:
        parts = y.view(y.shape[0], -1, 2, 4).split([1, 3], dim=-1)
        return torch.cat([p.reshape(y.shape[0], y.shape[1], -1) for p in parts], dim=-1) * 2

    result = exact(Chain(8, chain))
    longer = integer_tensor((2, 9, H), 3)
    with torch.no_grad():
        assert torch.equal(result.graph_module(longer), Chain(8, chain)(longer))


@pytest.mark.parametrize("scale", [None, 0.5, 2.0])
def test_pytorch_174361_the_scale_of_attention_is_kept(scale: float | None) -> None:
    def attention(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads, scale=scale)

    exact(Three(attention))


def test_pytorch_111190_as_many_matches_with_varying_sizes() -> None:
    module = Three(lambda x, q, k, v: (q * 2 + k, v.reshape(x.size(0), x.size(1), 2, 4)))
    counts = [
        rewrite(module, [integer_tensor((2, 5, H), 0)], passes=ALL, dynamic=dynamic).report.matched
        for dynamic in (False, True)
    ]
    assert counts[0] == counts[1] > 0


def test_pytorch_136329_products_and_sums_match_in_any_order_of_passes() -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(H, 4), nn.Linear(H, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.reshape(-1, H)
            return torch.addmm(self.a.bias, rows, self.a.weight.t()) + (
                rows @ self.b.weight.t() + self.b.bias
            )

    result = exact(integer_like_(Spelled(), seed=1))
    assert result.report.matched == 1


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.copy_(x.flip(0)),
        lambda x: x.add_(1),
        lambda x: x.__setitem__((0,), 3.0),
        lambda x: torch.add(x.clone(), 1, out=x),
    ],
    ids=["copy_", "add_", "setitem", "out="],
)
def test_pytorch_101124_a_write_between_two_linears_parts_them(write: Callable[[Tensor], Any]) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(H, 4, bias=False), nn.Linear(H, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            write(x)
            return first * 3 + self.b(x)

    assert exact(integer_like_(Written(), seed=1)).report.matched == 0


def test_pytorch_132932_a_second_run_sees_the_writes_of_the_first() -> None:
    def later(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k.clone()
        k.mul_(2)
        return q + k * v

    once = exact(Three(later))
    again = exact(once.graph_module)
    assert once.report.matched == 1 and again.report.matched == 0


def test_pytorch_159613_a_cat_of_cats() -> None:
    def nested(y: Tensor) -> Tensor:
        a, b, c, d = y.split(2, dim=-1)
        return torch.cat([torch.cat([d, b], dim=-1), torch.cat([c, a], dim=-1)], dim=-1) * 2

    for weights in ("auto", "copy"):
        exact(Chain(8, nested), weights=weights)


def test_onnxscript_2880_a_hundred_runs_give_one_graph() -> None:
    module = Three(lambda x, q, k, v: (q, k, v, torch.cat([v[..., 2:], v[..., :2]], dim=-1) * 2))
    x = integer_tensor((2, 5, H), 0)
    found = {str(rewrite(module, [x], passes=ALL, dynamic=False).graph_module.graph) for _ in range(100)}
    assert len(found) == 1


@pytest.mark.parametrize("start", [-3, -1, 0, 1])
def test_onnxscript_2841_signs_of_literals(start: int) -> None:
    def rolled(y: Tensor) -> Tensor:
        return torch.cat([y[..., start:], y[..., :start]], dim=-1) * 2

    exact(Chain(8, rolled))


def test_onnxscript_2402_a_rotation_of_a_quarter() -> None:
    def quarter(y: Tensor) -> Tensor:
        turning, rest = y[..., :2], y[..., 2:]
        half = torch.cat([-turning[..., 1:], turning[..., :1]], dim=-1)
        return torch.cat([turning * 3 + half * 2, rest], dim=-1)

    exact(Chain(8, quarter))


def test_vllm_48671_two_layers_of_different_heads_each_by_its_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Three(lambda x, q, k, v: q + k * v)
            self.second = Three(lambda x, q, k, v: (q.unflatten(-1, (4, 4)).sum(-1), k + v), wide=16)

        def forward(self, x: Tensor) -> Any:
            return self.second(self.first(x).clamp(-2, 2))

    result = exact(Two())
    assert sorted(target.shape[0] for target in result.plan.targets) == [24, 32]


def test_vllm_48330_a_norm_in_two_dtypes_keeps_its_arithmetic() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float()
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (normed * (1.0 + self.weight)).to(torch.bfloat16)

    torch.manual_seed(0)
    module, x = Norm(), torch.randn(2, 5, H).bfloat16()
    result = rewrite(module, [x], passes=ALL)
    got = result.graph_module(x)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), module(x).float(), rtol=2**-7)


def test_liger_74_a_weight_of_zero_passes_the_signal() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(H), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)

    torch.manual_seed(0)
    x = torch.randn(2, 5, H)
    result = rewrite(Norm(), [x], passes=("rms_norm",))
    assert result.report.matched == 1
    assert torch.allclose(result.graph_module(x), Norm()(x), rtol=1e-5)
    assert result.graph_module(x).abs().min() > 0


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 4), (4, 1)])
def test_vllm_36329_few_outputs(sizes: tuple[int, int]) -> None:
    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = (nn.Linear(H, n, bias=False) for n in sizes)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.b(x) * 2, self.a(x) * 3

    assert exact(integer_like_(Few(), seed=1)).report.matched == 1


@pytest.mark.parametrize("rows", [1, 2, 11, 12, 64])
def test_rapid_mlx_2159_integers_are_equal_for_every_number_of_rows(rows: int) -> None:
    module = Three(lambda x, q, k, v: q + k * 2 + v * 3)
    exact(module, integer_tensor((1, rows, H), rows))


def test_sglang_30761_what_is_derived_is_a_parameter_of_the_result() -> None:
    result = exact(Three(lambda x, q, k, v: q + k + v))
    plain = [name for name, value in vars(result.graph_module).items() if isinstance(value, Tensor)]
    assert plain == []
    assert {t.name for t in result.plan.targets} <= set(result.graph_module.state_dict())


def test_pytorch_103990_weights_may_be_exchanged_and_exchanged_back() -> None:
    module = Three(lambda x, q, k, v: q + k + v).requires_grad_(False)
    a = {n: t.clone() for n, t in module.state_dict().items()}
    b = {n: t + 1 for n, t in a.items()}
    x = integer_tensor((2, 5, H), 0)
    compiled = torch.compile(module, backend="fxfuse", options={"inner": "eager", "report": "off"})
    with torch.no_grad():
        outputs = []
        for state in (a, b, a):
            module.load_state_dict(state)
            outputs.append((compiled(x), module(x)))
    assert all(torch.equal(got, expected) for got, expected in outputs)
    assert torch.equal(outputs[0][0], outputs[2][0]) and not torch.equal(outputs[0][0], outputs[1][0])


def test_pytorch_168373_one_backend_object() -> None:
    from torch._dynamo.backends.registry import lookup_backend

    assert lookup_backend("fxfuse") is lookup_backend("fxfuse") is backend


def test_vllm_32710_strided_parts_are_what_the_next_operator_needs() -> None:
    def strided(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return q.view(-1, 4), k.contiguous(), torch.as_strided(v, (2, 5, 8), (40, 8, 1))

    exact(Three(strided))


@pytest.mark.parametrize("kept", ["attribute", "detached attribute", "buffer", "list"])
def test_sglang_22057_a_view_of_a_weight_that_the_module_keeps_is_never_stale(kept: str) -> None:
    """Packing moves a parameter, and would leave a view of its old memory with the values of that day."""

    class Viewed(Three):
        def __init__(self) -> None:
            super().__init__(lambda x, q, k, v: q + k + v)
            self.requires_grad_(False)
            view = self.q.weight.view(4, 16)
            if kept == "attribute":
                self.view = view
            elif kept == "detached attribute":
                self.view = view.detach()
            elif kept == "buffer":
                self.register_buffer("view", view.detach())
            else:
                self.views = [view]

        def forward(self, x: Tensor) -> Tensor:
            view = self.views[0] if kept == "list" else self.view
            return super().forward(x) * view.sum()

    plain, model, x = (
        Viewed(),
        fxfuse.optimize(Viewed(), inner="eager", report="off"),
        integer_tensor((2, 5, H), 0),
    )
    with torch.no_grad():
        for step in range(3):
            assert torch.equal(model(x), plain(x))
            for parameter in (*plain.parameters(), *model.parameters()):
                parameter.add_(step + 1)
    report = optimization_report(model)
    assert report is not None and report.matched == 1 and report.calls == 3
    assert [miss.where for miss in report.misses if "shares memory with view" in miss.reason] == ["q"]


def float_close(module: nn.Module, given: list[Tensor], **options: Any) -> fxfuse.Rewritten:
    """Rewritten, no pass undone, and equal but for the last digits."""
    result = rewrite(module, given, **{"passes": ALL, "dynamic": False, **options})
    assert undone(result) == []
    with torch.no_grad():
        expected, got = module(*(x.clone() for x in given)), result.graph_module(*(x.clone() for x in given))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    return result


@pytest.mark.parametrize("heads", ["repeated", "grouped", "alike"])
@pytest.mark.parametrize("scale", [None, 0.5, -2.0])
def test_pytorch_174361_the_scale_of_one_query_is_kept(scale: float | None, heads: str) -> None:
    """Attention of one query is written anew, on a CPU as reductions, else with the heads as rows."""

    class One(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            if heads == "repeated":
                k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=heads == "grouped"
            )

    torch.manual_seed(0)
    few = 4 if heads == "alike" else 2
    given = [torch.randn(2, 4, 1, 8), torch.randn(2, few, 7, 8), torch.randn(2, few, 7, 8)]
    mask = torch.rand(2, 1, 1, 7) > 0.4
    mask[0] = False  # a row of padding alone
    assert float_close(One(), [*given, mask]).report.matched == 1


def _norm(x: Tensor, w: Tensor, change: str) -> Tensor:
    square = x.pow(3 if change == "power" else 2)
    mean = square.sum(-1, keepdim=True) / (7 if change == "width" else H)
    if change == "dimension":
        mean = square.mean(-2, keepdim=True)
    root = (mean + (1e-2 if change == "epsilon" else 1e-6)).pow(-0.25 if change == "root" else -0.5)
    return x * root * ((2.0 if change == "offset" else 1.0) + w)


def _gate(x: Tensor, w: Tensor, change: str) -> Tensor:
    gate = x.flip(0)
    if change == "rate":
        return x * torch.sigmoid(2.0 * gate)
    return x * F.silu(gate) * (1.5 if change == "factor" else 1.0)


def _decay(x: Tensor, w: Tensor, change: str) -> Tensor:
    """The gates of a delta rule, which are looked for behind one."""
    beta, threshold = {"beta": (2.0, 20.0), "threshold": (1.0, 0.5)}.get(change, (1.0, 20.0))
    g = -(w * (2 if change == "speed" else 1)).exp() * F.softplus(x + w, beta=beta, threshold=threshold)
    k = F.normalize(x, dim=-1)[..., None].expand(*x.shape, 4).contiguous()
    rate = (x * (0.5 if change == "rate" else 1.0)).sigmoid()
    return torch.ops.fxfuse.chunk_gated_delta_rule(k, k, k * 2, g, rate, None, True)[0]  # type: ignore[no-any-return]


LITERALS = [
    *(
        (_norm, "rms_norm", change)
        for change in ("", "power", "width", "dimension", "epsilon", "root", "offset")
    ),
    *((_gate, "swiglu", change) for change in ("", "rate", "factor")),
    *((_decay, "gdn_gates", change) for change in ("", "beta", "threshold", "speed", "rate")),
]


@pytest.mark.parametrize(("formula", "name", "change"), LITERALS)
def test_pytorch_174361_no_number_of_a_formula_is_ignored(
    formula: Callable[..., Tensor], name: str, change: str
) -> None:
    class Formula(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H) / 4, requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return formula(x, self.weight, change)

    torch.manual_seed(0)
    result = float_close(Formula(), [torch.randn(2, 5, H)], target="cuda")
    found = {match.rule for match in _matches(result)}
    # an epsilon is an argument of the operator, a factor stays outside, and a sum or product of the weight
    # alone is another weight; every other number makes another formula
    outside = ("", "epsilon", "factor", "offset", "speed", *(["rate"] if name == "gdn_gates" else []))
    assert (name in found) == (change in outside), found


def _matches(result: fxfuse.Rewritten) -> list[Any]:
    return [match for outcome in result.report.graphs[0].outcomes.values() for match in outcome.matches]


class _Prologue(nn.Module):
    """Attention with norms and rotation in front of it, of any geometry over 32 features."""

    def __init__(self, heads: int, few: int, rotary: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.heads, self.few, self.rotary, self.epsilon = heads, few, rotary, epsilon
        self.head = 32 // heads
        self.q, self.k, self.v = (nn.Linear(H, n * self.head, bias=False) for n in (heads, few, few))
        self.q_norm, self.k_norm = (nn.Parameter(torch.randn(self.head) / 4) for _ in "qk")
        self.requires_grad_(False)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * (1.0 + weight)

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turning, rest = x[..., : self.rotary], x[..., self.rotary :]
        a, b = turning.chunk(2, dim=-1)
        return torch.cat([turning * cos + torch.cat([-b, a], dim=-1) * sin, rest], dim=-1)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q = self._normed(self.q(x).unflatten(-1, (self.heads, self.head)), self.q_norm).transpose(1, 2)
        k = self._normed(self.k(x).unflatten(-1, (self.few, self.head)), self.k_norm).transpose(1, 2)
        v = self.v(x).unflatten(-1, (self.few, self.head)).transpose(1, 2)
        cos, sin = angles.cos(), angles.sin()
        q, k = self._rotated(q, cos, sin), self._rotated(k, cos, sin)
        k, v = (t.repeat_interleave(self.heads // self.few, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _angles(rotary: int) -> Tensor:
    half = torch.randn(1, 1, 5, rotary // 2)
    return torch.cat([half, half], dim=-1)


@pytest.mark.parametrize("rotary", [2, 4, 8])
def test_onnxscript_2402_rotation_is_found_whole_and_partial(rotary: int) -> None:
    torch.manual_seed(0)
    result = float_close(_Prologue(4, 2, rotary), [torch.randn(2, 5, H), _angles(rotary)], target="cuda")
    assert "qk_norm_rope_gate" in {match.rule for match in _matches(result)}


def test_vllm_48671_attention_of_one_width_and_different_heads_each_by_its_own() -> None:
    """Heads 4·8 and 2·16 have projections of one shape, and another epsilon tells the last from the first."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [_Prologue(4, 2, 4), _Prologue(2, 1, 4), _Prologue(4, 2, 4, epsilon=1e-3)]
            )
            self.out = nn.ModuleList([nn.Linear(32, H, bias=False) for _ in self.layers])
            self.requires_grad_(False)

        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            for layer, out in zip(self.layers, self.out, strict=True):
                x = x + out(layer(x, angles))
            return x

    torch.manual_seed(0)
    result = float_close(Layers(), [torch.randn(2, 5, H), _angles(4)], target="cuda")
    assert [match.rule for match in _matches(result)].count("qk_norm_rope_gate") == 3


WIDTHS = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtypes", itertools.product(WIDTHS, repeat=3), ids=str)
def test_vllm_48330_a_sum_and_its_norm_in_several_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    """Activation, residual and weight; the weight's sum with 1 is float32, and the result what it was."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(H, dtype=dtypes[2]), requires_grad=False)

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            wide = total.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return (wide * (1.0 + self.weight.float())).type_as(x), total * 1

    torch.manual_seed(0)
    module, given = Block(), [torch.randn(2, 5, H, dtype=d) for d in dtypes[:2]]
    result = rewrite(module, given, passes=ALL, target="cuda", dynamic=False)
    assert _matches(result)
    exact = copy.deepcopy(module).double()(*(x.double() for x in given))
    for got, own, true in zip(result.graph_module(*given), module(*given), exact, strict=True):
        assert got.dtype == own.dtype
        errors = [(y.double() - true).square().mean().sqrt() for y in (got, own)]
        assert errors[0] <= 1.1 * errors[1] + 1e-6


def test_vllm_41972_a_norm_without_a_residual_is_given_none() -> None:
    """The call with a residual was given `empty_like` for the one that was not there. Buffers of kernels
    are filled with NaN in runtime/ops/kernels/conftest.py."""

    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.randn(H), requires_grad=False) for _ in "12")

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            first = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.first)
            total = x + first
            second = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.second)
            return second, total * 2

    torch.manual_seed(0)
    result = float_close(Norms(), [torch.randn(2, 5, H)], target="cuda")
    called = [str(node.target) for node in result.graph_module.graph.nodes]
    norms = [name for name in called if "rms_norm" in name or "empty" in name]
    assert norms == ["fxfuse.rms_norm.default", "fxfuse.add_rms_norm.default"]


def test_pytorch_132932_a_write_that_a_pass_puts_in_is_seen_by_the_next() -> None:
    def put_in(program: Program) -> Outcome:
        _, k, _ = program.calls("aten.linear.default")
        with program.graph.inserting_before(k):
            regions.call(program, k, torch.ops.aten.add_.Tensor, k.args[0], 1)
        return Outcome(matches=[Match("put_in", "", (), "")])

    module, x = Three(lambda x, q, k, v: q + k * 2 + v * 3), integer_tensor((2, 5, H), 0)
    passes = (pipeline.Pass("put_in", put_in), pipeline.Pass("merge", same_input_linears.run))
    result = rewrite(module, [x], passes=passes)
    q, k, v = (n(x) for n in (module.q, lambda x: module.k(x + 1), lambda x: module.v(x + 1)))
    assert torch.equal(result.graph_module(x.clone()), q + k * 2 + v * 3)
    assert [match.members for match in _matches(result) if match.rule == "same_input_linears"] == [
        ("k.weight", "v.weight")
    ]


@pytest.mark.parametrize("pads", [(-1, 3), (3, -1), (-2, -1), (0, 0)])
def test_onnxscript_2841_negative_padding_in_front_of_a_convolution(pads: tuple[int, int]) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(H, H, 4, groups=H, padding=3, bias=False)
            integer_like_(self, seed=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.conv(F.pad(x.transpose(1, 2), pads)))[..., : x.shape[1]] * 2

    module, x = Conv(), integer_tensor((2, 9, H), 0)
    for target in ("cpu", "cuda"):
        float_close(module, [x], target=target)


@pytest.mark.slow
def test_onnxscript_2880_processes_with_other_hashes_give_one_graph() -> None:
    code = """
import torch, fxfuse
from torch import nn
from fxfuse.passes.pipeline import PASSES
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in "qkvzba"}).requires_grad_(False)
    def forward(self, x):
        q, k, v, z, b, a = (p(x) for p in self.parts.values())
        m = torch.cat([v[..., 2:], v[..., :2]], -1)
        q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True) + 1e-6)
        return q * (1 + a), m * b, k * nn.functional.silu(z)
result = fxfuse.rewrite(Block(), [torch.ones(2, 3, 8)], passes=[p.name for p in PASSES], target="cuda")
print(result.graph_module.graph, result.plan.digest, [str(m) for m in result.report.misses])
"""
    printed = set()
    for seed in ("0", "1", "12345"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        printed.add(run.stdout)
    assert len(printed) == 1


def test_pytorch_111190_idioms_match_with_varying_sizes_as_with_fixed_ones() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.gate, self.up = _Prologue(4, 2, 4), nn.Linear(32, H), nn.Linear(32, H)
            self.weight = nn.Parameter(torch.randn(H))
            self.requires_grad_(False)

        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)
            y = self.attention(normed, angles)
            return x + F.silu(self.gate(y)) * self.up(y)

    torch.manual_seed(0)
    module, given = Layer(), [torch.randn(2, 5, H), _angles(4)]
    found = [float_close(module, given, target="cuda", dynamic=d) for d in (False, True)]
    rules = [sorted(match.rule for match in _matches(result)) for result in found]
    assert rules[0] == rules[1] and len(rules[0]) >= 5


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_vllm_omni_4262_attention_is_asked_for_the_same_kernel(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views of one projection keep the last dimension dense, which the fast kernels need."""
    asked: list[tuple[int, list[int]]] = []
    original = F.scaled_dot_product_attention

    class Seen(torch.fx.Interpreter):
        def call_function(self, function: Any, args: Any, kwargs: Any) -> Any:
            if "scaled_dot_product_attention" in str(function):
                asked.append((torch._fused_sdp_choice(*args, **kwargs), [t.stride(-1) for t in args[:3]]))
            return super().call_function(function, args, kwargs)

    torch.manual_seed(0)
    module, given = _Prologue(2, 2, 4), [torch.randn(2, 5, H), _angles(4)]

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        asked.append((torch._fused_sdp_choice(*args, **kwargs), [t.stride(-1) for t in args[:3]]))
        return original(*args, **kwargs)

    result = rewrite(module, given, passes=ALL, target=target, dynamic=False)
    assert result.report.matched
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    module(*given)
    Seen(result.graph_module).run(*given)
    assert len(asked) == 2 and asked[0] == asked[1] and asked[0][1] == [1, 1, 1]


def test_pytorch_130243_every_operator_is_held_to_torchs_rules_for_operators() -> None:
    """What a compiler may believe of an operator (schema, writes, fake results) `opcheck` compares with
    what it does; an operator that no test gives to it is missed here."""
    names = {
        name.removeprefix("fxfuse::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fxfuse::")
    }
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    checked = {name for name in names if re.search(rf"opcheck\(\s*(torch\.ops\.fxfuse\.)?{name}\b", tests)}
    assert len(names) > 10 and names == checked
    assert not re.search(r"opcheck\([^#]{0,300}?test_utils\s*=", tests), "a test leaves some of the rules out"
    x = torch.randn(2, 3, 12)
    torch.library.opcheck(torch.ops.fxfuse.gather_features, (x, [0, 2, 6, 2], [4]))
    torch.library.opcheck(torch.ops.fxfuse.gather_features, (x, [6, 3, 3, 1, 0, 3, 3, 1], [2, 3]))


def test_pytorch_168373_compiling_anew_with_equal_options_compiles_nothing() -> None:
    module, x = Three(lambda x, q, k, v: q + k + v).requires_grad_(False), integer_tensor((2, 5, H), 0)
    graphs = []
    with torch.no_grad():
        for _ in range(4):
            options = {"inner": "eager", "report": "off"}
            compiled = torch.compile(module, backend="fxfuse", options=options)
            assert torch.equal(compiled(x), module(x))
            graphs.append(counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1


def test_pytorch_97909_and_127173_a_functional_call_computes_with_the_weights_it_is_given() -> None:
    """Those of the module were used instead. They stay as they are, also packed."""
    module, x = Three(lambda x, q, k, v: q + k * v).requires_grad_(False), integer_tensor((2, 5, H), 0)
    plain = copy.deepcopy(module)
    model = fxfuse.optimize(module, inner="eager", report="off")
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        for add in (1, 2):
            given = {name: parameter + add for name, parameter in plain.named_parameters()}
            kept = {name: tensor.clone() for name, tensor in given.items()}
            expected = torch.func.functional_call(plain, given, (x,))
            assert torch.equal(torch.func.functional_call(model, given, (x,)), expected)
            assert all(torch.equal(given[name], tensor) for name, tensor in kept.items())
            assert torch.equal(model(x), plain(x))
        as_parameters = {name: nn.Parameter(p + 3) for name, p in plain.named_parameters()}
        expected = torch.func.functional_call(plain, as_parameters, (x,))
        assert torch.equal(torch.func.functional_call(model, as_parameters, (x,)), expected)
        assert torch.equal(model(x), plain(x))
        assert all(torch.equal(p, dict(plain.named_parameters())[n] + 3) for n, p in as_parameters.items())


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_pytorch_136662_writes_under_a_transform_of_functions(inner: str) -> None:
    """Every second of two equal writes was lost in the gradient that torch.func.grad took."""

    def twice(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0] += x[:, 2].abs()
        y[:, 0] += x[:, 2].abs()
        return y.sum()

    module = Three(lambda x, q, k, v: (q.add_(1) * k + v).sum(-1)).requires_grad_(False)

    def each(xs: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda x: module(x[None])[0]))(xs)

    x = integer_tensor((5, H), 0)
    for function in (torch.func.grad(twice), each):
        compiled = torch.compile(function, backend="fxfuse", options={"inner": inner, "report": "off"})
        assert torch.equal(compiled(x), function(x))


def test_pytorch_120958_and_117496_attributes_and_numbers_of_today_are_used() -> None:
    """An attribute that changed after compiling, and a number given to a call, were those of the first."""

    class Scaled(Three):
        def __init__(self) -> None:
            super().__init__(lambda x, q, k, v: q + k * v)
            self.adapter: nn.Module | None = None
            self.requires_grad_(False)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            y = super().forward(x) * scale
            return y if self.adapter is None else y + self.adapter(x)

    module, x = Scaled(), integer_tensor((2, 5, H), 0)
    plain = copy.deepcopy(module)
    model = fxfuse.optimize(module, inner="eager", report="off")
    adapter = integer_like_(nn.Linear(H, H, bias=False), seed=2).requires_grad_(False)
    with torch.no_grad():
        for scale in (1.0, 2.0, 0.5, 4.0):
            assert torch.equal(model(x, scale=scale), plain(x, scale=scale))
        before = model(x)
        for given in (adapter, None):
            model.adapter = plain.adapter = given
            assert torch.equal(model(x), plain(x))
            assert torch.equal(model(x), before) == (given is None)
