"""What bench/plan.py relies on: samples that count what they made, in memory of their own."""

import importlib
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("plan")


def test_a_sample_plans_every_expert_and_says_how_much_memory_it_took(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench, "in_process", lambda file, options, peer: bench.child(Namespace(size=options.size, peer=peer))
    )
    (case,) = bench.cases(SimpleNamespace(size="tiny"))
    baseline, ours = case.peers
    assert baseline.sample() > 0
    assert ours.sample() > 0
    assert ours.fused_calls() == 1
    assert ours.output_matched()
    assert 0 < ours.figures()["peak GB"] < 8
    monkeypatch.setitem(bench.SIZES, "tiny", (4, 15))
    (fewer,) = bench.cases(SimpleNamespace(size="tiny"))
    monkeypatch.setitem(bench.SIZES, "tiny", (4, 16))
    fewer.peers[1].sample()
    assert not fewer.peers[1].output_matched()
