"""CUDA graphs: a decoded token of fixed sizes is recorded, and reads and writes its cache where it is."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache, StaticCache

from fxfuse.runtime import cuda_graphs

Make = Callable[..., Any]


@pytest.fixture()
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool, list[Tensor]]]]:
    """Of each graph that Inductor is given: whether it would be recorded, and its inputs that do not stay."""
    from torch._inductor import compile_fx, config

    seen: list[tuple[bool, list[Tensor]]] = []

    def inner(graph_module: Any, inputs: Any, static_input_idxs: Any = (), **_: Any) -> Any:
        moving = [x for i, x in enumerate(inputs) if i not in static_input_idxs and isinstance(x, Tensor)]
        seen.append((config.triton.cudagraphs, moving))

        def run(values: list[Any]) -> Any:
            return graph_module(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    whole = compile_fx.compile_fx

    def compiling(*args: Any, **kwargs: Any) -> Any:
        return whole(*args, **{"inner_compile": inner, **kwargs})

    monkeypatch.setattr(compile_fx, "compile_fx", compiling)
    torch._dynamo.reset()  # it remembers which sizes varied in another model of the process
    with config.patch(force_disable_caches=True):
        yield seen


@pytest.mark.parametrize(("mode", "target"), [("reduce-overhead", "cuda"), ("max-autotune", "cpu")])
def test_a_token_over_a_static_cache_is_recorded_and_its_cache_stays_where_it_is(
    make_model: Make, prompt: Tensor, compiled: list[Any], mode: str, target: str
) -> None:
    model = make_model().optimize(mode=mode, target=target)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(prompt, past_key_values=cache)
        assert compiled and not any(recorded for recorded, _ in compiled)
        compiled.clear()
        token = prompt[:, -1:].clone(memory_format=torch.contiguous_format)
        model(token, past_key_values=cache)
    ((recorded, moving),) = compiled
    assert recorded
    assert [list(x.shape) for x in moving] == [[1, 1]]  # the token; no weight, no state, no key
    other = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():  # a cache at another address needs no other graph
        model(prompt, past_key_values=other)
        model(token, past_key_values=other)
    assert len(compiled) == 1 and len(model.optimization_report.graphs) == 2
    assert not any("CUDA graph" in note for note in model.optimization_report.notes)


def test_a_cache_that_grows_is_not_recorded_for_each_length(
    make_model: Make, prompt: Tensor, compiled: list[Any]
) -> None:
    model = make_model().optimize(mode="reduce-overhead")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        model(prompt[:, -1:], past_key_values=cache)
    report = model.optimization_report
    assert len(report.graphs) == 2 and compiled and not any(recorded for recorded, _ in compiled)
    assert sum("mode='reduce-overhead' records" in note for note in report.notes) == 1


def test_a_constant_of_the_graph_is_no_obstacle(compiled: list[Any]) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            state.add_(F.linear(x, torch.ones(4, 4)).sum() * torch.tensor([1.0, 2.0, 3.0, 4.0]))
            return F.linear(x, self.a) + F.linear(x, self.b) + state.sum()

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))

    module, x, state = Counts(), torch.ones(1, 1, 4), torch.zeros(2, 3, 4)
    run = torch.compile(module, backend="fxfuse", options={"mode": "reduce-overhead"})
    with torch.no_grad():
        run(x, state)
    assert [(recorded, [list(value.shape) for value in moving]) for recorded, moving in compiled] == [
        (True, [[1, 1, 4]])
    ]


def test_modes_that_do_not_record_stay_as_they_are() -> None:
    def writing(shape: tuple[int, ...]) -> Any:
        return make_fx(lambda x: x.add_(1))(torch.zeros(shape)).graph

    fixed, graph = [torch.zeros(1, 1)], writing((2, 3, 4))
    for mode in (None, "default", "max-autotune-no-cudagraphs"):
        assert cuda_graphs.mode_for(mode, "prefill", fixed, graph) == mode
    assert cuda_graphs.mode_for("max-autotune", "decode", fixed, graph) == "max-autotune"
    assert cuda_graphs.mode_for("max-autotune", "prefill", fixed, graph) == "max-autotune-no-cudagraphs"
    only_a_length = cuda_graphs.mode_for("max-autotune", "decode", fixed, writing(()))
    assert only_a_length == "max-autotune-no-cudagraphs"


def test_a_prompt_of_one_token_makes_its_cache_and_is_not_recorded(
    make_model: Make, prompt: Tensor, compiled: list[Any]
) -> None:
    model = make_model().optimize(mode="reduce-overhead", target="cuda")
    cache, token = StaticCache(config=model.config, max_cache_len=64), torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad():
        model(token, past_key_values=cache)
        assert compiled and not any(recorded for recorded, _ in compiled)
        compiled.clear()
        model(token, past_key_values=cache)
    assert [recorded for recorded, _ in compiled] == [True]


def test_a_thousand_tokens_need_no_graph_beyond_the_first(make_model: Make, prompt: Tensor) -> None:
    tokens = 1000
    model = make_model().optimize(inner="eager", target="cuda")
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + tokens)
    with torch.no_grad():
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        for _ in range(tokens):
            token = model(token, past_key_values=cache).logits.argmax(-1)
    report = model.optimization_report
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    assert report.calls == 1 + tokens and not report.failures
    assert cache.get_seq_length() == prompt.shape[1] + tokens
