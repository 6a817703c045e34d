"""The demo's judgement: each thing that can differ makes it say so, and a loss is called a loss."""

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, Qwen3_5ForCausalLM
from typer.testing import CliRunner

from fxfuse.cli import app
from fxfuse.errors import CheckpointError
from fxfuse.runtime import demo
from fxfuse.runtime.demonstration import (
    COMPILE,
    EAGER,
    FXFUSE,
    Demonstration,
    Timing,
    differing_tensors,
    equal_prefix,
    pays_after,
    rms_error,
)
from fxfuse.runtime.generation import generate
from fxfuse.runtime.report import GraphRecord, Report
from fxfuse.runtime.shapes import text_config


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = text_config(
        "small",
        hidden_size=64,
        intermediate_size=96,
        vocab_size=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        eos_token_id=7,
        pad_token_id=7,
    )
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("toy"))
    Qwen3_5ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(toy: str) -> Any:
    return demo.load(toy, torch.float32)


PROMPT = torch.arange(20)[None]


def good(**changes: Any) -> Demonstration:
    timings = {
        name: Timing(name, ms / 1e3, 0.1, 10.0, 7) for name, ms in ((EAGER, 20), (COMPILE, 16), (FXFUSE, 8))
    }
    fine = Demonstration("folder", "Model", "CPU", 48, 64, equal_tokens=64, distinct_tokens=60)
    fine = replace(fine, eager_error=0.01, fxfuse_error=0.0105, error_limit=1.1, calls={"bf16": 9, "fp32": 9})
    return replace(fine, timings=timings, report=Report(), **changes)


class TestVerdict:
    def test_equal_and_faster_names_the_fastest_other_way(self) -> None:
        assert good().differences == []
        assert (
            good().verdict == "EQUAL AND FASTER: 2.00 times the speed of torch.compile, the fastest other way"
        )

    def test_a_loss_is_called_one(self) -> None:
        slow = good()
        slow.timings[FXFUSE].seconds_per_token = 0.032
        assert slow.verdict.startswith("EQUAL BUT SLOWER: 0.50 times the speed of torch.compile")
        assert "a loss" in slow.verdict

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"equal_tokens": 63}, "63 of 64 tokens equal"),
            ({"fxfuse_error": 0.0111}, "error above 1.1 times"),
            ({"fxfuse_error": math.nan}, "error above"),
            ({"eager_error": math.nan}, "error above"),
            ({"calls": {"bf16": 9, "fp32": 0}}, "fp32: the compiled callable never ran"),
            ({"weights_changed": ["a", "b"]}, "2 tensors changed"),
        ],
    )
    def test_each_difference_is_named_and_outweighs_speed(self, change: dict[str, Any], words: str) -> None:
        result = good(**change)
        assert len(result.differences) == 1
        assert words in result.differences[0]
        assert result.verdict.startswith("DIFFERS: ")
        assert words in result.verdict

    def test_an_unfinished_run_is_not_a_success(self) -> None:
        assert Demonstration("folder", "Model", "CPU", 48, 64).differences

    def test_json_has_the_verdict_and_the_report(self) -> None:
        data = json.loads(good().to_json())
        assert data["verdict"].startswith("EQUAL")
        assert data["differences"] == []
        assert data["report"]["versions"]["torch"] == torch.__version__
        assert data["timings"][FXFUSE]["seconds_per_token"] == 0.008


class TestMeasures:
    @pytest.mark.parametrize(
        ("seconds", "before", "after", "tokens"),
        [
            (10, 0.02, 0.01, 1000),
            (10, 0.02, 0.02, None),
            (10, 0.02, 0.03, None),
            (0, 0.02, 0.01, 0),
            (1, 4, 1, 1),
        ],
    )
    def test_pays_after(self, seconds: float, before: float, after: float, tokens: int | None) -> None:
        assert pays_after(seconds, before, after) == tokens

    def test_rms_error(self) -> None:
        assert rms_error(torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0])) == pytest.approx(12.5**0.5)

    def test_equal_tokens_are_counted_up_to_the_first_difference(self) -> None:
        expected = torch.tensor([[1, 2, 3]])
        assert equal_prefix(expected, expected) == 3
        assert equal_prefix(torch.tensor([[1, 9, 3]]), expected) == 1

    @pytest.mark.parametrize(
        "changed",
        [
            {"w": torch.tensor([0.0, 1.0]), "n": torch.tensor(math.nan)},
            {"w": torch.tensor([-0.0, 1.0], dtype=torch.float64), "n": torch.tensor(math.nan)},
            {"w": torch.tensor([[-0.0, 1.0]]), "n": torch.tensor(math.nan)},
            {"n": torch.tensor(math.nan)},
        ],
    )
    def test_tensors_differ_by_a_bit_a_dtype_a_shape_or_absence(self, changed: dict[str, Tensor]) -> None:
        stored = {"w": torch.tensor([-0.0, 1.0]), "n": torch.tensor(math.nan)}
        assert differing_tensors({k: v.clone() for k, v in stored.items()}, stored) == []
        assert differing_tensors(changed, stored) == ["w"]
        assert differing_tensors(stored, changed) == ["w"]


