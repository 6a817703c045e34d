"""What looks like a respelling and is none: dtypes, conjugates, batches and writes in between stay."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxfuse import UnsupportedModelError, rewrite


def conjugated(x: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.reshape(6, 2, 2))
    return torch.view_as_real(torch.view_as_complex(x.reshape(6, 2, 2)) * turned.conj())


def compared_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.lt_(0.5)
    return y + y


def joined_in_place(x: Tensor) -> Tensor:
    return torch.ones_like(x).logical_and_(x > 0) - 0.5


def counted_in_place(x: Tensor) -> Tensor:
    counts = (x > 0).int() * 2
    counts.cumsum_(0)
    return counts * 1


def compared_into(x: Tensor) -> Tensor:
    return torch.lt(x, x * 2, out=torch.empty_like(x)) + 1


def written_indices(x: Tensor) -> Tensor:
    places = torch.arange(3)
    places[0] = 2
    return x.index_select(1, places) + x[:, places]


def written_negative(x: Tensor) -> Tensor:
    y = -x
    y[0] = 5.0
    return (-y) * 2


def zero_minus_counts(x: Tensor) -> Tensor:
    return (0.0 - torch.arange(4)) * 2


def strides_behind_a_product(x: Tensor) -> Tensor:
    return (x.t().reshape(-1).reshape(4, 6) * 2).as_strided((4,), (1,), 0)


def strides_behind_a_cast(x: Tensor) -> Tensor:
    return x.t().index_select(1, torch.arange(2)).to(torch.float64).as_strided((4,), (1,), 0)


def gated_behind_a_write(x: Tensor) -> Tensor:
    rows, gates = x.reshape(2, 3, 4), x.reshape(2, 3, 4) * 0.5
    row, gate = (y.transpose(1, 2).reshape(2, 2, -1) for y in (rows, gates))
    x.add_(1)
    return row * torch.sigmoid(gate) * 2


def summed_up_in_place(x: Tensor) -> Tensor:
    y = x.t().clone()
    y.cumsum_(-1)
    return y * 2


def stored_by_out(x: Tensor) -> Tensor:
    return torch.cumsum(x.t(), -1, out=torch.empty_like(x.t())) * 2


def joined_of_joined(x: Tensor) -> Tensor:
    pair = torch.stack([x[:, :1], x[:, 1:2]], -2).flatten(-2)
    return torch.stack([pair, x[:, 2:]], -2).flatten(-2) * 2


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    joined_of_joined,
    conjugated,
    compared_in_place,
    joined_in_place,
    counted_in_place,
    compared_into,
    written_indices,
    written_negative,
    zero_minus_counts,
    strides_behind_a_product,
    strides_behind_a_cast,
    gated_behind_a_write,
    summed_up_in_place,
    stored_by_out,
]


class Beside(nn.Module):
    """A function, and two linears beside it, so that there is something to rewrite."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.q, self.k = nn.Linear(4, 5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.function(x), self.q(x), self.k(x)


