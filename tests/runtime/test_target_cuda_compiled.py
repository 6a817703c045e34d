"""Inductor over graphs that are lowered for cuda: operators stay opaque, and the states in place."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph
from transformers import DynamicCache, StaticCache

import fxfuse

Make = Callable[..., Any]
pytestmark = pytest.mark.inductor
COPIES = (
    "aten.clone.",
    "aten.copy.",
    "aten._to_copy.",
    "aten.index_put.",
    "aten.cat.",
    "aten.slice_scatter.",
)


@pytest.fixture()
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """The graphs that Inductor generates code for, after its own passes."""
    from torch._inductor import config, graph

    seen: list[Graph] = []
    lowering = graph.GraphLowering.__init__

    def recording(self: Any, graph_module: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(graph_module.graph)
        lowering(self, graph_module, *args, **kwargs)

    monkeypatch.setattr(graph.GraphLowering, "__init__", recording)
    with config.patch(force_disable_caches=True):
        yield seen


def copies(graph: Graph, shapes: set[tuple[int, ...]]) -> list[str]:
    """Calls that hold a copy of something of these shapes; a write of a tensor onto itself is none."""
    found = []
    for node in graph.nodes:
        value = node.meta.get("val")
        name = str(node.target)
        onto_itself = name == "aten.copy_.default" and node.args[0] is node.args[1]
        copied = name.startswith(COPIES) or (name == "aten.copy_.default" and not onto_itself)
        if copied and isinstance(value, Tensor) and any(list(value.shape) == list(shape) for shape in shapes):
            found.append(node.format_node())
    return found


def state(layer: Any, name: str) -> Tensor:
    value = getattr(layer, name)
    return value if isinstance(value, Tensor) else value[0]  # by number since 5.18


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_states_are_written_in_place_and_never_copied(
    make_model: Make, compiled: list[Graph], cache: str
) -> None:
    model, plain = make_model(), make_model()
    ids = torch.randint(1, 300, (2, 14), generator=torch.Generator().manual_seed(0))
    own = {"static": lambda: StaticCache(config=model.config, max_cache_len=40)}
    make = own.get(cache, lambda: DynamicCache(config=model.config))
    caches = [make(), make()]
    with torch.no_grad():
        for each, past in zip((model, plain), caches, strict=True):
            each(ids[:, :11], past_key_values=past, use_cache=True)
    delta, attention = caches[0].layers
    states = [state(delta, "conv_states"), state(delta, "recurrent_states")]
    states += [attention.keys, attention.values] if cache == "static" else []
    places = [x.data_ptr() for x in states]
    fxfuse.optimize(model, inner="inductor", target="cuda")
    for i in (11, 12, 13):
        with torch.no_grad():
            got = model(ids[:, i : i + 1], past_key_values=caches[0], use_cache=True).logits
            expected = plain(ids[:, i : i + 1], past_key_values=caches[1], use_cache=True).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert model.optimization_report.calls == 3
    calls = {str(node.target) for graph in compiled for node in graph.nodes}
    assert {"fxfuse.gdn_decode.default", "fxfuse.qk_norm_rope_gate.default"} <= calls
    assert [line for graph in compiled for line in copies(graph, {tuple(x.shape) for x in states})] == []
    assert [x.data_ptr() for x in states] == places
    theirs = [state(caches[1].layers[0], name) for name in ("conv_states", "recurrent_states")]
    torch.testing.assert_close(states[:2], theirs, rtol=1e-4, atol=1e-5)
