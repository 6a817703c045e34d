"""Graphs lowered for cuda, run on a CPU by the references: what they hold, and what they compute."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3_5ForCausalLM, StaticCache

import fxfuse
from fxfuse.passes import pipeline
from fxfuse.passes.program import Program, module_path
from fxfuse.runtime.launches import blocks_of
from fxfuse.runtime.shapes import text_config
from fxfuse.testing import assert_equivalent

Make = Callable[..., Any]
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=96),
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


def operators(program: Program) -> Counter[str]:
    names = (str(node.target) for node in program.graph.nodes)
    return Counter(name.split(".")[1] for name in names if name.startswith("fxfuse."))


def assert_equal_steps(
    model: Any, cache: str, prompt: Tensor, mask: Tensor | None = None, passes: Any = "default"
) -> None:
    plain = copy.deepcopy(model)
    expected = steps(plain, CACHES[cache](plain), prompt, mask)
    fxfuse.optimize(model, inner="eager", target="cuda", passes=passes)
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
    several = operators(graphs[2])
    assert several["causal_conv1d_update"] == several["chunk_gated_delta_rule"] == 1
    assert not [cat for cat in graphs[2].calls("aten.cat.default") if "linear_attn" in module_path(cat)]
    assert rounding(graphs) == {"fxfuse.gdn_gates.default": {False}, "fxfuse.gdn_decode.default": {False}}
    assert not model.optimization_report.misses


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        ("contiguous", "static"),
        ("interleaved", "dynamic"),
        pytest.param("contiguous", "dynamic", marks=slow),
        pytest.param("interleaved", "static", marks=slow),
    ],
)
def test_prompts_with_padding_on_the_left_give_what_the_model_gives(
    make_model: Make, make_next: Make, ids: Tensor, cache: str, kind: str, graphs: list[Program]
) -> None:
    mask = torch.ones(ids.shape, dtype=torch.long)
    mask[1, :4] = 0
    make = make_model if kind == "contiguous" else make_next
    model = make(num_attention_heads=4, num_key_value_heads=2)
    without = steps(copy.deepcopy(model), CACHES[cache](model), ids)
    with_mask = steps(copy.deepcopy(model), CACHES[cache](model), ids, mask)
    assert not torch.allclose(without[-1][1], with_mask[-1][1], rtol=1e-3, atol=1e-3)
    assert_equal_steps(model, cache, ids, mask)
    assert operators(graphs[1])["gdn_decode"] == 1
    assert not model.optimization_report.misses


def test_interleaved_projections_are_read_where_they_lie(
    make_next: Make, ids: Tensor, graphs: list[Program]
) -> None:
    assert_equal_steps(make_next(), "dynamic", ids)
    (decode,) = (g for g in graphs if operators(g)["gdn_decode"])
    (step,) = decode.calls("fxfuse.gdn_decode.default")
    row = next(n for n in decode.calls("aten.linear.default") if n.meta["val"].shape[-1] > 64)
    storage = row.meta["val"].untyped_storage()._cdata
    assert all(n.meta["val"].untyped_storage()._cdata == storage for n in step.args[:6])


WITHOUT_THE_WHOLE_STEP = [
    p.name for p in pipeline.selected("default", "eager", "cuda") if p.name != "gdn_decode"
]


@pytest.mark.parametrize("cache", CACHES)
def test_the_parts_of_a_step_are_lowered_where_the_whole_is_not(
    make_model: Make, ids: Tensor, cache: str, graphs: list[Program]
) -> None:
    model = make_model()
    assert_equal_steps(model, cache, ids, passes=WITHOUT_THE_WHOLE_STEP)
    decode = operators(graphs[1])
    parts = ("causal_conv1d_update", "gdn_gates", "recurrent_gated_delta_rule", "gated_rms_norm")
    assert [decode[name] for name in parts] == [1, 1, 1, 1]
    assert not model.optimization_report.misses
    (block,) = (b for b in blocks_of(graphs[1].graph) if b.kind == "linear_attn")
    assert len(block.launches) == 7, block


def test_heads_that_fit_no_program_are_decoded_by_parts(
    make_model: Make, ids: Tensor, graphs: list[Program]
) -> None:
    model = make_model(linear_key_head_dim=136, linear_value_head_dim=136)
    assert_equal_steps(model, "static", ids)
    assert operators(graphs[1])["recurrent_gated_delta_rule"] == 1
    (miss,) = model.optimization_report.misses
    assert "a state of 136 x 136 does not fit the registers" in miss.reason


class Steps(nn.Module):
    """Logits of a prompt, of two tokens one by one and of several at once, and the states after them."""

    def __init__(self, model: nn.Module, cache: str) -> None:
        super().__init__()
        self.model, self.cache, self.config = model, cache, model.config

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        cache, logits, start = CACHES[self.cache](self.model), [], 0
        for length in (70, 1, 1, 5):
            given = ids[:, start : start + length]
            logits.append(self.model(given, past_key_values=cache, use_cache=True).logits)
            start += length
        return *logits, *(tensor(layer.recurrent_states) for layer in cache.layers[:3])


def tensor(states: Any) -> Tensor:
    """A layer's state, which transformers keeps by number since 5.18."""
    return states if isinstance(states, Tensor) else states[0]


@pytest.mark.parametrize("cache", CACHES)
def test_lowered_graphs_in_bfloat16_are_no_less_exact_than_eager(cache: str) -> None:
    torch.manual_seed(0)
    plain = Qwen3_5ForCausalLM(text_config("0.8b", num_hidden_layers=4, vocab_size=2048)).eval().bfloat16()
    model = copy.deepcopy(plain).optimize(inner="eager", target="cuda")
    ids = torch.randint(1, 2048, (2, 77), generator=torch.Generator().manual_seed(0))
    report = assert_equivalent(
        Steps(plain, cache),
        Steps(model, cache),
        ids,
        logits=("0", "1", "2", "3"),
        must_run=lambda: model.optimization_report.calls,
    )
    assert len(report.comparisons) >= 7
    assert not model.optimization_report.misses


def test_one_switch_rounds_the_rate_as_the_model_does(
    make_model: Make, ids: Tensor, graphs: list[Program]
) -> None:
    model = make_model().bfloat16()
    fxfuse.optimize(model, inner="eager", target="cuda", round_beta=True)
    steps(model, CACHES["dynamic"](model), ids)
    assert rounding(graphs) == {"fxfuse.gdn_gates.default": {True}, "fxfuse.gdn_decode.default": {True}}
    assert not model.optimization_report.misses


def rounding(graphs: list[Program]) -> dict[str, set[Any]]:
    """What the operators that compute rates are told of rounding them."""
    names = ("fxfuse.gdn_gates.default", "fxfuse.gdn_decode.default")
    return {name: {call.args[-1] for graph in graphs for call in graph.calls(name)} for name in names}


def test_a_strict_model_is_asked_for_the_same_target(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("fxfuse.runtime.optimize.explain", lambda model, **options: asked.update(options))
    fxfuse.optimize(make_model(), target="cuda", inner="eager", strict=True)
    assert asked["target"] == "cuda"
    with pytest.raises(fxfuse.OptionError, match="'auto', 'cuda', 'cpu'"):
        fxfuse.optimize(make_model(), target="tpu")
