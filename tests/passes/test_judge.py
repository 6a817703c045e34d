"""What acts on some values only is not taken for nothing because no trial met such values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse import Rewritten, rewrite
from fxfuse.passes.judge import Judge
from fxfuse.passes.regions import Refused

# Each leaves values near zero as they are.
LIMITS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda x: x.clamp(-8, 8),
    "a wide clamp": lambda x: x.clamp(-1e4, 1e4),
    "clamp in place": lambda x: (x * 1).clamp_(max=8),
    "hardtanh": lambda x: F.hardtanh(x, -8, 8),
    "minimum": lambda x: torch.minimum(x, torch.full((), 8.0)),
    "where": lambda x: torch.where(x > 8, 8.0, x),
    "masked_fill": lambda x: x.masked_fill(x > 8, 0.0),
    "nan_to_num": lambda x: x.nan_to_num(0.0),
    "times a comparison": lambda x: x * (x < 8),
    "min": lambda x: torch.min(x, torch.full((), 1e3)),
    "max": lambda x: torch.max(x, torch.full((), -1e3)),
    "times less": lambda x: x * torch.less(x, 1e3),
    "amin": lambda x: torch.stack([x, torch.full_like(x, 1e3)]).amin(0),
    "fmod": lambda x: torch.fmod(x, 1e3),
    "sign": lambda x: x * (1 + torch.sign(1e3 - x)) / 2,
    "leaky_relu": lambda x: 1e3 - F.leaky_relu(1e3 - x, 0.5),
    "elu": lambda x: 1e3 - F.elu(1e3 - x),
    # In front of a value for which the trials are too small these are 0 throughout.
    "relu beyond": lambda x: x - F.relu(x - 1e3),
    "clamp beyond": lambda x: x - (x - 1e3).clamp(min=0),
    "clamp of two beyond": lambda x: x - (x - 1e3).clamp(0, 1e5),
    "clamp_min beyond": lambda x: x - (x - 1e3).clamp_min(0),
    "clamp_max beyond": lambda x: x + (1e3 - x).clamp_max(0),
    "threshold beyond": lambda x: x - F.threshold(x - 1e3, 0, 0),
    "maximum beyond": lambda x: x - torch.maximum(x - 1e3, torch.zeros(())),
    "leaky_relu beyond": lambda x: x - F.leaky_relu(x - 1e3, 0.0),
}


class Attention(nn.Module):
    """Query and key limited between projection and norm, as models with clip_qkv have it."""

    def __init__(self, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.limit = limit
        self.q, self.k, self.v = (nn.Linear(32, n, bias=False) for n in (32, 16, 16))
        self.q_norm, self.k_norm = (nn.Parameter(torch.randn(8)) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def turned(x: Tensor, heads: int, weight: Tensor) -> Tensor:
            x = x.unflatten(-1, (heads, 8))
            x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)).transpose(1, 2)
            a, b = x.chunk(2, -1)
            return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

        q = turned(self.limit(self.q(x)), 4, self.q_norm)
        k = turned(self.limit(self.k(x)), 2, self.k_norm)
        v = self.v(x).unflatten(-1, (2, 8)).transpose(1, 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Convolution(nn.Module):
    """A causal convolution by hand, with limited taps."""

    def __init__(self, limit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.limit, self.weight = limit, nn.Parameter(torch.randn(8, 4) * 30)

    def forward(self, x: Tensor) -> Tensor:
        y = (F.pad(x, (3, 0)).unfold(2, 4, 1) * self.limit(self.weight)[:, None]).sum(-1)
        return F.silu(y).transpose(1, 2).contiguous() @ torch.eye(8)  # shows no strides


def rules(rewritten: Rewritten) -> set[str]:
    return {
        match.rule
        for graph in rewritten.report.graphs
        for o in graph.outcomes.values()
        for match in o.matches
    }


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_a_limit_between_projection_and_norm_stays(limit: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, cos, sin = torch.randn(2, 5, 32) * 100, torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    x[0, 0] = 1e6
    module = Attention(limit)
    rewritten = rewrite(module, [x, cos, sin], target="cuda")
    assert "qk_norm_rope_gate" not in rules(rewritten)
    with torch.no_grad():
        torch.testing.assert_close(rewritten.graph_module(x, cos, sin), module(x, cos, sin))


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
def test_a_limit_of_the_taps_of_a_convolution_stays(limit: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 8, 11, generator=torch.Generator().manual_seed(0)) * 30
    module = Convolution(limit)
    with torch.no_grad():
        module.weight[0, 0] = 1e6
    rewritten = rewrite(module, [x], target="cuda")
    with torch.no_grad():
        torch.testing.assert_close(rewritten.graph_module(x), module(x))


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_what_few_values_show_takes_more_trials(heads: int) -> None:
    """A softplus by hand: of a single head one value in four is beyond its threshold."""

    class Gates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_log, self.dt_bias = (nn.Parameter(torch.randn(heads)) for _ in range(2))

        def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Any:
            x = a.float() + self.dt_bias
            softplus = torch.where(x > 20, x, torch.log1p(torch.exp(x)))
            g = -self.a_log.float().exp() * softplus
            return torch.ops.fxfuse.chunk_gated_delta_rule(q, k, v, g, b.sigmoid(), None, True)

    inputs = [*torch.randn(3, 1, 1, heads, 4), *torch.randn(2, 1, 1, heads)]
    assert "gdn_gates" in rules(rewrite(Gates(), inputs, target="cuda", dynamic=False))


def test_an_argument_that_is_computed_from_another_is_refused() -> None:
    class Gates(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, rate: Tensor, bias: Tensor) -> Any:
            softplus = F.softplus(a + bias)
            g, beta = -rate.exp() * softplus, softplus.sigmoid()
            return torch.ops.fxfuse.chunk_gated_delta_rule(q, k, v, g, beta, None, True)

    inputs = [*torch.randn(3, 1, 1, 2, 4), torch.randn(1, 1, 2), *torch.randn(2, 2)]
    report = rewrite(Gates(), inputs, target="cuda", dynamic=False).report
    assert [miss.reason for miss in report.misses] == ["one of its inputs is computed from another"]


def judged(
    function: Callable[[Tensor], Tensor], candidate: Callable[[Tensor], Tensor], values: int = 64
) -> bool:
    """What the judge says of a candidate for all that a function calls."""
    graph = make_fx(function, pre_dispatch=True)(torch.ones(values)).graph
    (x,) = graph.find_nodes(op="placeholder")
    for node in graph.nodes:
        node.meta["val"] = torch.empty(values)
    region = [node for node in graph.nodes if node.op == "call_function"]
    return Judge().equal(region, region[-1:], lambda given: [candidate(given[x])], "candidate")


SOFTPLUS: dict[str, Callable[[Tensor], Tensor]] = {
    "one bound": lambda x: x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())),
    "one bound, first of two": lambda x: x.clamp(0, None) + torch.log1p(torch.exp(-x.abs())),
    "max": lambda x: torch.max(x, torch.zeros(())) + torch.log1p(torch.exp(-x.abs())),
    "relu": lambda x: x.relu() + torch.log1p(torch.exp(-x.abs())),
    "a guard against infinity": lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x.clamp(max=20)))),
    "either way": lambda x: torch.where(x > 0, x + torch.log1p(torch.exp(-x)), torch.log1p(torch.exp(x))),
}


@pytest.mark.parametrize("values", [1, 64])
@pytest.mark.parametrize("softplus", SOFTPLUS.values(), ids=SOFTPLUS)
def test_limits_that_are_part_of_a_formula_are_no_obstacle(
    softplus: Callable[[Tensor], Tensor], values: int
) -> None:
    assert judged(softplus, F.softplus, values)


@pytest.mark.parametrize("threshold", [2, 5, 8])
def test_a_softplus_with_another_threshold_is_another(threshold: float) -> None:
    assert not judged(lambda x: F.softplus(x, 1, threshold), F.softplus)
    assert judged(lambda x: F.softplus(x, 1, 20), F.softplus)


def test_what_is_left_out_hands_on_no_memory() -> None:
    """A write to it would reach the value that went in."""
    with pytest.raises(Refused, match="acts on values that no trial has"):
        judged(lambda x: torch.nan_to_num(x).mul_(2) + x, lambda x: 3 * x)
    with pytest.raises(Refused, match="acts on values that no trial has"):
        judged(lambda x: torch.maximum(x, torch.full((), -1e4)).mul_(2) + x, lambda x: 3 * x)


# Of the rate -exp(A_log), which the product with a softplus hides where either is large: decays are 1 or 0.
RATE_LIMITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "clamp_min": lambda x, c: x.clamp_min(c),
    "either bound": lambda x, c: x.clamp(c, -1e-3),
    "maximum": lambda x, c: torch.maximum(torch.full((), c), x),
    "where": lambda x, c: torch.where(x < c, c, x),
    "masked_fill": lambda x, c: x.masked_fill(x < c, c),
    "times a comparison": lambda x, c: x * (x > c),
}


@pytest.mark.parametrize("limit", RATE_LIMITS.values(), ids=RATE_LIMITS)
@pytest.mark.parametrize("least", [-3.0, -8.0, -20.0])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_limit_that_acts_and_does_not_show_is_tried_until_it_shows(
    limit: Callable[[Tensor, float], Tensor], least: float, heads: int
) -> None:
    graph = make_fx(lambda a, x: (limit(-a.exp(), least) * F.softplus(x)).exp())(*torch.ones(2, heads)).graph
    a, x = graph.find_nodes(op="placeholder")
    for node in graph.nodes:
        node.meta["val"] = torch.empty(heads)
    region = [node for node in graph.nodes if node.op == "call_function"]

    def without(values: Any) -> list[Tensor]:
        return [(-values[a].exp() * F.softplus(values[x])).exp()]

    assert not Judge().equal(region, region[-1:], without, "without the limit")

    def with_it(values: Any) -> list[Tensor]:
        return [(limit(-values[a].exp(), least) * F.softplus(values[x])).exp()]

    assert Judge().equal(region, region[-1:], with_it, "with the limit")


@pytest.mark.parametrize("bound", [5.0, 20.0])
@pytest.mark.parametrize("values", [1, 2, 3, 4, 8])
def test_a_limit_that_a_large_factor_hides_is_tried_beside_a_small_one(values: int, bound: float) -> None:
    graph = make_fx(lambda x, y, z: (x.clamp(-bound, bound) * y).sigmoid() + z)(*torch.ones(3, values)).graph
    x, y, z = graph.find_nodes(op="placeholder")
    for node in graph.nodes:
        node.meta["val"] = torch.empty(values)
    region = [node for node in graph.nodes if node.op == "call_function"]

    def without(given: Any) -> list[Tensor]:
        return [(given[x] * given[y]).sigmoid() + given[z]]

    assert not Judge().equal(region, region[-1:], without, "without the limit")


# On no list: each is a polynomial of small values, and another function of large ones.
UNLISTED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "hardswish": (lambda x: F.hardswish(x), lambda x: x * (x + 3) / 6),
    "hardsigmoid": (lambda x: F.hardsigmoid(x), lambda x: (x + 3) / 6),
    "renorm": (lambda x: torch.renorm(x[None], 2, 0, 20.0)[0], lambda x: x),
}


@pytest.mark.parametrize("values", [1, 4])
@pytest.mark.parametrize("name", UNLISTED)
def test_an_operator_on_no_list_is_tried_at_other_magnitudes(name: str, values: int) -> None:
    function, small = UNLISTED[name]
    assert judged(function, function, values)
    assert not judged(function, small, values)


WHOLE: dict[
    str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
] = {
    "a mask": (torch.bool, lambda x, m: x * ~m, lambda x, m: x),
    "a mask that is added": (torch.bool, lambda x, m: x - 1e9 * m.to(x.dtype), lambda x, m: x),
    "a mask by product": (torch.bool, lambda x, m: x * m, lambda x, m: x * 0),
    "a number": (torch.int64, lambda x, n: x + n, lambda x, n: x),
    "a small number": (torch.int32, lambda x, n: x * (n + 1), lambda x, n: x),
    "chosen rows": (torch.int64, lambda x, i: x[i], lambda x, i: x[:1].expand(x.shape)),
    "gathered rows": (torch.int64, lambda x, i: x.index_select(0, i), lambda x, i: x[:1].expand(x.shape)),
}


@pytest.mark.parametrize("values", [1, 2, 8])
@pytest.mark.parametrize("name", WHOLE)
def test_masks_and_indices_that_are_dropped_show(name: str, values: int) -> None:
    dtype, function, dropped = WHOLE[name]
    graph = make_fx(function, pre_dispatch=True)(torch.ones(values), torch.zeros(values, dtype=dtype)).graph
    x, whole = graph.find_nodes(op="placeholder")
    for node in graph.nodes:
        node.meta["val"] = torch.empty(values)
    whole.meta["val"] = torch.zeros(values, dtype=dtype)
    region = [node for node in graph.nodes if node.op == "call_function"]

    def equal(call: Callable[[Tensor, Tensor], Tensor]) -> bool:
        return Judge().equal(region, region[-1:], lambda given: [call(given[x], given[whole])], "a candidate")

    assert equal(function)
    only_row = values == 1 and "rows" in name
    fails_on_one = equal(lambda x, whole: function(x, whole) + torch.zeros(1)[whole.long().amax()])
    assert fails_on_one == only_row
    assert equal(dropped) == only_row


@pytest.mark.parametrize("limit", [F.relu6, lambda x: x.clamp(0, 50)], ids=["relu6", "clamp"])
def test_a_limit_that_one_side_shows_is_tried_on_the_other(limit: Callable[[Tensor], Tensor]) -> None:
    graph = make_fx(lambda x: limit(x) + torch.log1p(torch.exp(-x.abs())))(torch.randn(64)).graph
    with FakeTensorMode() as mode:
        value = mode.from_tensor(torch.empty(64))
    for node in graph.nodes:
        node.meta["val"] = value
    (x,) = graph.find_nodes(op="placeholder")
    region = [node for node in graph.nodes if node.op == "call_function"]
    assert not Judge().equal(region, region[-1:], lambda values: [F.softplus(values[x])], "softplus")


@pytest.mark.parametrize("table", ["query", "key"])
def test_angles_that_are_parts_of_one_tensor_are_read_as_that_tensor(table: str) -> None:
    """A list of tensors has no shape, and its tensors are no values to run a region on."""

    class TwoTables(Attention):
        def forward(self, x: Tensor, table_: Tensor, other: Tensor) -> Tensor:
            def turned(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
                x = x.unflatten(-1, (heads, 8)).transpose(1, 2)
                a, b = x.chunk(2, -1)
                return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]

            parts, alike = table_.chunk(2, -1), (other, other)
            q = turned(self.q(x), 4, *(parts if table == "query" else alike))
            k = turned(self.k(x), 2, *(alike if table == "query" else parts))
            v = self.v(x).unflatten(-1, (2, 8)).transpose(1, 2)
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    inputs = [torch.randn(2, 5, 32), torch.randn(2, 5, 16), torch.randn(2, 5, 8)]
    report = rewrite(TwoTables(same), inputs, passes="qk_norm_rope_gate").report
    assert not report.matched and not [m.reason for m in report.misses if "undone" in m.reason]


def test_a_region_that_reads_several_tensors_at_once_is_refused() -> None:
    graph = make_fx(lambda x: x.unbind(0)[0] * 2)(torch.randn(2, 3)).graph
    with FakeTensorMode() as mode:
        value = mode.from_tensor(torch.empty(3))
    for node in graph.nodes:
        node.meta["val"] = [value, value] if "unbind" in node.name else value
    region = [node for node in graph.nodes if node.op == "call_function"][1:]
    with pytest.raises(Refused, match="is several tensors"):
        Judge().equal(region, region[-1:], lambda values: [torch.zeros(3)], "nothing")


def test_without_a_limit_both_match() -> None:
    x, cos, sin = torch.randn(2, 5, 32), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    assert "qk_norm_rope_gate" in rules(rewrite(Attention(same), [x, cos, sin], target="cuda"))
    assert "causal_conv1d" in rules(rewrite(Convolution(same), [torch.randn(2, 8, 11)], target="cuda"))


def test_the_reason_names_the_operator() -> None:
    x, cos, sin = torch.randn(2, 5, 32), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    report = rewrite(Attention(LIMITS["a wide clamp"]), [x, cos, sin], target="cuda").report
    assert any(
        "clamp" in miss.reason and "acts on values that no trial has" in miss.reason for miss in report.misses
    )


@pytest.mark.parametrize("gate", [F.silu, torch.tanh, lambda z: F.silu(z).flip(0)])
def test_sizes_whose_products_are_equal_are_drawn_so(gate: Callable[[Tensor], Tensor]) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(16) + 1)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            x, z = (t.reshape(-1, 16) for t in (x, z))
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight * gate(z)

    module = Flat()
    with torch.no_grad():
        found = rewrite(module, torch.randn(2, 2, 3, 2, 16).unbind(), target="cuda", dynamic=True)
        assert ("gated_rms_norm" in rules(found)) == (gate is F.silu)
        for sizes, others in (((2, 3), (2, 3)), ((4, 7), (7, 4)), ((6, 2), (3, 4))):
            given = torch.randn(*sizes, 2, 16), torch.randn(*others, 2, 16)
            torch.testing.assert_close(found.graph_module(*given), module(*given))


@pytest.mark.parametrize("sizes", [(2, 3), (1, 4), (3, 2)])
def test_sizes_that_go_together_with_a_number_are_drawn_so(sizes: tuple[int, int]) -> None:
    """A weight of 32 columns says that one input has 2 heads, and nothing of the other's sizes."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.out = nn.Parameter(torch.rand(16) + 1), nn.Linear(32, 3)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            y, z = (t.reshape(-1, 16) for t in (x, z))
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight * F.silu(z)
            return self.out(y.reshape(*x.shape[:2], -1))

    module = Flat()
    with torch.no_grad():
        found = rewrite(module, torch.randn(2, *sizes, 2, 16).unbind(), target="cuda", dynamic=True)
        assert "gated_rms_norm" in rules(found), found.report.misses
        given = torch.randn(2, sizes[0], 7, 2, 16).unbind()
        torch.testing.assert_close(found.graph_module(*given), module(*given))
