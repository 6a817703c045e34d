"""What a guard is there for, each on a graph that would be wrong without it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse import Rewritten, rewrite
from fxfuse.passes.formula_rule import FormulaRule
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.pipeline import PASSES, Pass
from fxfuse.patterns import idioms
from fxfuse.testing import integer_like_, integer_tensor

ALL = tuple(each.name for each in PASSES)
H = 8


class Behind(nn.Module):
    """What a function makes of one linear's output."""

    def __init__(self, then: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(H, 8, bias=False), then
        integer_like_(self, seed=3)

    def forward(self, x: Tensor) -> object:
        return self.then(self.linear(x))


def _exact(module: nn.Module, weights: str) -> Rewritten:
    x = integer_tensor((2, 5, H), seed=1)
    result = rewrite(module, (x,), passes=ALL, weights=weights, dynamic=False)
    assert not [miss for miss in result.report.misses if "undone" in miss.reason]
    for expected, got in zip(module(x), result.graph_module(x), strict=True):
        assert expected.shape == got.shape and torch.equal(expected, got)
    return result


def _turned(y: Tensor) -> Tensor:
    first, second = y.split([3, 5], dim=-1)
    return torch.cat([second, first], dim=-1) * 2


def _also_summed_up(y: Tensor) -> tuple[Tensor, Tensor]:
    return _turned(y), y[..., :2].reshape(2, 5, 2).sum((0, 2))


def _also_by_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in another order are no whole rows: whoever reads them reads the linear's own features."""
    return _turned(y), y.transpose(0, 1) * 3


def _written_between(y: Tensor) -> tuple[Tensor, Tensor]:
    first = y.narrow(-1, 0, 3)
    first.mul_(5)
    return torch.cat([y.narrow(-1, 3, 5), first], dim=-1) * 2, first * 3


def _of_flat_rows(y: Tensor) -> tuple[Tensor]:
    """[B·T, 2, 4]: as many dimensions as [B, T, 8], with other meanings."""
    first, second = y.reshape(10, 2, 4).split([1, 3], dim=-1)
    return (torch.cat([second, first], dim=-1) * 2,)


@pytest.mark.parametrize("weights", ["auto", "copy"])
@pytest.mark.parametrize("then", [_also_summed_up, _also_by_rows, _written_between, _of_flat_rows])
def test_a_chain_with_another_use_keeps_its_values(then: Callable[[Tensor], object], weights: str) -> None:
    _exact(Behind(then), weights)


def test_parts_taken_before_a_write_see_it() -> None:
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            own = x.clone()
            first, second = own.split([3, 5], dim=-1)
            own.add_(1)
            return first * 2, second * 3

    _exact(Parts(), "auto")


def test_a_sum_that_is_not_the_linears_only_reader_takes_no_bias() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bias = nn.Linear(H, 4, bias=False), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = F.linear(x, self.linear.weight)
            return y + self.bias, y * 2

    result = _exact(integer_like_(Both(), seed=3), "auto")
    calls = [str(node.target) for node in result.graph_module.graph.nodes]
    assert calls.count("aten.linear.default") == 1


def _norm(x: Tensor, weight: Tensor, more: Tensor | float = 0.0) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6 + more) * weight


