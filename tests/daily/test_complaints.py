"""The six commonest complaints about tools of this kind: a check for each, and proof that the check can fail.

Every check is a function that raises AssertionError where the complaint is justified. One test runs it on the
code as it is, another on a seeded regression of the kind that would give rise to the complaint.
"""

import copy
import gc
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fxfuse
from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.runtime import backend, hooks, live_weights, parts, varying_lengths
from fxfuse.runtime import optimize as entry
from fxfuse.runtime.hooks import Hooks
from fxfuse.runtime.optimize import optimization_report

Make = Callable[..., Any]


class Gated(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


# 1. It silently did nothing.


class Chain(nn.Module):
    """Nothing that any pass matches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def check_it_never_does_nothing_silently(caplog: pytest.LogCaptureFixture) -> None:
    """Either linears are merged in a graph that runs, or a warning and the report say that they are not."""
    for model in (Gated(), Chain()):
        caplog.clear()
        fxfuse.optimize(model, inner="eager")
        answer(model, X)
        report = optimization_report(model)
        assert report is not None
        merged = report.matched > 0 and live_weights.packed_bytes(model.parameters()) > 0
        ran = any(graph.calls for graph in report.graphs if any(o.matches for o in graph.outcomes.values()))
        said = any("runs as it was" in record.getMessage() for record in caplog.records)
        assert (merged and ran) or said, "nothing was merged, and nobody was told"


def test_complaint_1_it_silently_did_nothing(caplog: pytest.LogCaptureFixture) -> None:
    check_it_never_does_nothing_silently(caplog)


def _loses_every_match(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretends(program: Any, passes: Any) -> Any:
        copied = program.copy()
        copied.write_code()
        return copied, {"same_input_linears": Outcome(matches=[Match("same_input_linears", "x", (), "")])}

    monkeypatch.setattr(pipeline, "apply", pretends)


def _falls_back_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_compiled", lambda graph, *args: graph.forward)
    monkeypatch.setattr(backend.log, "warning", lambda *args, **kwargs: None)


@pytest.mark.parametrize("regression", [_loses_every_match, _falls_back_without_a_word])
def test_the_check_of_complaint_1_can_fail(
    regression: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    regression(monkeypatch)
    with pytest.raises(AssertionError, match="nobody was told"):
        check_it_never_does_nothing_silently(caplog)


# 2. It patched things globally.

GLOBALS = """
    import json, sys, torch, transformers
    from torch import nn
    from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    def look():
        classes = [c for c in vars(modeling).values() if isinstance(c, type) and issubclass(c, nn.Module)]
        classes += [nn.Module, nn.Linear, nn.RMSNorm, PreTrainedModel, torch.Tensor]
        found = {f"{c.__module__}.{c.__name__}.{k}": id(v) for c in classes for k, v in vars(c).items()
                 if not k.startswith(("_abc", "__"))}
        for module in (modeling, torch, nn.functional, torch.nn.init, transformers.generation.utils):
            found |= {f"{module.__name__}.{k}": id(v) for k, v in vars(module).items()
                      if callable(v) and not k.startswith("__")}
        return found

    config = Qwen3_5TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, layer_types=["full_attention"],
    )
    model, ids = Qwen3_5ForCausalLM(config).eval(), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():  # what transformers and Dynamo leave behind themselves
        model(ids)
        torch.compile(nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    before = look()
    import fxfuse
    {regression}
    with torch.no_grad():
        model.optimize(inner="eager")(ids)
    assert model.optimization_report.calls == 1
    after = look()
    print(json.dumps(sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))))
