"""Qwen3-Next's grouped projections in the whole model: rewritten in prefill and decode, and never stale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

import fxfuse

GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


SPARSE = {
    "mlp_only_layers": [],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


@pytest.fixture()
def twins(make_next: Callable[..., Any]) -> tuple[Any, Any]:
    return make_next(**SPARSE), make_next(**SPARSE)


@pytest.mark.parametrize("weights", ["auto", "copy"])
def test_tokens_are_equal_and_a_changed_weight_is_seen(
    twins: tuple[Any, Any], prompt: torch.Tensor, weights: str
) -> None:
    plain, model = twins
    model.optimize(inner="eager", weights=weights)
    assert torch.equal(model.generate(prompt, **GENERATE), plain.generate(prompt, **GENERATE))
    report = model.optimization_report
    chains = [row for row in report.rows if row.rule == "layout_chains"]
    assert {(row.phase, row.matched, row.candidates) for row in chains} == {
        ("prefill", 1, 1),
        ("decode", 1, 1),
    }
    assert (report.copied_bytes > 0) == (weights == "copy")
    for each in twins:
        with torch.no_grad():
            each.model.layers[0].linear_attn.in_proj_qkvz.weight.mul_(-1.5)
            each.model.layers[0].linear_attn.in_proj_ba.weight.add_(0.25)
    assert torch.equal(model.generate(prompt, **GENERATE), plain.generate(prompt, **GENERATE))
    assert report.calls == 12


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["auto", "copy"])
def test_all_36_chains_of_the_published_shape_are_rewritten(weights: str) -> None:
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(Qwen3NextConfig(dtype=torch.bfloat16))
    report = fxfuse.explain(model, inner="eager", weights=weights)
    counts: dict[tuple[str, str], int] = {}
    for row in report.rows:
        if row.rule == "layout_chains":
            counts[row.phase, row.detail] = row.matched
            assert row.matched == row.candidates
    assert sorted(counts.values()) == [36, 36]
    assert not report.misses
    prefill, decode = (graph.plan_digest for graph in report.graphs)
    assert prefill == decode


def test_a_copy_leaves_nothing_between_projection_and_convolution(
    twins: tuple[Any, Any], prompt: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walking back from each conv1d to the linear meets no cat but that with the state, and no copy."""
    from fxfuse.runtime import inner

    graphs: list[torch.fx.GraphModule] = []
    original: Callable[..., Any] = inner.compile_graph

    def recording(name: Any, mode: Any, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return original(name, mode, graph, inputs)

    monkeypatch.setattr(inner, "compile_graph", recording)
    _, model = twins
    model.optimize(inner="eager", weights="copy")
    model.generate(prompt, **GENERATE)
    convs = [
        node
        for graph in graphs
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.conv1d.default)
    ]
    assert len(convs) == 2  # of prefill and decode
    for conv in convs:
        path, node = [], conv.args[0]
        while str(node.target) != "aten.linear.default":
            path.append(str(node.target))
            tensors = [n for n in node.all_input_nodes if n.op == "call_function"]
            assert len(tensors) == 1, f"{node} joins {tensors}"
            node = tensors[0]
        assert not {"aten.reshape.default", "aten.clone.default", "aten.contiguous.default"} & set(path)
        assert path.count("aten.cat.default") <= 1  # of one token with the convolution's state, an input
