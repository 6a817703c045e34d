"""The benchmark harness times interleaved, divides the right way round and keeps its JSON form."""

import dataclasses
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fxfuse.errors import OptionError

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """bench/harness.py as the benchmarks import it: from their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("harness")


class FakeClock:
    """Time that passes only when a peer works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: list[float]) -> Callable[[], None]:
        remaining = iter(seconds)

        def function() -> None:
            self.order.append(name)
            self.now += next(remaining)

        return function


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def limit(harness: Any) -> Any:
    return harness.Limits(read_gb_s=10.0, matmul_gflop_s={"float32": 100.0})


def peer(harness: Any, clock: FakeClock, name: str, seconds: list[float], **more: Any) -> Any:
    sample = harness.timed(clock.work(name, seconds), clock=clock)
    return harness.Peer(name, sample, **{"output_matched": lambda: True, **more})


def two_peers(harness: Any, clock: FakeClock, **more: Any) -> Any:
    """Warm-up 9 s and 5 s; then 4, 8, 6 against 2, 2, 6."""
    a = peer(harness, clock, "eager", [9, 4, 8, 6])
    b = peer(harness, clock, "ours", [5, 2, 2, 6], **more)
    return harness.Case("decode", (a, b), ("eager",), unit="token", bytes=2e9, flops=1e11)


def measured(harness: Any, clock: FakeClock, limit: Any, **more: Any) -> Any:
    case = two_peers(harness, clock, **more)
    return harness.measure(case, limit, rounds=3, warmup=1, clock=clock, progress=False)


def report_of(harness: Any, results: Any, limit: Any) -> Any:
    return harness.BenchReport("a claim", harness.machine(), limit, {"size": "small"}, results)


def test_peers_take_turns(harness: Any, clock: FakeClock, limit: Any) -> None:
    measured(harness, clock, limit)
    assert clock.order == ["eager", "ours"] * 4


def test_medians_and_ratios(harness: Any, clock: FakeClock, limit: Any) -> None:
    eager, ours = measured(harness, clock, limit)
    assert (eager.seconds, ours.seconds) == (6, 2)
    assert ours.samples == (2, 2, 6)
    assert (eager.first_seconds, ours.first_seconds) == (9, 5)
    (ratio,) = ours.ratios
    assert ratio == harness.Ratio("eager", of_medians=3.0, lowest=1.0, highest=4.0)
    assert eager.ratios == ()


def test_shares_of_the_limits(harness: Any, clock: FakeClock, limit: Any) -> None:
    _, ours = measured(harness, clock, limit)
    assert ours.bandwidth_fraction == pytest.approx(0.1)  # 2 GB in 2 s of 10 GB/s
    assert ours.compute_fraction == pytest.approx(0.5)  # 100 GFLOP in 2 s of 100 GFLOP/s


def test_a_dtype_without_a_measured_rate_has_no_share(harness: Any, clock: FakeClock) -> None:
    _, ours = measured(harness, clock, harness.Limits(10.0, {"bfloat16": 1.0}))
    assert ours.compute_fraction is None


def test_fused_code_has_to_run_in_every_timed_sample(harness: Any, clock: FakeClock, limit: Any) -> None:
    always = iter(range(100))
    _, ours = measured(harness, clock, limit, fused_calls=lambda: next(always))
    assert ours.ran_fused
    # Two readings a sample; the count stands still in the last one.
    stopping = iter([0, 1, 1, 2, 2, 3, 3, 3])
    results = measured(harness, FakeClock(), limit, fused_calls=lambda: next(stopping))
    assert not results[1].ran_fused
    assert results[1].fused_expected
    assert not results[0].fused_expected
    assert not report_of(harness, results, limit).ok


def test_a_wrong_output_is_carried_to_the_verdict(harness: Any, clock: FakeClock, limit: Any) -> None:
    right = measured(harness, clock, limit)
    wrong = measured(harness, FakeClock(), limit, output_matched=lambda: False)
    assert report_of(harness, right, limit).ok
    assert not wrong[1].output_matched
    assert not report_of(harness, wrong, limit).ok


def test_the_claim_rests_on_the_fastest_baseline(harness: Any, clock: FakeClock, limit: Any) -> None:
    peers = tuple(
        peer(harness, clock, name, [1.0, seconds])
        for name, seconds in (("a", 6.0), ("b", 3.0), ("ours", 2.0))
    )
    case = harness.Case("c", peers, ("a", "b"))
    *_, ours = harness.measure(case, limit, rounds=1, warmup=1, clock=clock, progress=False)
    best = harness.against_fastest(ours)
    assert (best.against, best.of_medians) == ("b", 1.5)


def test_a_baseline_that_is_no_peer_is_refused(harness: Any, clock: FakeClock) -> None:
    only = peer(harness, clock, "eager", [1.0])
    with pytest.raises(OptionError, match="compile"):
        harness.Case("c", (only,), ("compile",))
    with pytest.raises(OptionError, match="one name"):
        harness.Case("c", (only, only), ("eager",))


def test_rounds_have_to_be_positive(harness: Any, clock: FakeClock, limit: Any) -> None:
    with pytest.raises(OptionError, match="rounds=0"):
        harness.measure(two_peers(harness, clock), limit, rounds=0)
    with pytest.raises(OptionError, match="warmup=-1"):
        harness.measure(two_peers(harness, clock), limit, warmup=-1)


