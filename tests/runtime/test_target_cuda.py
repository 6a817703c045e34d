"""Graphs lowered for cuda, run on a CPU by the references: what they hold, and what they compute."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3NextConfig, Qwen3NextForCausalLM, StaticCache

import fxfuse
from fxfuse.passes import pipeline
from fxfuse.passes.program import Program

Make = Callable[..., Any]
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
}


def steps(model: Any, cache: Any, prompt: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Logits of a prompt, of two tokens one by one, and of several at once."""
    logits, start = [], 0
    with torch.no_grad():
        for length in (11, 1, 1, 5):
            ids = prompt[:, start : start + length]
            start += length
            given = {} if mask is None else {"attention_mask": mask[:, :start]}
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
            logits.append(out.logits.clone())
    return logits


@pytest.fixture()
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that passes have rewritten, as they are compiled."""
    seen: list[Program] = []
    apply = pipeline.apply

    def recording(*args: Any) -> Any:
        result = apply(*args)
        seen.append(result[0])
        return result

    monkeypatch.setattr(pipeline, "apply", recording)
    return seen


def operators(program: Program) -> Counter[str]:
    names = (str(node.target) for node in program.graph.nodes)
    return Counter(name.split(".")[1] for name in names if name.startswith("fxfuse."))


def assert_equal_steps(model: Any, cache: str, prompt: Tensor, mask: Tensor | None = None) -> None:
    plain = copy.deepcopy(model)
    expected = steps(plain, CACHES[cache](plain), prompt, mask)
    fxfuse.optimize(model, inner="eager", target="cuda")
    got = steps(model, CACHES[cache](model), prompt, mask)
    assert model.optimization_report.calls == len(got)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(1, 300, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("cache", CACHES)
def test_the_lowered_graphs_compute_what_the_model_does(
    make_model: Make, ids: Tensor, cache: str, graphs: list[Program]
) -> None:
    model = make_model()
    assert_equal_steps(model, cache, ids)
    decode = operators(graphs[1])
    assert decode["gdn_decode"] == 1
    assert not model.optimization_report.misses


def test_interleaved_projections_are_read_where_they_lie(ids: Tensor, graphs: list[Program]) -> None:
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        mlp_only_layers=[0, 1],
        num_experts=0,
    )
    assert_equal_steps(Qwen3NextForCausalLM(config).eval(), "dynamic", ids)
    (decode,) = (g for g in graphs if operators(g)["gdn_decode"])
    (step,) = decode.calls("fxfuse.gdn_decode.default")
    row = next(n for n in decode.calls("aten.linear.default") if n.meta["val"].shape[-1] > 64)
    storage = row.meta["val"].untyped_storage()._cdata
    assert all(n.meta["val"].untyped_storage()._cdata == storage for n in step.args[:6])


def test_a_strict_model_is_asked_for_the_same_target(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("fxfuse.runtime.explain.explain", lambda model, **options: asked.update(options))
    fxfuse.optimize(make_model(), target="cuda", inner="eager", strict=True)
    assert asked["target"] == "cuda"
    with pytest.raises(fxfuse.OptionError, match="'auto', 'cuda', 'cpu'"):
        fxfuse.optimize(make_model(), target="tpu")
