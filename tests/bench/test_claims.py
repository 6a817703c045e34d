"""Every benchmark of models runs at the tiny size: ours ran, outputs were right, and all is written."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fxfuse
from fxfuse.cli import app
from fxfuse.passes.outcome import Match

Bench = Callable[[str], Any]
BENCH = Path(__file__).parents[2] / "bench"
QUICK = ["--size", "tiny", "--dtype", "float32", "--rounds", "1", "--warmup", "1"]
NO_COMPILER = ["--inner", "eager", "--peers"]
PLOTS = importlib.util.find_spec("matplotlib") is not None


def run(bench: Bench, name: str, folder: Path, *arguments: str) -> Any:
    """The report of a benchmark, run in this process, once everything every claim needs is seen in it."""
    file, picture = folder / f"{name}.json", folder / f"{name}.png"
    plot = ["--plot", str(picture)] if PLOTS else []
    code = bench(name).main([*QUICK, *arguments, "--json", str(file), *plot])
    report = bench("harness").BenchReport.from_json(file.read_text())
    assert code == 0
    assert report.results
    assert all(row.output_matched for row in report.results)
    assert any(row.fused_expected for row in report.results)
    assert all(row.ran_fused for row in report.results if row.fused_expected)
    assert all(row.bandwidth_fraction or row.compute_fraction for row in report.results)
    assert not PLOTS or picture.read_bytes().startswith(b"\x89PNG")
    return report


@pytest.fixture
def limits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits take seconds to measure, and are measured in tests of the harness."""
    harness = bench("harness")
    monkeypatch.setattr(harness, "limits", lambda dtypes, device: harness.Limits(10.0, {"float32": 100.0}))


def test_generate(bench: Bench, tmp_path: Path, limits: None) -> None:
    report = run(
        bench,
        "generate",
        tmp_path,
        *NO_COMPILER,
        "--batches",
        "2",
        "--tokens",
        "4",
        "--cache",
        "DynamicCache",
    )
    assert [row.peer for row in report.results] == ["eager", "fxfuse"]
    for row in report.results:
        assert set(row.figures) == {"TTFT ms", "ms/token", "tokens/s"}
        assert row.figures["tokens/s"] == pytest.approx(2 * 4 / row.seconds)


def test_prefill(bench: Bench, tmp_path: Path, limits: None) -> None:
    report = run(bench, "prefill", tmp_path, *NO_COMPILER, "--prompt", "70")
    assert all(row.compute_fraction > 0 for row in report.results)


def test_moe_names_the_ways_that_do_not_run_here(bench: Bench, tmp_path: Path, limits: None) -> None:
    report = run(bench, "moe", tmp_path, *NO_COMPILER, "--tokens", "4")
    peers = [row.peer for row in report.results]
    assert peers[0] == "eager eager" and peers[-1] == "fxfuse"
    skipped = [row.case.rpartition(" ")[2] for row in report.skipped]
    assert {*(peer.partition(" ")[2] for peer in peers[:-1]), *skipped} == set(bench("moe").WAYS)
    assert all(row.reason for row in report.skipped)


def test_train_says_why_lora_was_left_out(
    bench: Bench, tmp_path: Path, limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = bench("train")
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.modules[__name__], "PLOTS", False)  # looked for in the same way
    report = run(bench, "train", tmp_path, *NO_COMPILER, "--prompt", "12")
    assert [row.case.rpartition(", ")[2] for row in report.results] == ["full step"] * 2
    (skipped,) = report.skipped
    assert skipped.case.endswith("LoRA step")
    assert "pip install peft" in skipped.reason


@pytest.mark.slow
def test_a_step_of_lora(bench: Bench, tmp_path: Path, limits: None) -> None:
    pytest.importorskip("peft")
    report = run(bench, "train", tmp_path, *NO_COMPILER, "--prompt", "12", "--what", "lora")
    assert not report.skipped


@pytest.mark.slow
def test_decode_with_both_caches(bench: Bench, tmp_path: Path, limits: None) -> None:
    report = run(bench, "decode", tmp_path, *NO_COMPILER, "--tokens", "4")
    assert len(report.results) == 4