def test_without_samples_before_the_first_one_counts(harness: Any, clock: FakeClock, limit: Any) -> None:
    results = harness.measure(
        two_peers(harness, clock), limit, rounds=2, warmup=0, clock=clock, progress=False
    )
    assert [len(result.samples) for result in results] == [2, 2]
    assert all(result.first_seconds >= result.samples[0] for result in results)


def test_json_goes_there_and_back(harness: Any, clock: FakeClock, limit: Any) -> None:
    report = report_of(harness, measured(harness, clock, limit), limit)
    text = report.to_json()
    assert json.loads(text)["schema"] == harness.SCHEMA
    assert harness.BenchReport.from_json(text) == report
    with pytest.raises(OptionError, match="schema 0"):
        harness.BenchReport.from_json(json.dumps({**json.loads(text), "schema": 0}))


def test_a_folder_among_the_settings_is_written_as_text(harness: Any, clock: FakeClock, limit: Any) -> None:
    report = report_of(harness, measured(harness, clock, limit), limit)
    text = dataclasses.replace(report, settings={"folder": Path("a") / "b"}).to_json()
    assert harness.BenchReport.from_json(text).settings == {"folder": str(Path("a") / "b")}


def test_the_printed_report_has_machine_limits_and_every_result(
    harness: Any, clock: FakeClock, limit: Any
) -> None:
    console = Console(record=True, width=200, highlight=False, file=None, quiet=False)
    results = measured(harness, clock, limit, fused_calls=iter(range(100)).__next__)
    with console.capture() as captured:
        report_of(harness, results, limit).print(console)
    text = captured.get()
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    assert "limits: reads 10.0 GB/s, 100 GFLOP/s float32" in text
    assert re.search(r"eager .* 6000\.000", text)
    assert re.search(r"ours .* 2000\.000 .* 3\.00 \(1\.00-4\.00\) .* 10% .* 50% .* yes .* yes", text)
    assert "ours is 3.00x as fast as eager, the fastest baseline (single pairs 1.00 to 4.00)" in text


def test_figures_and_what_was_skipped_are_kept_and_printed(
    harness: Any, clock: FakeClock, limit: Any
) -> None:
    results = measured(harness, clock, limit, figures=lambda: {"tokens/s": 1234.0})
    skipped = (harness.Skipped("LoRA step", "peft is not installed"),)
    report = harness.BenchReport("a claim", harness.machine(), limit, {}, results, skipped=skipped)
    assert harness.BenchReport.from_json(report.to_json()) == report
    console = Console(record=True, width=200, highlight=False)
    with console.capture() as captured:
        report.print(console)
    assert re.search(r"right +tokens/s", captured.get())
    assert re.search(r"ours .* yes +1,234", captured.get())
    assert "LoRA step: skipped, peft is not installed" in captured.get()


def test_limits_of_this_machine_are_positive(harness: Any) -> None:
    assert harness.read_bandwidth(size=2**20, repeats=1) > 0
    assert harness.matmul_rate(torch.float32, size=64, repeats=1) > 0


def test_the_machine_record_is_filled_in(harness: Any) -> None:
    where = harness.machine()
    assert where.cores >= 1
    assert where.cpu
    assert {"python", "torch", "transformers"} <= set(where.versions)


def test_the_body_of_a_benchmark(
    harness: Any, clock: FakeClock, limit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "limits", lambda dtypes, device: limit)
    path = tmp_path / "results.json"

    def run(**more: Any) -> int:
        options = ["--json", str(path), "--rounds", "3", "--warmup", "1"]
        cases = [two_peers(harness, FakeClock(), **more), harness.Skipped("LoRA", "no peft")]
        parser = harness.arguments("What it measures.\nMore.")
        return harness.run("a claim", parser, lambda options: [], lambda options: cases, options)

    assert run() == 0
    report = harness.BenchReport.from_json(path.read_text())
    assert report.settings["rounds"] == 3
    assert report.skipped == (harness.Skipped("LoRA", "no peft"),)
    assert [row.peer for row in report.results] == ["eager", "ours"]
    assert run(output_matched=lambda: False) == 1


def test_plot_writes_a_file_or_says_what_is_missing(
    harness: Any, clock: FakeClock, limit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = report_of(harness, measured(harness, clock, limit), limit)
    path = tmp_path / "bars.png"
    if importlib.util.find_spec("matplotlib"):
        harness.plot(report, path)
        assert path.stat().st_size > 1000
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"fxfuse\[bench\]"):
        harness.plot(report, path)


def test_many_peers_with_long_names_are_printed_whole(harness: Any, clock: FakeClock, limit: Any) -> None:
    rows = measured(harness, clock, limit)
    ours = rows[-1]
    names = [f"a baseline with a long name, number {n}" for n in range(9)]
    others = [dataclasses.replace(ours, peer=name, ratios=()) for name in names]
    ratios = tuple(dataclasses.replace(ours.ratios[0], against=name) for name in names)
    console = Console(record=True, width=80, highlight=False)
    with console.capture() as captured:
        report_of(harness, (*others, dataclasses.replace(ours, ratios=ratios)), limit).print(console)
    text = captured.get()
    assert all(f"x {name}" in text for name in names) and "…" not in text
