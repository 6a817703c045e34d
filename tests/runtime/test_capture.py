"""Capturing leaves the process as it was, and threads do not see each other's captures."""

import copy
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import fxfuse

Make = Callable[..., Any]

PLAIN_GRAPH = """
    import json, sys, torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    with_us = sys.argv[1] == "with"
    config = Qwen3_5TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"], num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2,
    )
    model, ids = Qwen3_5ForCausalLM(config).eval(), torch.ones(1, 9, dtype=torch.long)
    graphs = []

    def note(graph_module, inputs):
        graphs.append([getattr(n.target, "__name__", str(n.target)) for n in graph_module.graph.nodes])
        return graph_module.forward

    with torch.no_grad():
        if with_us:
            import copy, fxfuse
            other = fxfuse.optimize(copy.deepcopy(model), inner="eager")
            other(ids)
            assert other.optimization_report.calls == 1
        torch.compile(model, backend=note)(ids)
        if with_us:
            other(ids)
    limit = torch._dynamo.config.recompile_limit
    print(json.dumps({"graphs": graphs, "limit": limit}))
"""


def plain_graph(which: str) -> Any:
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PLAIN_GRAPH), which], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


def test_a_plain_compile_gets_the_same_graph_as_in_a_process_without_us() -> None:
    ours, without = plain_graph("with"), plain_graph("without")
    assert ours == without
    assert len(without["graphs"]) == 1 and len(without["graphs"][0]) > 100
    assert not any("fxfuse" in target for target in ours["graphs"][0])


def test_the_delta_rule_is_one_node_for_us_whatever_the_length(make_model: Make) -> None:
    from fxfuse.runtime import inner

    kept: list[GraphModule] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "compile_graph", lambda _, __, graph, ___: kept.append(graph) or graph)
        model = make_model().optimize(inner="eager")
        plain = copy.deepcopy(model)
        for length in (70, 200):
            ids = torch.ones(1, length, dtype=torch.long)
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-4)
    assert len(model.optimization_report.graphs) == 1
    targets = [str(node.target) for graph in kept for node in graph.graph.nodes]
    assert sum("fxfuse.chunk_gated_delta_rule" in target for target in targets) == 1


def test_two_threads_may_capture_while_a_third_compiles_plainly(
    make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor]
) -> None:
    models = [make_model(seed=seed) for seed in range(3)]
    expected = [plain_logits(model, prompt) for model in models]
    plain_targets: list[str] = []

    def note(graph_module: GraphModule, inputs: Any) -> Callable[..., Any]:
        plain_targets.extend(str(node.target) for node in graph_module.graph.nodes)
        return graph_module.forward

    calls = [
        models[0].optimize(inner="eager"),
        models[1].optimize(inner="aot_eager"),
        torch.compile(models[2], backend=note),
    ]
    own = [prompt.clone() for _ in models]
    got: dict[int, Tensor] = {}
    errors: list[BaseException] = []
    barrier = threading.Barrier(3, timeout=60)

    def run(i: int) -> None:
        try:
            barrier.wait()
            with torch.no_grad():
                got[i] = calls[i](own[i]).logits
                for _ in range(10):
                    calls[i](own[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # with models that share a code object, every other run fails so
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    for i, value in enumerate(expected):
        torch.testing.assert_close(got[i], value, atol=1e-5, rtol=1e-4)
    for model in models[:2]:
        report = model.optimization_report
        assert report.calls == 11 and report.matched == 4 and not report.misses
        assert len(report.graphs) == 1
    assert models[2].optimization_report is None
    assert plain_targets and not any("fxfuse" in target for target in plain_targets)


def test_other_compilations_of_the_class_do_not_count_against_a_model(
    make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor], request: pytest.FixtureRequest
) -> None:
    """Past its limit of graphs for one code object, Dynamo leaves that code alone until it is reset."""
    request.addfinalizer(torch._dynamo.reset)
    with torch.no_grad():
        for seed in range(torch._dynamo.config.recompile_limit + 2):
            model = make_model(seed=seed, layers=("full_attention",))
            torch.compile(model, backend=lambda graph_module, _: graph_module.forward)(prompt)
        late = make_model(seed=99)
        expected = plain_logits(late, prompt)
        late.optimize(inner="eager", report="off")
        torch.testing.assert_close(late(prompt).logits, expected, atol=1e-5, rtol=1e-4)
    assert late.optimization_report.calls == 1 and not late.optimization_report.notes


def test_the_graph_that_dynamo_made_is_not_changed(make_model: Make, prompt: Tensor) -> None:
    from fxfuse.runtime.backend import backend

    seen: list[tuple[str, str]] = []

    def between(graph_module: GraphModule, inputs: Any) -> Callable[..., Any]:
        before = str(graph_module.graph)
        call = backend(graph_module, inputs, options={"inner": "eager"})
        seen.append((before, str(graph_module.graph)))
        return call

    model = make_model(layers=("full_attention",))
    with torch.no_grad():
        torch.compile(model, backend=between)(prompt)
    fxfuse.deoptimize(model)
    assert len(seen) == 1 and seen[0][0] == seen[0][1]


@pytest.mark.parametrize("ours", [True, False])
def test_a_compile_around_an_optimised_model_answers_right(
    make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor], ours: bool
) -> None:
    """generate()'s own compilation is around `__call__`, and ours wins; another's takes the forward."""
    model = make_model(layers=("full_attention",)).optimize(inner="eager")

    def outer(ids: Tensor) -> Any:
        return model(ids)

    call = torch.compile(model.__call__ if ours else outer, backend="eager")
    with torch.no_grad():
        got = call(prompt).logits
    torch.testing.assert_close(got, plain_logits(model, prompt), atol=1e-5, rtol=1e-4)
    assert (model.optimization_report.calls == 1) is ours


def test_a_call_leaves_no_mark_on_the_callers_tensors(make_model: Make, prompt: Tensor) -> None:
    model = make_model(layers=("full_attention",)).optimize(inner="eager")
    ids, mask = prompt.clone(), torch.ones_like(prompt)
    before = [sorted(vars(t)) for t in (ids, mask)]
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        held = cache.layers[0].keys
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert [sorted(vars(t)) for t in (ids, mask)] == before and not vars(held)
    assert len(model.optimization_report.graphs) == 2
