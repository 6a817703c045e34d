"""Bugs that graph rewriters of other projects had, each on a small graph; see docs/upstream-cases.md."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import rewrite
from fxfuse.passes.pipeline import PASSES
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


def exact(module: nn.Module, x: Tensor | None = None, **options: Any) -> fxfuse.Rewritten:
    """Rewritten by every pass, and equal bit for bit on two lengths."""
    x = integer_tensor((2, 5, H), 0) if x is None else x
    result = rewrite(module, [x], passes=ALL, **options)
    undone = [miss.reason for miss in result.report.misses if "undone" in miss.reason]
    assert undone == []
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
