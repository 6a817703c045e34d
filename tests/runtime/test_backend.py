"""torch.compile(model, backend="fxfuse"): found by name, says what it moves, right under gradients."""

import copy
import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.runtime import live_weights
from fxfuse.runtime.optimize import optimization_report
from fxfuse.runtime.sessions import report_of

Make = Callable[..., Any]

BY_NAME = """
    import sys, torch
    from torch import nn

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)

        def forward(self, x):
            return self.gate(x).relu() * self.up(x)

    model, x = Gated(), torch.randn(3, 8)
    assert "fxfuse" in torch._dynamo.list_backends()
    assert not any(name.startswith("fxfuse") for name in sys.modules)
    compiled = torch.compile(model, backend="fxfuse", options={"inner": "eager"})
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    import fxfuse
    from fxfuse.runtime.optimize import optimization_report
    report = optimization_report(model)
    assert report.calls == 1 and report.matched == 1 and report.packed_bytes == 2 * 8 * 16 * 4, report
    fxfuse.deoptimize(model)
    try:
        torch.compile(model, backend="fxfuse", options={"innner": "eager"}, dynamic=False)(torch.randn(2, 8))
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_the_name_is_enough_without_importing_us_and_a_misspelt_option_is_readable() -> None:
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(BY_NAME)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "unknown option 'innner': known are passes, weights, inner" in found.stdout
    assert "now lie in fused memory" in found.stderr


@pytest.fixture()
def compiled(make_model: Make) -> tuple[Any, Any]:
    model = make_model(layers=("full_attention",))
    return model, torch.compile(model, backend="fxfuse", options={"inner": "eager"})


def test_it_says_once_that_it_packed_the_parameters_and_how_to_undo_that(
    make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    compiled = torch.compile(model, backend="fxfuse", options={"inner": "eager"})
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fxfuse"):
        for _ in range(2):
            out = compiled(prompt, use_cache=True)
            compiled(prompt[:, :1], past_key_values=out.past_key_values, use_cache=True)
    report = model.optimization_report
    assert report is not None and [g.phase for g in report.graphs] == ["prefill", "decode"]
    assert [g.calls for g in report.graphs] == [2, 2] and [g.packs for g in report.graphs] == [1, 1]
    said = [record.message for record in caplog.records if "now lie in fused memory" in record.message]
    assert len(said) == 1 and "fxfuse.deoptimize(model)" in said[0]
    assert sum("fxfuse.deoptimize(model)" in note for note in report.notes) == 1
    torch.testing.assert_close(out.logits, plain_logits(model, prompt), atol=1e-5, rtol=1e-4)
    assert fxfuse.deoptimize(model) is model
    assert live_weights.packed_bytes(model.parameters()) == 0
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("assign", [False, True])
def test_it_is_never_stale_either(
    compiled: tuple[Any, Any],
    make_model: Make,
    prompt: Tensor,
    plain_logits: Callable[..., Tensor],
    assign: bool,
) -> None:
    model, call = compiled
    fresh = [make_model(layers=("full_attention",), seed=seed) for seed in (0, 1)]
    got = []
    for source in (fresh[0], fresh[1], fresh[0]):
        model.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
        with torch.no_grad():
            got.append(call(prompt).logits)
        torch.testing.assert_close(got[-1], plain_logits(source, prompt), atol=1e-5, rtol=1e-4)
    assert torch.equal(got[0], got[2]) and not torch.equal(got[0], got[1])
    report = report_of(model.parameters())
    assert report is not None and report.calls >= 1 and report.matched == 2


# Names.


class Product(nn.Module):
    """Two linears over one input, with a graph break where asked for."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x) * self.k(x)
        if self.broken:
            torch._dynamo.graph_break()
        return y + x


def test_a_graph_break_in_a_submodule_leaves_names_and_fusion_as_they_are() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Product(broken=True) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = fxfuse.optimize(Root(), inner="eager"), torch.randn(1, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward(x))
    report = fxfuse.runtime.optimize.optimization_report(model)
    assert report is not None and not report.misses
    assert [(row.where, row.matched) for row in report.rows] == [("layers.0.q_k", 1)]  # serves both layers
    assert live_weights.packed_bytes(model.parameters()) == sum(p.nbytes for p in model.parameters())
    assert all("nothing matched" in note for note in report.notes)  # in what comes after the break