class Normed(nn.Module):
    def __init__(self, more: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.more = nn.Parameter(torch.rand(H) + 1), more

    def forward(self, x: Tensor) -> Tensor:
        return _norm(x, self.weight, 0.0 if self.more is None else x[..., :1].abs() * self.more)


def _outcome(rule: FormulaRule, module: nn.Module) -> Outcome:
    rewritten = rewrite(module, (torch.randn(2, 3, H),), passes=(Pass("rule", rule.run),), dynamic=False)
    return rewritten.report.graphs[0].outcomes["rule"]


@pytest.mark.parametrize("zero_centred", [False, True])
def test_an_operator_that_is_not_the_formula_is_found_out_by_running_it(zero_centred: bool) -> None:
    rule = FormulaRule("rule", idioms.RMS_NORM, "rms_norm", ("x", "weight", "eps"), (zero_centred,))
    found = _outcome(rule, Normed())
    assert len(found.matches) == (not zero_centred)
    assert [miss.reason for miss in found.misses] == ["run on random values it is no rms_norm"] * zero_centred


def test_a_sum_with_one_addend_more_is_no_candidate() -> None:
    rule = FormulaRule("rule", idioms.RMS_NORM, "rms_norm", ("x", "weight", "eps"), (False,))
    found = _outcome(rule, Normed(more=2.0))
    assert not found.matches and not found.misses


def test_a_tensor_gated_by_itself_has_no_gate() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    rule = FormulaRule("rule", idioms.SIGMOID_GATE, "sigmoid_gate_mul", ("x", "gate"))
    assert not _outcome(rule, Own()).matches


class _Repeated(nn.Module):
    """One token's attention over keys and values that are repeated, and a write before it reads them."""

    def __init__(self, repeat: Callable[[Tensor], Tensor], write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.repeat, self.write = repeat, write

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.repeat(key), self.repeat(value)
        self.write(key, value)
        return F.scaled_dot_product_attention(query, keys, values) + 0


@pytest.mark.parametrize(
    "repeat",
    [
        lambda k: k.repeat_interleave(4, 1),
        lambda k: k[:, :, None].expand(-1, -1, 4, -1, -1).reshape(k.shape[0], -1, *k.shape[2:]),
    ],
    ids=["repeat_interleave", "expand"],
)
@pytest.mark.parametrize(
    ("write", "merged"),
    [
        (lambda k, v: None, True),
        (lambda k, v: k.mul_(2), False),
        (lambda k, v: v.mul_(2), False),
        (lambda k, v: k[:, :, -1].zero_(), False),
        (lambda k, v: k.index_copy_(2, torch.tensor([0]), torch.ones(1, 2, 1, 16)), False),
    ],
    ids=["none", "key", "value", "slice", "index_copy_"],
)
def test_keys_written_between_repeat_and_attention_are_read_as_they_were(
    repeat: Callable[[Tensor], Tensor], write: Callable[[Tensor, Tensor], object], merged: bool
) -> None:
    module = _Repeated(repeat, write)
    inputs = (torch.randn(1, 8, 1, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16))
    with torch.no_grad():
        result = rewrite(module, tuple(x.clone() for x in inputs), target="cuda", dynamic=False)
        got = result.graph_module(*(x.clone() for x in inputs))
        torch.testing.assert_close(got, module(*(x.clone() for x in inputs)))
    assert merged == any(row.matched for row in result.report.rows if row.rule == "grouped_query_attention")


@pytest.mark.parametrize("heads", [1, 2])
def test_a_repeat_in_the_memory_of_a_returned_cache_is_seen_through(heads: int) -> None:
    """Of a single head the repeat is a view of the cache; it stays as it is, and attention reads the head."""

    class Cached(nn.Module):
        def forward(self, query: Tensor, keys: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            keys = torch.cat([keys, key], 2)
            repeated = keys[:, :, None].expand(-1, -1, 4, -1, -1).reshape(2, 4 * heads, -1, 8)
            return F.scaled_dot_product_attention(query, repeated, repeated) + 0, keys

    given = [torch.randn(2, n, t, 8) for n, t in ((4 * heads, 1), (heads, 6), (heads, 1))]
    result = rewrite(Cached(), given, target="cuda", dynamic=False)
    assert any(row.matched for row in result.report.rows if row.rule == "grouped_query_attention")
    for got, expected in zip(result.graph_module(*given), Cached()(*given), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("written", [None, "a", "b", "A_log", "dt_bias"])
def test_gates_of_what_is_written_before_the_rule_reads_them_stay_what_they_were(written: str | None) -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    import fxfuse

    class Gated(nn.Module):
        def forward(
            self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
        ) -> Tensor:
            decay, rate = -A_log.float().exp() * F.softplus(a.float() + dt_bias), b.sigmoid()
            if written is not None:
                {"a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias}[written].mul_(3)
            out, _ = torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=rate, use_qk_l2norm_in_kernel=True)
            return out

    shapes = [(1, 9, 4, 16)] * 3 + [(1, 9, 4)] * 2 + [(4,)] * 2
    inputs = [torch.randn(shape) for shape in shapes]
    module = Gated()
    with torch.no_grad():
        expected = module(*(x.clone() for x in inputs))
        fxfuse.optimize(module, target="cuda", inner="eager", report="off")
        torch.testing.assert_close(module(*(x.clone() for x in inputs)), expected, rtol=1e-4, atol=1e-5)
    report = fxfuse.runtime.optimize.optimization_report(module)
    assert (written is None) == any(row.matched for row in report.rows if row.rule == "gdn_gates")


def test_a_product_of_repeated_values_reads_one_of_repeated_keys(rewrite_equal: Any) -> None:
    """Whose place another call has taken by then."""

    class Linear(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            key, value = (x.repeat_interleave(2, 1) for x in (key, value))
            return query @ key.mT @ value

    inputs = [integer_tensor(shape, seed=1) for shape in ((2, 4, 1, 8), (2, 2, 5, 8), (2, 2, 5, 8))]
    rewritten = rewrite_equal(Linear(), inputs, passes=("grouped_query_attention",), dynamic=False)
    assert rewritten.report.matched == 1
