"""Whether a linear over one row becomes a reduction is measured on the machine, once, and kept."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import UnsupportedModelError
from fxfuse.passes import pipeline
from fxfuse.passes.program import Program
from fxfuse.runtime import inner, one_row_speed
from fxfuse.runtime.one_row_speed import Case, Speeds
from fxfuse.runtime.optimize import optimization_report
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced

PASS = "one_row_linears"
REDUCTION = Speeds(reduction=0.4, product=0.8, ratio=0.5)
PRODUCT = Speeds(reduction=0.9, product=0.3, ratio=3.0)
X = torch.ones(1, 8)


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing known yet, nothing on the disk, and every weight large enough to ask for."""
    kept = one_row_speed._file
    monkeypatch.setattr(one_row_speed, "_answers", {})
    monkeypatch.setattr(one_row_speed, "_file", lambda key: tmp_path / "fxfuse" / kept(key).name)
    monkeypatch.setattr(one_row_speed, "SMALL", 0)


def plant(speeds: Speeds | None, dtype: torch.dtype = torch.float32) -> None:
    one_row_speed._answers[Case.now(dtype)] = lambda: speeds


def program_of(module: nn.Module, *inputs: Tensor) -> Program:
    return traced(module, dict(module.named_parameters()), inputs, Options())


def asked(module: nn.Module, *inputs: Tensor) -> Any:
    passes = one_row_speed.asked_by(pipeline.selected("default", "inductor"), "default", ())
    return pipeline.apply(program_of(module, *inputs), passes)[1][PASS]


def test_the_faster_form_is_chosen() -> None:
    plant(REDUCTION)
    assert [m.where for m in asked(nn.Sequential(nn.Linear(8, 5)), X).matches] == ["0"]
    plant(PRODUCT)
    outcome = asked(nn.Sequential(nn.Linear(8, 5)), X)
    assert outcome.matches == []
    (miss,) = outcome.misses
    assert (miss.rule, miss.where, miss.chosen) == (PASS, "0", True)
    threads, cpu = torch.get_num_threads(), one_row_speed._cpu()["name"]
    for part in ("0.30 ms", "0.90 as a reduction", "torch.float32", cpu, f"{threads} thread"):
        assert part in miss.reason


def test_noise_decides_nothing() -> None:
    plant(Speeds(reduction=0.41, product=0.40, ratio=1.03))
    assert len(asked(nn.Linear(8, 5), X).matches) == 1


def test_each_dtype_has_an_answer_of_its_own() -> None:
    plant(PRODUCT)
    plant(REDUCTION, torch.bfloat16)
    both = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 4, dtype=torch.bfloat16))

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = both

        def forward(self, x: Tensor) -> Tensor:
            return both[1](both[0](x).bfloat16())

    outcome = asked(Both(), X)
    assert [m.where for m in outcome.misses] == ["both.0"]
    assert [m.where for m in outcome.matches] == ["both.1"]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 5, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        return F.grouped_mm(x, self.weight.mT, offs=offsets)


@pytest.mark.parametrize("speeds", [REDUCTION, PRODUCT])
def test_experts_of_few_rows_ask_as_well(speeds: Speeds) -> None:
    plant(speeds, torch.bfloat16)
    rows, offsets = torch.ones(2, 8, dtype=torch.bfloat16), torch.tensor([1, 1, 2], dtype=torch.int32)
    with torch.no_grad():
        program = traced(Experts(), dict(Experts().named_parameters()), [rows, offsets], Options(), False)
    passes = one_row_speed.asked_by(pipeline.selected("default", "inductor"), "default", ())
    outcome = pipeline.apply(program, passes)[1]["expert_rows"]
    assert (len(outcome.matches), len(outcome.misses)) == ((1, 0) if speeds is REDUCTION else (0, 1))
    assert all(miss.chosen and "0.30 ms" in miss.reason for miss in outcome.misses)


def never(*_: object, **__: object) -> Any:
    raise AssertionError("this is not asked for")


def test_small_weights_and_other_devices_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_row_speed, "_answer", never)
    assert one_row_speed.why_a_product(torch.empty(4, 4, device="meta")) is None
    assert one_row_speed.why_a_product(torch.empty(4, 4, dtype=torch.float64)) is None
    with pytest.raises(AssertionError):
        one_row_speed.why_a_product(torch.empty(4, 4))
    monkeypatch.setattr(one_row_speed, "SMALL", 65)
    assert one_row_speed.why_a_product(torch.empty(4, 4)) is None