"""
ADDED = {"optimize", "deoptimize", "optimization_report"}


def check_that_only_three_names_are_added(regression: str = "") -> None:
    code = textwrap.dedent(GLOBALS).replace("{regression}", regression)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    changed = json.loads(found.stdout.splitlines()[-1])
    own = {f"transformers.modeling_utils.PreTrainedModel.{name}" for name in ADDED}
    assert set(changed) == own, f"changed for everybody: {sorted(set(changed) - own)}"


def test_complaint_2_it_patched_things_globally() -> None:
    check_that_only_three_names_are_added()


def test_the_check_of_complaint_2_can_fail() -> None:
    patch = "modeling.Qwen3_5MLP.forward = lambda self, x: self.down_proj(self.up_proj(x))"
    with pytest.raises(AssertionError, match=r"changed for everybody.*Qwen3_5MLP\.forward"):
        check_that_only_three_names_are_added(patch)


# 3. It could not be undone.


def check_that_it_is_undone() -> None:
    """Same objects, bits, strides and attributes, memory of one's own, and not one tensor left behind."""
    model = Gated()
    before = {n: (p, p.detach().clone(), p.stride()) for n, p in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = answer(model, X)
    fxfuse.optimize(model, inner="eager")
    answer(model, X)
    fxfuse.deoptimize(model)
    gc.collect()
    assert model._compiled_call_impl is None, "the compiled call is still there"
    added = {"_compiled_call_impl"}  # torch.nn.Module's own, None again
    assert {name: set(vars(module)) - added for name, module in model.named_modules()} == attributes
    for name, parameter in model.named_parameters():
        same, value, strides = before[name]
        assert parameter is same and torch.equal(parameter, value) and parameter.stride() == strides, name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
        assert not hasattr(parameter.untyped_storage(), "fused"), f"{name} still lies in fused memory"
    assert torch.equal(answer(model, X), expected)


def test_complaint_3_it_could_not_be_undone() -> None:
    check_that_it_is_undone()


def _leaves_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "is_optimized", lambda model: False)


def _leaves_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_weights, "unpack", lambda parameters: 0)