@pytest.mark.slow
def test_ablation_leaves_out_all_passes_and_then_each_that_finds_something(
    bench: Bench, tmp_path: Path, limits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, found = bench("ablation"), fxfuse.explain

    def with_layouts(model: Any, **options: Any) -> fxfuse.Report:  # which this model has nothing of
        report = found(model, **options)
        assert not report.graphs[0].outcomes["layout_chains"].matches
        report.graphs[0].outcomes["layout_chains"].matches += [Match("layout_chains", "", (), "")]
        return report

    def peers(folder: str) -> list[str]:
        (tmp_path / folder).mkdir()
        report = run(bench, "ablation", tmp_path / folder, *NO_COMPILER, "--tokens", "4")
        return [row.ratios[0].against for row in report.results if row.peer == "fxfuse"][::2]

    assert peers("one") == ["no passes"]
    monkeypatch.setattr(module.fxfuse, "explain", with_layouts)
    assert peers("two") == ["no passes", "without same_input_linears", "without layout_chains"]


@pytest.mark.slow
def test_scaling(bench: Bench, tmp_path: Path, limits: None) -> None:
    report = run(bench, "scaling", tmp_path, *NO_COMPILER, "--tokens", "4")
    assert len({row.case for row in report.results}) == 5


@pytest.mark.slow
def test_compile_time_reports_break_even_cold_and_warm(bench: Bench, tmp_path: Path, limits: None) -> None:
    report = run(bench, "compile_time", tmp_path, *NO_COMPILER, "--tokens", "4")
    assert [row.case.rpartition(", ")[2] for row in report.results] == ["cold"] * 3 + ["warm"] * 3
    assert all({"1st token s", "Dynamo s", "ms/token"} <= set(row.figures) for row in report.results)
    assert all((row.figures["Dynamo s"] > 0) == row.fused_expected for row in report.results)


@pytest.mark.slow
def test_packing_takes_less_memory_than_a_copy(bench: Bench, tmp_path: Path, limits: None) -> None:
    report = run(bench, "memory", tmp_path, *NO_COMPILER, "--size", "small", "--prompt", "8")
    rows = {row.peer: row for row in report.results}
    merged = float(rows["fxfuse packing"].case.partition("(")[2].partition(" ")[0])
    assert rows["fused copy"].figures["held MB"] > 0.9 * merged
    assert rows["fxfuse packing"].figures["held MB"] < 0.2 * merged


@pytest.mark.slow
@pytest.mark.inductor
def test_one_command_runs_all_of_it(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "all.py"), "--size", "tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    assert {file.stem for file in folder.glob("*.txt")} == {*_names()}
    # kernels are only compiled here, not timed
    assert {file.stem for file in folder.glob("*.json")} == {*_names()} - {"kernels"}


def test_everything_that_all_runs_exists_and_takes_its_arguments(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = bench("all")
    for device in ("cpu", "cuda"):
        for size in ("tiny", "0.8b"):
            options = every.parser().parse_args(["--device", device, "--size", size])
            chosen = every.runs(options)
            assert {*chosen} - {*every.NAMES} == (
                {*every.ON_CUDA} if (device, size) == ("cuda", "0.8b") else set()
            )
            for name, (script, own) in chosen.items():
                given = every.arguments_of(name, options, Path("results"))
                bench(script).parser().parse_args(given)
                assert (given[len(given) - len(own) :] == own and f"results/{name}.json" in given) or not own
                if "--compile-only" in given:
                    monkeypatch.setattr(bench(script), "compile_all", lambda options: 0)
                    assert bench(script).main(given) == 0


def test_the_command_lists_what_all_runs_and_nothing_that_is_shared() -> None:
    listed = CliRunner().invoke(app, ["bench"]).output.split()
    assert listed == sorted([*_names(), "all"])


def _names() -> list[str]:
    return sorted(
        file.stem for file in BENCH.glob("*.py") if "\ndef main(" in file.read_text() and file.stem != "all"
    )


def test_all_goes_on_after_a_failure_and_says_so(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = bench("all")
    codes = iter([3, 0])
    monkeypatch.setattr(
        every.subprocess,
        "run",
        lambda command, **more: subprocess.CompletedProcess(command, next(codes), "out", "err"),
    )
    assert every.main(["--out", str(tmp_path), "--only", "decode", "prefill"]) == 1
    text = capsys.readouterr().out
    assert "FAILED (3)" in text and "ok" in text
    (folder,) = tmp_path.iterdir()
    assert (folder / "decode.txt").read_text() == "outerr"
    assert (folder / "prefill.txt").read_text() == "out"
