"""explain(): what a real run would report, with nothing computed, packed or changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import OptionError, UnsupportedModelError
from fxfuse.runtime import inner, live_weights

Make = Callable[..., Any]
LAYERS = ("linear_attention", "linear_attention", "full_attention")


def counts(report: fxfuse.Report) -> list[tuple[Any, ...]]:
    return [(r.rule, r.where, r.detail, r.phase, r.matched, r.candidates) for r in report.rows]


@pytest.fixture(scope="module")
def real(make_model: Make, prompt: Tensor) -> fxfuse.Report:
    model = make_model(layers=LAYERS).optimize(inner="eager")
    with torch.no_grad():
        out = model(input_ids=prompt, use_cache=True)
        model(input_ids=prompt[:, :1], past_key_values=out.past_key_values, use_cache=True)
    return model.optimization_report


@pytest.mark.parametrize("meta", [False, True])
def test_it_counts_what_a_real_run_counts_and_touches_nothing(
    make_model: Make, real: fxfuse.Report, meta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any) -> Any:
        raise AssertionError("a dry run compiled or packed something")

    with torch.device("meta" if meta else "cpu"):
        model = make_model(layers=LAYERS)
    monkeypatch.setattr(inner, "compile_graph", forbidden)
    monkeypatch.setattr(live_weights.Packed, "empty", forbidden)
    pointers = [p.data_ptr() for p in model.parameters()]
    state = {} if meta else copy.deepcopy(model.state_dict())
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    report = fxfuse.explain(model, inner="eager")
    assert counts(report) == counts(real) and report.matched == 12 and not report.misses
    assert [g.plan_digest for g in report.graphs] == [g.plan_digest for g in real.graphs]
    assert report.calls == 0 and report.packed_bytes == 0
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert model.optimization_report is None and model._compiled_call_impl is None
    assert all(not isinstance(p, torch._subclasses.FakeTensor) for p in model.parameters())


def test_it_reports_what_would_be_left_alone_and_raises_under_strict(make_model: Make) -> None:
    model = make_model(layers=("full_attention",))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, out: out * 2)
    report = fxfuse.explain(model, inner="eager")
    assert any("up_proj" in m.where and "forward hook" in m.reason for m in report.misses)
    with pytest.raises(UnsupportedModelError, match="forward hook"):
        fxfuse.explain(model, inner="eager", strict=True)


def test_any_module_can_be_explained_by_the_inputs_of_one_call() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x).relu() * self.up(x)

    x = torch.randn(3, 8)
    report = fxfuse.explain(Gated(), inputs={"x": x}, inner="eager")
    assert report.matched == 1 and "2 linears" in str(report)


def test_an_optimised_model_can_be_explained_and_stays_optimised(make_model: Make, prompt: Tensor) -> None:
    model = make_model(layers=("full_attention",)).optimize(inner="eager")
    with torch.no_grad():
        model(prompt)
    packed, entry = live_weights.packed_bytes(model.parameters()), model._compiled_call_impl
    assert fxfuse.explain(model, inner="eager").matched == 4
    assert model._compiled_call_impl is entry
    assert live_weights.packed_bytes(model.parameters()) == packed > 0


def test_a_model_that_cannot_be_captured_is_an_error_of_ours() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no forward here")

    with pytest.raises(UnsupportedModelError, match=r"Broken.*no forward here"):
        fxfuse.explain(Broken(), inputs={"x": torch.randn(1, 4)}, inner="eager")
    with pytest.raises(OptionError, match="unknown pass"):
        fxfuse.explain(Broken(), passes=["nothing"])
    quantised = Broken()
    quantised.linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"no forward here.*call it after optimize\(\)"):
        fxfuse.explain(quantised, inputs={"x": torch.randn(1, 4)}, inner="eager")