@pytest.mark.parametrize("regression", [_leaves_the_call, _leaves_the_memory])
def test_the_check_of_complaint_3_can_fail(
    regression: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    regression(monkeypatch)
    with pytest.raises(AssertionError):
        check_that_it_is_undone()


# 4. It was slower. Counted where counting is possible; one measurement, with slack, among the slow tests.


def work_of(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Matrix products and copies of matrices, such as weights are, that torch runs in one call."""
    with torch.autograd.profiler.profile(record_shapes=True) as seen:
        answer(model, x)
    ran = seen.function_events
    products = sum(event.name == "aten::linear" for event in ran)
    copies = sum(
        event.name in ("aten::copy_", "aten::cat") and len(event.input_shapes[0]) == 2 for event in ran
    )
    return products, copies


def check_that_a_call_does_less(make_model: Make, prompt: Tensor) -> None:
    """Fewer matrix products a call than the model has, no matrix copied, nothing packed twice."""
    model = make_model()
    before = work_of(model, prompt)
    fxfuse.optimize(model, inner="eager")
    for _ in range(2):
        answer(model, prompt)
    after = work_of(model, prompt)
    assert after[0] == before[0] - (3 + 1 + 2 + 1), f"{after[0]} matrix products, {before[0]} before"
    assert after[1] <= before[1], f"{after[1]} matrices copied, {before[1]} before"
    report = model.optimization_report
    assert [graph.packs for graph in report.graphs] == [1], "packed again at every call"
    assert report.copied_bytes == 0 and report.calls == 3


def test_complaint_4_it_was_slower(make_model: Make, prompt: Tensor) -> None:
    check_that_a_call_does_less(make_model, prompt)


def _splits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(p for p in pipeline.PASSES if p.name != "same_input_linears")
    monkeypatch.setattr(pipeline, "PASSES", kept)


def _packs_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_weights.LiveWeights, "_marks", lambda self, args: object())


def _copies_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = live_weights.LiveWeights.fused
    monkeypatch.setattr(
        live_weights.LiveWeights, "fused", lambda self, args: [t.clone() for t in fused(self, args)]
    )


def _runs_the_original_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    filled_call = backend.filled_call

    def both(run: Any, *rest: Any) -> Any:
        call, original = filled_call(run, *rest), rest[-1]
        return lambda *args: (original(*args), call(*args))[1]

    monkeypatch.setattr(backend, "filled_call", both)


@pytest.mark.parametrize(
    "regression", [_splits_again, _packs_at_every_call, _copies_at_every_call, _runs_the_original_as_well]
)
def test_the_check_of_complaint_4_can_fail(
    regression: Callable[..., None], make_model: Make, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    regression(monkeypatch)
    with pytest.raises(AssertionError):
        check_that_a_call_does_less(make_model, prompt)


def calls_around_the_graph(layers: int) -> int:
    """Functions of Python that one call enters, without those of its compiled graphs."""
    entered, inside = 0, set[Any]()

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call" and frame.f_code not in inside

    def uncounted(graph: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            counts = sys.getprofile()
            sys.setprofile(None)
            try:
                return graph(*args)
            finally:
                sys.setprofile(counts)

        inside.add(run.__code__)
        return run

    model = nn.Sequential(*(Gated() for _ in range(layers)))
    compile_graph = backend.inner.compile_graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.inner, "compile_graph", lambda *args: uncounted(compile_graph(*args)))
        fxfuse.optimize(model, inner="eager")
        for _ in range(2):
            answer(model, X)
        sys.setprofile(count)
        try:
            answer(model, X)
        finally:
            sys.setprofile(None)
    report = optimization_report(model)
    assert report is not None and report.matched == layers and report.calls == 3
    return entered


def check_that_the_way_to_a_graph_stays_short(most: int = 150) -> None:
    """However deep the model is: one step comes on top for each merged weight, here one a layer."""
    shallow, deep = calls_around_the_graph(2), calls_around_the_graph(8)
    assert shallow <= most and deep - shallow <= 8 - 2, f"{shallow} functions for 2 layers, {deep} for 8"


def test_complaint_4_it_was_slower_on_the_way_to_a_graph() -> None:
    check_that_the_way_to_a_graph_stays_short()


def test_the_check_of_the_way_to_a_graph_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()

    def searched(self: Hooks) -> hooks.Present:
        return frozenset(hooks._search([module.__dict__ for module in self._model().modules()]))

    monkeypatch.setattr(Hooks, "present", searched)
    with pytest.raises(AssertionError, match="for 8"):
        check_that_the_way_to_a_graph_stays_short()


def check_that_the_wrapper_costs_little(model: nn.Module, x: Tensor) -> None:
    """Beside torch.compile of the same model: at most half as long again, best of many, in turns."""
    plain = torch.compile(copy.deepcopy(model), dynamic=False)
    fxfuse.optimize(model, dynamic=False)
    best = [float("inf"), float("inf")]
    for _ in range(300):
        for i, call in enumerate((plain, model)):
            start = time.perf_counter()
            answer(call, x)
            best[i] = min(best[i], time.perf_counter() - start)
    assert best[1] < 1.5 * best[0], f"{best[1] / best[0]:.2f} times as long as torch.compile"


@pytest.mark.slow
@pytest.mark.inductor
def test_complaint_4_it_was_slower_measured() -> None:
    check_that_the_wrapper_costs_little(Gated(width=512), torch.randn(1, 1, 512))


@pytest.mark.slow
@pytest.mark.inductor
def test_the_measurement_of_complaint_4_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = live_weights.LiveWeights.fused

    def copies_at_every_call(self: Any, args: Any) -> list[Any]:
        found = [tensor for tensor in fused(self, args) if tensor is not None]
        for _ in range(8):  # more than once, to stand out on a busy machine
            found = [tensor.clone() for tensor in found]
        return found

    monkeypatch.setattr(live_weights.LiveWeights, "fused", copies_at_every_call)
    torch._dynamo.reset()
    with pytest.raises(AssertionError, match="times as long"):
        check_that_the_wrapper_costs_little(Gated(width=512), torch.randn(1, 1, 512))


# 5. It broke saving.


def check_that_saving_writes_the_original_names_once(make_model: Make, prompt: Tensor, folder: Path) -> None:
    plain, model = make_model(layers=("full_attention",)), make_model(layers=("full_attention",))
    fxfuse.optimize(model, inner="eager")
    answer(model, prompt)
    assert live_weights.packed_bytes(model.parameters()) > 0
    for each, name in ((plain, "plain"), (model, "packed")):
        each.save_pretrained(folder / name)
        torch.save(each.state_dict(), folder / f"{name}.pt")
    files = [load_file(folder / name / "model.safetensors") for name in ("plain", "packed")]
    assert files[1].keys() == files[0].keys(), "other names"
    assert all(torch.equal(files[1][name], files[0][name]) for name in files[0]), "other values"
    sizes = [(folder / f"{name}.pt").stat().st_size for name in ("plain", "packed")]
    assert sizes[1] <= sizes[0] * 1.01, f"{sizes[1]} bytes instead of {sizes[0]}"
    save_model(model, str(folder / "whole.safetensors"))
    assert load_file(folder / "whole.safetensors").keys() == files[0].keys(), "not every tensor"
    assert "fxfuse" not in (folder / "packed" / "config.json").read_text()


def test_complaint_5_it_broke_saving(make_model: Make, prompt: Tensor, tmp_path: Path) -> None:
    check_that_saving_writes_the_original_names_once(make_model, prompt, tmp_path)


def _members_are_slices_of_one_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "from_dlpack", lambda part: part)


def _a_fused_parameter_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    def registers(model: nn.Module, **options: Any) -> nn.Module:
        model.register_parameter("fused", nn.Parameter(torch.randn(4, 4)))
        return optimize(model, **options)

    optimize = fxfuse.optimize
    monkeypatch.setattr(fxfuse, "optimize", registers)


@pytest.mark.parametrize("regression", [_members_are_slices_of_one_storage, _a_fused_parameter_is_registered])
def test_the_check_of_complaint_5_can_fail(
    regression: Callable[..., None],
    make_model: Make,
    prompt: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    regression(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_that_saving_writes_the_original_names_once(make_model, prompt, tmp_path)


# 6. It compiled forever.


def check_that_compiling_ends(make_model: Make) -> None:
    """Two kinds of graph for prompts and one for tokens, however many lengths there are."""
    model = fxfuse.optimize(make_model(layers=("full_attention",)), inner="eager")
    counters.clear()
    for length in (5, 9, 17, 30):
        ids = torch.randint(1, 300, (1, length))
        model.generate(ids, do_sample=False, max_new_tokens=2, min_new_tokens=2)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= 3, f"{graphs} graphs for four lengths"
    assert model.optimization_report.calls == 4 * 2


def test_complaint_6_it_compiled_forever(make_model: Make) -> None:
    check_that_compiling_ends(make_model)


def test_the_check_of_complaint_6_can_fail(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(varying_lengths, "_lengths", lambda args, kwargs: iter(()))
    lengths_are_fixed = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with pytest.raises(AssertionError, match="graphs for four lengths"), lengths_are_fixed:
        check_that_compiling_ends(make_model)


# What is compiled grows with the kinds of layers, not with their number.


def nodes_compiled(make_model: Make, layers: int) -> tuple[int, int]:
    """Graphs that the inner compiler gets for a prompt and a token, and the nodes in them."""
    given: list[int] = []
    compile_graph = backend.inner.compile_graph

    def counting(kind: Any, mode: Any, graph_module: Any, inputs: Any) -> Any:
        given.append(len(graph_module.graph.nodes))
        return compile_graph(kind, mode, graph_module, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.inner, "compile_graph", counting)
        model = make_model(layers=("full_attention",) * layers)
        fxfuse.optimize(model, inner="eager").generate(
            torch.ones(1, 5, dtype=torch.long), do_sample=False, max_new_tokens=2, min_new_tokens=2
        )
    assert model.optimization_report.calls == 2 and model.optimization_report.matched == 2 * 2 * layers
    return len(given), sum(given)


def check_that_depth_costs_no_compiling(make_model: Make) -> None:
    shallow, deep = (nodes_compiled(make_model, layers) for layers in (2, 4))
    assert shallow[0] == deep[0], f"{deep[0]} graphs instead of {shallow[0]}"
    assert deep[1] < 1.5 * shallow[1], f"{deep[1]} nodes compiled for 4 layers, {shallow[1]} for 2"


def test_complaint_6_it_compiled_forever_for_many_layers(make_model: Make) -> None:
    torch._dynamo.reset()
    check_that_depth_costs_no_compiling(make_model)


def test_the_check_of_many_layers_can_fail(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(parts, "_can_be_cut", lambda graph_module: False)
    with pytest.raises(AssertionError, match="nodes compiled for 4 layers"):
        check_that_depth_costs_no_compiling(make_model)


def check_that_later_lengths_take_no_time(make_model: Make) -> None:
    """Seconds that the process computes: what else the machine does, and waiting, is not counted."""
    model = fxfuse.optimize(make_model(layers=("full_attention",)))
    seconds = []
    for length in (9, 5, 17, 30):
        ids = torch.randint(1, 300, (1, length), generator=torch.Generator().manual_seed(length))
        start = time.process_time()
        model.generate(ids, do_sample=False, max_new_tokens=2, min_new_tokens=2)
        seconds.append(time.process_time() - start)
    assert sum(seconds[1:]) < seconds[0] / 2, f"{[round(s, 1) for s in seconds]} s for four lengths"


@pytest.mark.slow
@pytest.mark.inductor
def test_complaint_6_it_compiled_forever_measured(make_model: Make) -> None:
    torch._dynamo.reset()
    check_that_later_lengths_take_no_time(make_model)


@pytest.mark.slow
@pytest.mark.inductor
def test_the_measurement_of_complaint_6_can_fail(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(varying_lengths, "_lengths", lambda args, kwargs: iter(()))
    lengths_are_fixed = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    with pytest.raises(AssertionError, match="s for four lengths"), lengths_are_fixed:
        check_that_later_lengths_take_no_time(make_model)
