"""Graphs are few and stay few: over prompts of many lengths, and in every later round."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import fxfuse
from fxfuse.runtime.varying_lengths import varying

Make = Callable[..., Any]
LENGTHS = (3, 17, 64, 65, 200)
DECODED = 40


def ids(length: int) -> Tensor:
    return torch.randint(1, 300, (1, length), generator=torch.Generator().manual_seed(length))


def a_round(model: Any, cache: str, decoded: int = DECODED) -> None:
    for length in LENGTHS:
        model.generate(
            ids(length),
            do_sample=False,
            max_new_tokens=decoded + 1,
            min_new_tokens=decoded + 1,
            cache_implementation=cache,
        )


def phases(report: fxfuse.Report) -> dict[str, int]:
    found = [graph.phase for graph in report.graphs]
    return {phase: found.count(phase) for phase in ("prefill", "decode")}


@pytest.mark.parametrize(("cache", "prefills", "decodes"), [("static", 2, 2), ("dynamic", 3, 3)])
def test_graphs_are_bounded_over_lengths_and_later_rounds_add_none(
    make_model: Make, cache: str, prefills: int, decodes: int
) -> None:
    model = make_model().optimize(inner="eager")
    counters.clear()
    graphs, calls = [], 0
    for decoded in (DECODED, DECODED, DECODED + 5, DECODED + 7):  # a longer answer is a larger static cache
        a_round(model, cache, decoded)
        report = model.optimization_report
        calls += len(LENGTHS) * (1 + decoded)
        assert report.calls == calls and not report.misses
        assert not counters["graph_break"] and not counters["recompile_limit"]
        graphs.append(counters["stats"]["unique_graphs"])
        assert graphs[-1] == len(report.graphs)
    found = phases(report)
    assert found["prefill"] <= prefills + 1, found  # one more for prompts shorter than the convolution
    assert found["decode"] <= decodes, found
    assert graphs[0] == graphs[1] == graphs[2] == graphs[3]


def test_the_counters_see_what_a_length_for_which_nothing_was_said_costs(make_model: Make) -> None:
    """The bound above is no accident: without our marks on the lengths there are more graphs."""
    model = make_model(layers=("full_attention",)).optimize(inner="eager", dynamic=False)
    counters.clear()
    with torch.no_grad():
        for length in LENGTHS[:3]:
            model(ids(length))
    assert counters["stats"]["unique_graphs"] == len(model.optimization_report.graphs) == 3


def test_a_prompt_that_is_interrupted_leaves_no_marks() -> None:
    class StaticLayer:
        keys, values = torch.zeros(1, 1, 8, 4), None

    ids = torch.zeros(1, 4, dtype=torch.long)
    cache = SimpleNamespace(layers=[StaticLayer()])
    with pytest.raises(KeyboardInterrupt), varying((ids,), {"past_key_values": cache}):
        vars(StaticLayer.keys)["_dynamo_propagated_dynamic_indices"] = {2}  # as Dynamo does
        raise KeyboardInterrupt
    assert vars(ids) == vars(StaticLayer.keys) == {}