# --- who asks


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend up to Inductor, which would take seconds."""
    monkeypatch.setattr(inner, "cpp_compiler_is_missing", lambda: False)
    monkeypatch.setattr(inner, "compile_graph", lambda inner, mode, graph, inputs: graph)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.o_proj = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.q_proj(x) * self.k_proj(x))


def compiled(**options: Any) -> Any:
    model = Two()
    with torch.no_grad():
        expected = model(X)
        fxfuse.optimize(model, report="off", **options)
        torch.testing.assert_close(model(X), expected)
    report = optimization_report(model)
    assert report is not None
    return report


@pytest.mark.usefixtures("uncompiled")
def test_the_backend_asks_and_the_report_has_both_times() -> None:
    plant(PRODUCT)
    report = compiled()
    assert [miss.where for miss in report.misses] == ["q_k_proj", "o_proj"]
    assert "0.30 ms against 0.90 as a reduction" in str(report)
    plant(REDUCTION)
    assert compiled().misses == []


@pytest.mark.usefixtures("uncompiled")
def test_strict_has_nothing_against_what_was_chosen() -> None:
    plant(PRODUCT)
    assert len(compiled(strict=True).misses) == 2

    class One(nn.Linear):
        pass

    model = fxfuse.optimize(One(8, 5), strict=True, report="off")
    with torch.no_grad():
        model(X)
    with pytest.raises(UnsupportedModelError, match="nothing to rewrite"), torch.no_grad():
        fxfuse.optimize(nn.Sigmoid(), strict=True, report="off")(X)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    "options",
    [{"passes": PASS}, {"passes": ["default", PASS]}, {"inner": "eager"}, {"passes": "layout_chains"}],
)
def test_who_names_the_pass_or_does_not_compile_does_not_ask(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(one_row_speed, "_answer", never)
    report = compiled(**options)
    assert bool(report.graphs[0].outcomes.get(PASS)) == (PASS in options.get("passes", ""))
    assert report.misses == []


def test_showing_does_not_ask(monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Any]) -> None:
    monkeypatch.setattr(one_row_speed, "_answer", never)
    rewritten = fxfuse.rewrite(nn.Linear(8, 5), [X], inner="inductor")
    assert len(rewritten.report.graphs[0].outcomes[PASS].matches) == 1
    report = fxfuse.explain(make_model(layers=("full_attention",)))
    assert any(graph.outcomes[PASS].matches for graph in report.graphs) and not report.misses


# --- measured once


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What happens instead of compiling and timing, in order."""
    events: list[str] = []

    def begun(graph: Any, inputs: Any) -> Callable[[], Any]:
        events.append("begun")
        return lambda: events.append("waited for")

    def timed(*_: object) -> Speeds:
        events.append("timed")
        return PRODUCT

    monkeypatch.setattr(inner, "begun", begun)
    monkeypatch.setattr(one_row_speed, "_timed", timed)
    yield events


ONCE = ["begun", "begun", "waited for", "waited for", "timed"]


def test_kernels_are_begun_before_anybody_asks(measurements: list[str]) -> None:
    passes = pipeline.selected("default", "inductor")
    with torch.no_grad():
        one_row_speed.asked_by(passes, "default", [nn.Parameter(torch.empty(4, 4)), X, 3])
    assert measurements == ONCE[:2]
    assert one_row_speed.why_a_product(torch.empty(4, 4)) is not None
    assert measurements == ONCE


def test_nothing_is_begun_where_gradients_are_on_or_nothing_is_large(measurements: list[str]) -> None:
    passes = pipeline.selected("default", "inductor")
    one_row_speed.asked_by(passes, "default", [nn.Parameter(torch.empty(4, 4))])
    with torch.no_grad():
        one_row_speed.asked_by(passes, "default", [nn.Parameter(torch.empty(4)), X, 3])
    assert measurements == []