@pytest.mark.parametrize("chosen", ["inductor", "eager"])
def test_where_nothing_matches_a_graph_that_trains_is_compiled_as_it_is(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.compile would, which a training step must not be slower than."""
    asked = []

    def compile_graph(name: str, mode: Any, graph: Any, values: Any) -> Any:
        asked.append(name)
        return graph

    monkeypatch.setattr(fxfuse.runtime.inner, "compile_graph", compile_graph)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    compiled = torch.compile(model, backend="fxfuse", options={"inner": chosen})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert asked == []
    compiled(x).sum().backward()
    trained = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(trained, [p.grad for p in model.parameters()])
    assert asked == (["inductor"] if chosen == "inductor" else [])


def test_two_modules_in_one_function_have_names_of_their_own() -> None:
    a, b, x = Product(), Product(), torch.randn(1, 5, 8)

    def both(x: Tensor) -> Tensor:
        return a(x) + b(x)

    compiled = torch.compile(both, backend="fxfuse", options={"inner": "eager", "strict": True})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), both(x))
    report = report_of(a.parameters())
    assert report is not None and report.matched == 1 and report.calls == 1
    assert report.rows[0].where == "a_q_a_k_b_q_b_k"


def test_modules_in_a_python_list_have_names_of_their_own() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mods, self.q = [Product(), Product()], nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for each in self.mods:
                x = each(x)
            return self.q(x)

    model, x = fxfuse.optimize(Hidden(), inner="eager"), torch.randn(1, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward(x))
    report = fxfuse.runtime.optimize.optimization_report(model)
    assert report is not None and not report.notes
    assert [(row.where, row.matched) for row in report.rows] == [("mods.{0..1}.q_k", 2)]


# Gradients.


def gradients(model: Any, prompt: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(prompt, labels=prompt, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_of_all_parameters_are_the_originals_and_the_refusal_names_grad_mode(
    make_model: Make, prompt: Tensor, inner: str
) -> None:
    model = make_model()
    expected = gradients(copy.deepcopy(model), prompt)
    model.optimize(inner=inner)
    got = gradients(model, prompt)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: n + m
        )
    report = model.optimization_report
    assert report.calls == 1 and report.matched == 0
    assert report.misses and all("grad mode is on" in miss.reason for miss in report.misses)
    assert live_weights.packed_bytes(model.parameters()) == 0


def test_a_frozen_base_merges_under_grad_mode_and_the_rest_gets_its_gradients(
    make_model: Make, prompt: Tensor
) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "lm_head" in name)
    expected = gradients(copy.deepcopy(model), prompt)
    model.optimize(inner="aot_eager")
    got = gradients(model, prompt)
    assert got.keys() == expected.keys() and 0 < len(got) < len(list(model.parameters()))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-3)
    report = model.optimization_report
    assert report.calls == 1 and report.matched == 4 and not report.misses
    assert live_weights.packed_bytes(model.parameters()) > 0


def test_training_steps_in_place_are_seen_by_the_next_answer(
    make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor]
) -> None:
    model = make_model(layers=("full_attention",)).optimize(inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        with torch.no_grad():
            got = model(prompt, use_cache=False).logits
        torch.testing.assert_close(got, plain_logits(model, prompt, use_cache=False), atol=1e-5, rtol=1e-4)
        gradients(model, prompt)
        optimizer.step()
    assert model.optimization_report.calls == 4
    assert [g.packs for g in model.optimization_report.graphs] == [1, 0]


@pytest.mark.inductor
def test_a_number_that_varies_from_call_to_call_does_not_turn_compiling_off() -> None:
    """Inductor asks Dynamo to trace once more where a float cannot become a tensor."""

    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, limit: float) -> Tensor:
            return (self.gate(x) * self.up(x)).clamp(max=limit)

    model = fxfuse.optimize(Clamped(), report="off")
    with torch.no_grad():
        for limit in (0.5, 0.25, 0.125):
            x = torch.randn(3, 8)
            torch.testing.assert_close(model(x, limit), model.forward(x, limit))
    report = optimization_report(model)
    assert report is not None and report.calls == 3 and not report.failures