class TestGenerate:
    def test_torch_compile_gets_the_one_token_steps_and_is_gone_afterwards(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lengths: list[int] = []

        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                lengths.append(kwargs["input_ids"].shape[1])
                return function(*args, **kwargs)

            return call

        monkeypatch.setattr(torch, "compile", compiled)
        expected = generate(model, PROMPT, 6)
        found = demo._generate_compiled(model, demo._compiled_decode(model), PROMPT, 6)
        assert torch.equal(found.tokens, expected.tokens)
        assert lengths == [1] * 5
        assert "forward" not in vars(model)


def test_the_cache_is_cold_and_the_variables_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    folders = []
    for _ in range(2):
        with demo._cold_cache():
            folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            assert "TRITON_CACHE_DIR" in os.environ
    assert len({"before", *folders}) == 3
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before"
    assert "TRITON_CACHE_DIR" not in os.environ


class TestRun:
    """The whole run on a toy, with stand-ins for what compiles."""

    @pytest.fixture
    def optimized(self, monkeypatch: pytest.MonkeyPatch) -> list[PreTrainedModel]:
        """Models given to optimize(); they stay as they are, and their reports say that a graph ran."""
        models: list[PreTrainedModel] = []

        def optimize(self: PreTrainedModel, inner: str) -> PreTrainedModel:
            assert inner == "eager"
            models.append(self)
            return self

        def report(self: PreTrainedModel) -> Report:
            return Report([GraphRecord("decode", 10, 8, "eager", {}, calls=3)])

        monkeypatch.setattr(PreTrainedModel, "optimize", optimize, raising=False)
        monkeypatch.setattr(PreTrainedModel, "deoptimize", lambda self: self, raising=False)
        monkeypatch.setattr(PreTrainedModel, "optimization_report", property(report), raising=False)
        monkeypatch.setattr(demo, "_why_inductor_fails", lambda device: "no C++ compiler")
        return models

    @staticmethod
    def run(toy: str) -> tuple[Demonstration, str]:
        text = io.StringIO()
        return demo.run(toy, tokens=6, out=Console(file=text, width=200)), text.getvalue()

    def test_an_equal_model_passes(self, toy: str, optimized: list[PreTrainedModel]) -> None:
        result, text = self.run(toy)
        assert result.differences == []
        assert [model.dtype for model in optimized] == [torch.bfloat16, torch.float32]
        assert result.fxfuse_error == result.eager_error > 0
        assert result.error_limit == 1.5, "the width of the toy"
        assert "6 of 6" in text
        assert "bit-equal to the files" in text
        assert text.rstrip().splitlines()[-1] == result.verdict

    def test_without_a_compiler_the_row_of_torch_compile_says_so(
        self, toy: str, optimized: list[PreTrainedModel]
    ) -> None:
        result, text = self.run(toy)
        assert set(result.timings) == {EAGER, FXFUSE}
        assert "torch.compile: not timed. no C++ compiler" in text
        assert 'inner="eager"' in text

    @pytest.mark.parametrize("load", [0.0, 1e3])
    def test_a_busy_machine_is_mentioned(
        self, load: float, toy: str, optimized: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
        assert ("busy" in self.run(toy)[1]) == (load > 0)

    def test_a_model_that_computes_something_else_fails(
        self, toy: str, optimized: list[PreTrainedModel], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def spoil(self: PreTrainedModel, inner: str) -> PreTrainedModel:
            with torch.no_grad():
                self.get_decoder().norm.weight.sub_(2)
            return self

        monkeypatch.setattr(PreTrainedModel, "optimize", spoil)
        result, text = self.run(toy)
        assert result.equal_tokens < 6
        assert result.weights_changed == ["model.norm.weight"]
        assert len(result.differences) == 3
        assert "DIFFERS" in text

    def test_a_path_without_a_model_is_a_checkpoint_error(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"config\.json: missing"):
            demo.run(tmp_path)


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"equal_tokens": 0}, 1)])
def test_the_command_exits_with_1_if_anything_differs(
    changes: dict[str, int], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def run(checkpoint: str | None, **options: Any) -> Demonstration:
        given.update(options, checkpoint=checkpoint)
        return good(**changes)

    monkeypatch.setattr(demo, "run", run)
    monkeypatch.delenv("FXFUSE_CACHE", raising=False)
    file = tmp_path / "result.json"
    result = CliRunner().invoke(
        app, ["demo", "folder", "--size", "0.8b", "--tokens", "8", "--json", str(file)]
    )
    assert result.exit_code == code
    assert given == {"checkpoint": "folder", "size": "0.8b", "tokens": 8, "cache": None}
    assert json.loads(file.read_text())["verdict"] == good(**changes).verdict


@pytest.mark.slow
@pytest.mark.inductor
def test_the_small_demo_finds_no_difference_with_a_compiler(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--tokens", "16", "--cache", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "16 of 16" in result.output


@pytest.mark.slow
def test_the_small_demo_finds_no_difference_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    command = [sys.executable, "-m", "fxfuse", "demo", "--tokens", "8", "--cache", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 of 8" in result.stdout
    assert "torch.compile: not timed. Inductor cannot compile here" in result.stdout
