"""What bench/load.py relies on: samples that load, pack and judge themselves."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("load")


@pytest.mark.slow
def test_every_way_packs_the_same_weights_and_says_how_much_memory_it_took(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = SimpleNamespace(folder=tmp_path, cache=tmp_path / "cache", size="small", layout=["hf", "fused"])
    for case in bench.cases(options):
        baseline, *ours = case.peers
        assert [peer.name for peer in ours] == ["load_state_dict, hf", "load_state_dict, fused"]
        for peer in case.peers:
            assert peer.sample() > 0
        assert baseline.fused_calls() == ours[0].fused_calls() == ours[1].fused_calls() > 0
        assert all(peer.output_matched() for peer in case.peers)
    # about 0.18 GB of weights; a second copy of them would show
    assert all(1.5e8 < options.peak_bytes[f"load_state_dict, {layout}"] < 3e8 for layout in ("hf", "fused"))
    assert "GB of weights" in capsys.readouterr().out