def check(module: nn.Module, x: Tensor, target: str = "cpu") -> None:
    expected = module(x.clone())
    rewritten = rewrite(module, [x.clone()], target=target)
    assert rewritten.report.matched
    for got, wanted in zip(rewritten.graph_module(x.clone()), expected, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_result_is_that_of_eager(function: Callable[[Tensor], Tensor], target: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        check(Beside(function), torch.randn(6, 4), target)


class Batched(Beside):
    def __init__(self, how: str) -> None:
        super().__init__(lambda x: x)
        self.how, self.w = how, nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turned = self.w.t().unsqueeze(0)
        y = x @ turned if self.how == "one" else (x @ turned.expand(3, -1, -1)).sum(0)
        return y, self.q(x), self.k(x)


@pytest.mark.parametrize("how", ["one", "several"])
def test_a_batch_of_one_weight_stays_a_batch(how: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        check(Batched(how), torch.randn(6, 4))


class Autocast(Beside):
    def __init__(self, how: str) -> None:
        super().__init__(lambda x: x)
        self.how, self.w, self.b = how, nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            if self.how == "bias":
                y = F.linear(x, self.w) + self.b
            elif self.how == "mv":
                y = torch.mv(self.w, x[0]) + 1
            else:
                y = torch.zeros(6, 6) * 2
                y.addmm_(x, self.w.t())
        return y, self.q(x), self.k(x)


@pytest.mark.parametrize("how", ["bias", "mv", "in place"])
def test_autocast_casts_what_it_casts_in_eager(how: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        check(Autocast(how), torch.randn(6, 4))


class SwitchedAutocast(Beside):
    def __init__(self) -> None:
        super().__init__(lambda x: x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torch.set_autocast_enabled("cpu", True)
        y = x @ x.t()
        torch.set_autocast_enabled("cpu", False)
        return y, self.q(x), self.k(x)


def test_autocast_that_tracing_would_lose_leaves_the_graph_alone(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module, x = SwitchedAutocast().eval().requires_grad_(False), torch.randn(6, 4)
    with torch.no_grad():
        expected = module(x)
        got = torch.compile(module, backend="fxfuse", options={"inner": "eager", "report": "off"})(x)
    assert [y.dtype for y in got] == [y.dtype for y in expected] == [torch.bfloat16, *[torch.float32] * 2]
    assert "is lost in tracing" in caplog.text


class OneWeight(Beside):
    """A norm with one weight for all channels, which the operator does not take."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.w = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * (1 + self.w)
        return y * 2, self.q(x), self.k(x)


def test_a_norm_that_no_operator_takes_is_reported_and_undoes_nothing() -> None:
    with torch.no_grad():
        rewritten = rewrite(OneWeight(), [torch.randn(6, 4)], target="cuda")
    (reason,) = {miss.reason for miss in rewritten.report.misses if miss.rule == "rms_norm"}
    assert reason.startswith("rms_norm takes x [..., H], weight [H]")


class NormOfANorm(Beside):
    """The key of a delta rule is the norm of its query's norm."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.reshape(1, 6, 2, 2)
        q = rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)
        k = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6)
        gate = x.reshape(1, 6, 2, 2)[..., 0]
        y = torch.ops.fxfuse.chunk_gated_delta_rule(q, k, rows, -gate.abs(), gate.sigmoid(), None, False)[0]
        return y * 2, self.q(x), self.k(x)


def test_a_norm_that_is_computed_from_the_other_undoes_nothing() -> None:
    with torch.no_grad():
        rewritten = rewrite(NormOfANorm(lambda x: x), [torch.randn(6, 4)], target="cuda")
    (reason,) = {miss.reason for miss in rewritten.report.misses if miss.rule == "l2_norm"}
    assert reason.endswith("is read by nothing but what the other is computed from")


def test_a_convolution_under_autocast_stays_one_that_autocast_leaves_alone() -> None:
    class Convolved(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = torch.convolution(x, w, None, [1], [0], [1], False, [0], 4)
            return y * 2

    x, w = torch.randn(1, 4, 9), torch.randn(4, 1, 3)
    with torch.no_grad():
        got, expected = rewrite(Convolved(), [x, w]).graph_module(x, w), Convolved()(x, w)
    assert got.dtype == expected.dtype == torch.float32 and torch.equal(got, expected)


class CastBehindAutocast(Beside):
    """A linear under an autocast of its own, and a cast that does something only because of it."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(lambda x: x)
        self.enabled, self.w = enabled, nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            y = F.linear(x, self.w)
        return y.to(torch.float32 if self.enabled else torch.bfloat16), self.q(x), self.k(x)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_cast_behind_an_autocast_that_the_model_enters_stays(enabled: bool) -> None:
    """Also where the model leaves one that its caller has entered."""
    torch.manual_seed(0)
    module, x = CastBehindAutocast(enabled).eval().requires_grad_(False), torch.randn(6, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
        expected = module(x)
        got = torch.compile(module, backend="fxfuse", options={"inner": "eager", "report": "off"})(x)
    assert [y.dtype for y in got] == [y.dtype for y in expected]
    assert got[0].dtype == (torch.float32 if enabled else torch.bfloat16)
    assert torch.equal(got[0], expected[0])


def test_a_cast_behind_an_autocast_that_a_graph_enters_stays() -> None:
    torch.manual_seed(0)
    root, graph = Beside(lambda x: x).eval().requires_grad_(False), Graph()
    x = graph.placeholder("x")
    entered = graph.call_function(
        torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, False)
    )
    rounded = graph.call_module("q", (x,))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    graph.output((graph.call_method("float", (rounded,)), graph.call_module("q", (x,)), rounded))
    module, given = GraphModule(root, graph), torch.randn(6, 4)
    with torch.no_grad():
        expected, got = module(given), rewrite(module, [given]).graph_module(given)
    assert [y.dtype for y in got] == [torch.float32, torch.float32, torch.bfloat16]
    assert all(map(torch.equal, got, expected))  # nothing is merged: the two run under different modes


def test_an_autocast_is_left_where_tracing_under_it_fails() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.amp.autocast_mode._enter_autocast("cpu", torch.bfloat16, True, False)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        rewrite(Fails(), [torch.randn(6, 4)])
    assert not torch.is_autocast_enabled("cpu")


def test_a_graph_with_an_autocast_that_tracing_would_lose_is_refused() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.set_autocast_enabled, ("cpu", True))
    graph.output(graph.call_function(torch.matmul, (x, x)))
    with pytest.raises(UnsupportedModelError, match="set_autocast_enabled is lost in tracing"):
        rewrite(GraphModule(nn.Module(), graph), [torch.randn(4, 4)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [0.1, 7e4, 3.0])
def test_a_constant_in_front_is_rounded_as_it_was(number: float, dtype: torch.dtype) -> None:
    """A number behind a value keeps its digits; a tensor without dimensions in front of it has its dtype."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            c = torch.tensor(number)
            return c * x, x * c, c + x, x + c

    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for got, expected in zip(rewrite(Scaled(), [x]).graph_module(x), Scaled()(x), strict=True):
        assert torch.equal(got, expected)
