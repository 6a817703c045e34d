"""A linear over one row becomes a reduction: only there, and no less exact."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import Rewritten, rewrite
from fxfuse.passes import one_row_linears, pipeline
from fxfuse.passes.program import Program
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced
from fxfuse.testing.tensors import integer_tensor

PASS = "one_row_linears"


def matches(rewritten: Rewritten) -> list[Any]:
    return rewritten.report.graphs[0].outcomes[PASS].matches


def program_of(module: nn.Module, *inputs: Tensor) -> Program:
    return traced(module, dict(module.named_parameters()), inputs, Options())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8), (1, 1, 1, 8)])
def test_a_linear_over_one_row_is_rewritten(rewrite_equal: Any, shape: tuple[int, ...], bias: bool) -> None:
    rewritten = rewrite_equal(
        nn.Sequential(nn.Linear(8, 5, bias=bias)), [integer_tensor(shape, 0)], passes=PASS
    )
    (match,) = matches(rewritten)
    assert (match.where, match.members) == ("0", ("0.weight",))
    assert not rewritten.graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    )


def test_linears_that_feed_each_other_directly(rewrite_equal: Any) -> None:
    """As an adapter's two small ones do."""
    module = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 5))
    rewritten = rewrite_equal(module, [integer_tensor((1, 8), 0)], passes=PASS)
    assert [match.where for match in matches(rewritten)] == ["0", "1", "2"]


@pytest.mark.parametrize("shape", [(2, 8), (1, 2, 8), (3, 1, 8), (0, 8)])
def test_a_linear_over_more_or_fewer_rows_is_not(rewrite_equal: Any, shape: tuple[int, ...]) -> None:
    rewritten = rewrite_equal(nn.Linear(8, 5), [integer_tensor(shape, 0)], passes=PASS)
    assert matches(rewritten) == []


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 1), (0, 8), (5, 0), (1, 1)])
def test_weights_of_any_size(rewrite_equal: Any, rows: int, width: int) -> None:
    module = nn.Linear(width, rows) if rows and width else nn.Linear(width, rows, bias=False)
    assert len(matches(rewrite_equal(module, [integer_tensor((1, width), 0)], passes=PASS))) == 1


def test_rows_that_are_known_at_run_time_only_are_not_one_row() -> None:
    class Chosen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0] > 0])

    module = Chosen(8, 5)
    rewritten = rewrite(module, [integer_tensor((4, 8), 0)], passes=PASS)
    assert matches(rewritten) == []
    for keep in (0, 1, 3):
        x = torch.cat([torch.ones(keep, 8), -torch.ones(2, 8)])
        assert torch.equal(rewritten.graph_module(x), module(x))


def test_with_grad_the_linear_stays() -> None:
    """Autograd would keep the products, as large as the weight."""
    program = program_of(nn.Linear(8, 5), torch.ones(1, 8))
    assert len(one_row_linears.run(program.copy()).matches) == 1
    assert one_row_linears.run(replace(program.copy(), grad_enabled=True)).matches == []


def test_a_weight_that_is_not_on_a_cpu_stays() -> None:
    program = program_of(nn.Linear(8, 5), torch.ones(1, 8))
    (weight, *_) = program.placeholders()
    weight.meta["val"] = torch.empty(5, 8, device="meta")
    assert one_row_linears.run(program).matches == []


def test_other_dtypes_stay(rewrite_equal: Any) -> None:
    module = nn.Linear(8, 5, dtype=torch.float64)
    x = integer_tensor((1, 8), 0, dtype=torch.float64)
    assert matches(rewrite_equal(module, [x], passes=PASS)) == []


def test_a_vector_as_weight_stays(rewrite_equal: Any) -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w)

    rewritten = rewrite_equal(Vector(), [integer_tensor((1, 8), 0)], passes=PASS)
    assert rewritten.report.graphs[0].outcomes[PASS].candidates == 0


def test_an_interpreter_gets_it_on_request_only(rewrite_equal: Any) -> None:
    x = integer_tensor((1, 8), 0)
    assert PASS not in rewrite_equal(nn.Linear(8, 5), [x]).report.graphs[0].outcomes
    assert PASS in rewrite_equal(nn.Linear(8, 5), [x], inner="inductor").report.graphs[0].outcomes


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(8, 4, bias=True)
        self.gate_proj = nn.Linear(8, 4, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.up_proj(x) * self.gate_proj(x)


def test_a_fused_weight_is_called_by_its_own_name(rewrite_equal: Any) -> None:
    rewritten = rewrite_equal(Pair(), [integer_tensor((1, 8), 0)], inner="inductor")
    (match,) = matches(rewritten)
    assert match.where == "up_gate_proj"
    assert match.members == ("up_proj.weight", "gate_proj.weight")


def test_an_output_that_is_written_keeps_its_value(rewrite_equal: Any) -> None:
    class Written(nn.Linear):
        def forward(self, x: Tensor) -> list[Tensor]:
            y = super().forward(x)
            view = y.view(-1)
            y.add_(1)
            view[0] = 3
            return [y, view * 2, x]

    assert len(matches(rewrite_equal(Written(8, 5), [integer_tensor((1, 8), 0)], passes=PASS))) == 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", one_row_linears.DTYPES)
def test_the_error_is_no_larger_than_that_of_the_linear(dtype: torch.dtype, bias: bool) -> None:
    """RMS error against float64, at real widths, summed over several draws."""
    ours, theirs = 0.0, 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        module = nn.Linear(2048, 512, bias=bias).to(dtype)
        x = torch.randn(1, 2048).to(dtype)
        rewritten = rewrite(module, [x], passes=PASS)
        assert len(matches(rewritten)) == 1
        with torch.no_grad():
            exact = F.linear(x.double(), module.weight.double(), module.bias.double() if bias else None)
            got, expected = rewritten.graph_module(x), module(x)
        assert got.dtype == dtype
        ours += float((got.double() - exact).square().sum())
        theirs += float((expected.double() - exact).square().sum())
    assert ours**0.5 <= 1.1 * theirs**0.5


def test_a_second_run_finds_nothing() -> None:
    program, first = pipeline.apply(program_of(Pair(), torch.ones(1, 8)), pipeline.PASSES)
    assert len(first[PASS].matches) == 1
    _, second = pipeline.apply(program, pipeline.PASSES)
    assert all(outcome.matches == [] for outcome in second.values())


def test_a_linear_under_autocast_keeps_the_dtype_that_autocast_gives_it() -> None:
    class Cast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.q(x) + 1

    module, x = Cast(), torch.randn(1, 8)
    result = fxfuse.rewrite(module, (x,), passes=["one_row_linears"])
    assert result.graph_module(x).dtype == module(x).dtype == torch.bfloat16
