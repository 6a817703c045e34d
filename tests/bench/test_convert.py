"""What bench/convert.py relies on: a checkpoint that converts, and samples that judge themselves."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxfuse.runtime.convert import differences
from fxfuse.runtime.plan import plan

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("convert")
    monkeypatch.setattr(module, "HIDDEN", 16)
    monkeypatch.setattr(module, "INNER", 24)
    yield module


def test_the_checkpoint_is_one_that_fxfuse_merges(bench: Any, tmp_path: Path) -> None:
    size = bench.write_checkpoint(tmp_path / "source", 1.3)
    assert size == sum(f.stat().st_size for f in (tmp_path / "source").glob("*.safetensors")) - sum(
        8 + int.from_bytes(f.read_bytes()[:8], "little") for f in (tmp_path / "source").glob("*.safetensors")
    )
    assert len(plan(tmp_path / "source")) == 3 + 2 + 1


def test_samples_copy_and_convert_anew_and_notice_a_wrong_result(bench: Any, tmp_path: Path) -> None:
    options = SimpleNamespace(folder=tmp_path, gigabytes=0.9, layout=["sglang"])
    for case in bench.cases(options):
        copy, convert = case.peers
        assert not convert.fused_calls()
        assert not copy.output_matched()
        for _ in range(2):
            assert copy.sample() > 0
            assert convert.sample() > 0
        assert convert.fused_calls() == 2
        assert copy.output_matched()
        assert convert.output_matched()
        home = next(tmp_path.iterdir())
        assert list(differences(home / "source", home / "copied")) == []
        file = next((home / "converted").glob("*.safetensors"))
        whole = bytearray(file.read_bytes())
        whole[-1] ^= 1
        file.write_bytes(whole)
        assert not convert.output_matched()
        assert json.loads((home / "source" / "config.json").read_text())["num_hidden_layers"] == 2
    assert not list(tmp_path.iterdir())