def test_threads_measure_once(measurements: list[str]) -> None:
    answers: list[str | None] = []
    weight = torch.empty(4, 4)
    threads = [
        threading.Thread(target=lambda: answers.append(one_row_speed.why_a_product(weight))) for _ in range(4)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert measurements == ONCE and len(set(answers)) == 1


def test_the_next_process_reads_the_answer(
    measurements: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = one_row_speed.why_a_product(torch.empty(4, 4))
    (file,) = (tmp_path / "fxfuse").iterdir()  # nothing is left beside it
    assert measurements == ONCE
    one_row_speed._answers.clear()
    assert one_row_speed.why_a_product(torch.empty(4, 4)) == first is not None
    assert measurements == ONCE

    one_row_speed._answers.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert "77 threads" in str(one_row_speed.why_a_product(torch.empty(4, 4)))
    assert measurements == ONCE * 2 and len(list(file.parent.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"null", b"[]", b'{"key": 1}', b"\xff\xfe\x00", b'{"speeds": {"ratio": "x"}}'],
)
def test_what_cannot_be_read_is_measured_again(
    measurements: list[str], tmp_path: Path, damage: bytes
) -> None:
    one_row_speed.why_a_product(torch.empty(4, 4))
    (file,) = (tmp_path / "fxfuse").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage)
    one_row_speed._answers.clear()
    assert one_row_speed.why_a_product(torch.empty(4, 4)) is not None
    assert measurements == ONCE * 2 and file.read_bytes() == whole


def test_the_answer_to_another_question_is_none(measurements: list[str], tmp_path: Path) -> None:
    one_row_speed.why_a_product(torch.empty(4, 4))
    (file,) = (tmp_path / "fxfuse").iterdir()
    file.write_text(file.read_text().replace('"threads": ', '"threads": 9'))
    one_row_speed._answers.clear()
    one_row_speed.why_a_product(torch.empty(4, 4))
    assert measurements == ONCE * 2


def test_where_nothing_can_be_written_the_process_remembers(measurements: list[str], tmp_path: Path) -> None:
    (tmp_path / "fxfuse").write_text("a file where the folder should be")
    for _ in range(2):
        assert one_row_speed.why_a_product(torch.empty(4, 4)) is not None
    assert measurements == ONCE


@pytest.mark.parametrize("fails", ["begun", "_timed"])
def test_what_cannot_be_measured_is_rewritten_and_said_once(
    measurements: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("the compiler said no")

    monkeypatch.setattr(inner if fails == "begun" else one_row_speed, fails, failing)
    for _ in range(2):
        assert one_row_speed.why_a_product(torch.empty(4, 4)) is None
    assert [record.message for record in caplog.records] == [
        "linears over one row are rewritten without having been timed: the compiler said no"
    ]


def test_kernels_are_waited_for_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.async_compile import AsyncCompile

    waited: list[str] = []

    def inductor(graph: Any, inputs: Any) -> str:
        AsyncCompile().wait({"name": "kernel"})
        return "callable"

    monkeypatch.setattr(AsyncCompile, "wait", lambda self, scope: waited.append(scope["name"]))
    monkeypatch.setattr(inner, "_inductor", inductor)
    finished = inner.begun(nn.Module(), [])  # type: ignore[arg-type]
    assert waited == []
    assert finished() == "callable" and waited == ["kernel"]


@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["as it is", "under autocast and a fake mode"])
def test_both_forms_are_compiled_and_timed(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Really; over weights of 64 KiB."""
    monkeypatch.setattr(one_row_speed, "WEIGHT", 2**16)
    monkeypatch.setattr(one_row_speed, "COPIES", 2)
    seen: dict[str, Any] = {}

    def timed(dtype: torch.dtype, product: Any, reduction: Any) -> Speeds:
        x, weight = torch.randn(1, 1024, dtype=dtype), torch.randn(16, 1024, dtype=dtype)
        for name, call in (("product", product), ("reduction", reduction)):
            y = call(x, weight)
            torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-3)
            assert y.dtype == dtype
            seen[name] = y
        seen["speeds"] = real(dtype, product, reduction)
        return seen["speeds"]

    real = one_row_speed._timed
    monkeypatch.setattr(one_row_speed, "_timed", timed)
    ask = partial(one_row_speed.why_a_product, torch.empty(4, 4))
    if mode == "as it is":
        ask()
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with torch.autocast("cpu", torch.bfloat16), FakeTensorMode():
            ask()
    speeds = seen["speeds"]
    assert speeds.reduction > 0 and speeds.product > 0 and speeds.ratio > 0
