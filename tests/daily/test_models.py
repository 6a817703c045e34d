"""Models that people load: all of them answer as before, and what was merged or left alone is said."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ForSequenceClassification,
    Qwen3_5ForTokenClassification,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fxfuse
from fxfuse.runtime import inner
from fxfuse.runtime.optimize import optimization_report

Make = Callable[..., Any]
slow = pytest.mark.slow
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
GDN, ATTENTION, MLP = "linear_attn.in_proj_qkv_z_b_a", "self_attn.q_k_v_proj", "mlp.gate_up_proj"


@pytest.fixture(scope="module")
def sparse(hybrid: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the tiny model with experts in place of the MLP."""
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    }
    return {**{k: v for k, v in hybrid.items() if k != "intermediate_size"}, **experts}


def twins(make: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = make().eval()
    return plain, fxfuse.optimize(copy.deepcopy(plain), **{"inner": "eager", **options})


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(1, 290, (batch, length), generator=torch.Generator().manual_seed(length))


def merged(model: Any) -> set[str]:
    """The fused weights of a model, without the layer's number."""
    matches = (m for g in model.optimization_report.graphs for o in g.outcomes.values() for m in o.matches)
    return {m.where.split(".layers.")[-1].partition(".")[2] for m in matches}


def same_tokens(pair: tuple[Any, Any], call: Callable[[Any], Tensor]) -> None:
    plain, model = pair
    expected = call(plain)
    calls = model.optimization_report.calls
    assert torch.equal(call(model), expected)
    assert model.optimization_report.calls > calls


# Images and video.

VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}
IMAGE, VIDEO, START, END = 290, 291, 292, 293
TOKEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def composite(kind: type, text: dict[str, Any]) -> Any:
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    config = kind.config_class(
        text_config={**text, "rope_parameters": rope}, vision_config=VISION, **TOKEN_IDS
    )
    model = kind(config)
    model.generation_config.pad_token_id = 0
    return model


def pixels(frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Patches as the processor gives them: [patches, 3 · 2 · 4 · 4], and the grid [1, 3]."""
    grid = torch.tensor([[frames, height, width]])
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(frames * height * width, 3 * 2 * 4 * 4, generator=generator), grid


def given(what: str) -> dict[str, Tensor]:
    words = ids(7)[0].tolist()
    if what == "text":
        return {"input_ids": torch.tensor([words])}
    if what == "image":
        values, grid = pixels(1, 4, 6)
        seen = [*words[:3], START, *[IMAGE] * 6, END, *words[3:]]
        named = {"pixel_values": values, "image_grid_thw": grid}
    else:
        values, grid = pixels(2, 4, 4)
        frame = [START, *[VIDEO] * 4, END]
        seen = [*words[:3], *frame, *frame, *words[3:]]
        named = {"pixel_values_videos": values, "video_grid_thw": grid}
    tokens = torch.tensor([seen])
    kinds = (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()
    return {"input_ids": tokens, "mm_token_type_ids": kinds, **named}


@pytest.fixture(scope="module")
def seeing(hybrid: dict[str, Any]) -> tuple[Any, Any]:
    return twins(lambda: composite(Qwen3_5ForConditionalGeneration, hybrid))


@pytest.mark.parametrize(
    "what", [pytest.param("text", marks=slow), "image", pytest.param("video", marks=slow)]
)
def test_a_model_with_a_vision_tower_generates_what_it_did(seeing: tuple[Any, Any], what: str) -> None:
    same_tokens(seeing, lambda m: m.generate(**given(what), **GREEDY))
    assert {GDN, ATTENTION, MLP} <= merged(seeing[1])


@slow
def test_what_the_model_sees_changes_its_logits(seeing: tuple[Any, Any]) -> None:
    """Or the comparison above would hold for a model that ignores its images."""
    image = given("image")
    with torch.no_grad():
        first = seeing[1](**image).logits
        second = seeing[1](**{**image, "pixel_values": -image["pixel_values"]}).logits
        reference = seeing[0](**image).logits
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(first, reference, atol=1e-5, rtol=1e-4)


def test_the_vision_tower_alone_keeps_its_answer(seeing: tuple[Any, Any]) -> None:
    values, grid = pixels(1, 4, 6)
    with torch.no_grad():
        a, b = (m.model.visual(values, grid_thw=grid).pooler_output for m in seeing)
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


@slow
@pytest.mark.parametrize("what", ["text", "image"])
def test_a_sparse_model_with_a_vision_tower(sparse: dict[str, Any], what: str) -> None:
    pair = twins(lambda: composite(Qwen3_5MoeForConditionalGeneration, sparse))
    same_tokens(pair, lambda m: m.generate(**given(what), **GREEDY))
    assert {GDN, ATTENTION} <= merged(pair[1])


# Mixtures of experts.


@pytest.mark.parametrize(
    "experts", ["grouped_mm", pytest.param("batched_mm", marks=slow), pytest.param("eager", marks=slow)]
)
def test_router_and_shared_expert_join_one_merge_whatever_runs_the_experts(
    sparse: dict[str, Any], experts: str
) -> None:
    def make() -> Any:
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**sparse))
        model.set_experts_implementation(experts)
        return model

    plain, model = pair = twins(make)
    same_tokens(pair, lambda m: m.generate(ids(9), **GREEDY))
    matches = [m for g in model.optimization_report.graphs for o in g.outcomes.values() for m in o.matches]
    members = {tuple(n.split(".mlp.")[1] for n in m.members) for m in matches if ".mlp." in m.where}
    together = ["shared_expert.gate_proj.weight", "shared_expert.up_proj.weight", "gate.weight"]
    if experts != "eager":  # its loop over the experts that were hit breaks the graph before the gate
        together.append("shared_expert_gate.weight")
    assert members == {tuple(together)}
    with torch.no_grad():
        torch.testing.assert_close(model(ids(9)).logits, plain(ids(9)).logits, atol=1e-5, rtol=1e-4)


READS_BACK = ("aten.nonzero", "aten.item", "aten._local_scalar_dense", "aten.unique")


def waits_in_decode(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What makes the host wait for the device while one token is decoded: operators, and graph breaks."""
    seen: set[str] = set()
    compile_graph = inner.compile_graph

    def spying(kind: Any, mode: Any, graph_module: Any, inputs: Any) -> Any:
        seen.update(str(n.target) for n in graph_module.graph.nodes if n.op == "call_function")
        return compile_graph(kind, mode, graph_module, inputs)

    monkeypatch.setattr(inner, "compile_graph", spying)
    with torch.no_grad(), fxfuse.optimized(model, inner="eager"):
        cache = model.forward(ids(5), use_cache=True).past_key_values
        counters.clear()
        model(ids(1), past_key_values=cache, use_cache=True)
        assert model.optimization_report.calls >= 1 and seen
    return [*(name for name in seen if name.startswith(READS_BACK)), *counters["graph_break"]]


def test_decode_with_grouped_experts_never_makes_the_host_wait(
    sparse: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**sparse)).eval()
    model.set_experts_implementation("grouped_mm")
    assert waits_in_decode(model, monkeypatch) == []
    model.set_experts_implementation("eager")
    assert waits_in_decode(model, monkeypatch)  # the check can fail


# Other models and other heads.


@slow
def test_qwen3_next_generates_what_it_did(hybrid: dict[str, Any], sparse: dict[str, Any]) -> None:
    config = {**hybrid, **sparse}
    pair = twins(lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**config)))
    same_tokens(pair, lambda m: m.generate(ids(9), **GREEDY))
    assert {"linear_attn.in_proj_qkvz_ba", ATTENTION} <= merged(pair[1])


@pytest.mark.parametrize(
    "kind", [Qwen3_5ForSequenceClassification, pytest.param(Qwen3_5ForTokenClassification, marks=slow)]
)
def test_classification_heads(hybrid: dict[str, Any], kind: type) -> None:
    plain, model = twins(lambda: kind(Qwen3_5TextConfig(**hybrid, num_labels=5)))
    batch = ids(11, batch=3)
    mask = torch.ones_like(batch)
    batch[2, :4], mask[2, :4] = 0, 0
    with torch.no_grad():
        expected = plain(batch, attention_mask=mask).logits
        got = model(batch, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert expected.shape[-1] == 5 and model.optimization_report.calls >= 1
    assert {GDN, ATTENTION, MLP} <= merged(model)


@slow
def test_a_plain_llama_is_merged_too(hybrid: dict[str, Any]) -> None:
    config = {k: hybrid[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    more = {"num_hidden_layers": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": None}
    pair = twins(lambda: LlamaForCausalLM(LlamaConfig(**config, **more)))
    same_tokens(pair, lambda m: m.generate(ids(9), **GREEDY))
    assert merged(pair[1]) == {ATTENTION, MLP}


@pytest.mark.parametrize("feed_forward", ["gated-gelu", pytest.param("relu", marks=slow)])
def test_an_encoder_decoder_generates_what_it_did_and_can_be_explained(feed_forward: str) -> None:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 300}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    config = T5Config(**sizes, **special, feed_forward_proj=feed_forward)
    strict = feed_forward == "relu"
    plain, model = pair = twins(lambda: T5ForConditionalGeneration(config), strict=strict)
    for length, batch in ((9, 1), (12, 2)):
        same_tokens(pair, lambda m, n=length, b=batch: m.generate(ids(n, b), **GREEDY))
    assert not model.optimization_report.failures
    found = fxfuse.explain(plain, inner="eager", strict=True)
    assert [graph.phase for graph in found.graphs][-1] == "decode"
    assert found.matched >= 6 and not any("cannot" in note for note in found.notes)


# Quantised linears stay, what is beside them is rewritten.


class Packed4Bits(nn.Module):
    """As GPTQ's: two weights to a byte in a buffer, scales by group, no parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 7
        codes = (weight / scale).round().clamp(-8, 7).to(torch.int8) + 8
        self.register_buffer("qweight", (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8))
        self.register_buffer("scales", scale)

    def forward(self, x: Tensor) -> Tensor:
        low, high = (self.qweight & 15).to(x.dtype) - 8, (self.qweight >> 4).to(x.dtype) - 8
        return nn.functional.linear(x, torch.stack([low, high], -1).flatten(1) * self.scales)


class Float8(nn.Linear):
    """As transformers' FP8Linear: a float8 parameter and its scale, multiplied at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        scale = linear.weight.detach().abs().amax() / 448
        self.weight = nn.Parameter(
            (linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False
        )
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv)


class Codes(nn.Parameter):
    """As bitsandbytes' Params4bit: a Parameter that holds codes and knows how to undo them."""

    def __new__(cls, weight: Tensor) -> "Codes":
        scale = weight.abs().amax() / 127
        codes = torch.Tensor._make_subclass(cls, (weight / scale).round().to(torch.int8), False)
        codes.scale = scale
        return codes

    def __deepcopy__(self, memo: dict[int, Any]) -> "Codes":
        return Codes(self.float() * self.scale)


class EightBits(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = Codes(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.data.to(x.dtype) * self.weight.scale)


# As published quantised checkpoints have it: the small projections and the norms stay as they are.
QUANTISED = (
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@pytest.mark.parametrize(
    "kind", [pytest.param(Packed4Bits, marks=slow), Float8, pytest.param(EightBits, marks=slow)]
)
def test_quantised_linears_stay_with_a_reason_and_what_is_beside_them_is_merged(
    make_model: Make, kind: type
) -> None:
    plain = make_model()
    for name, module in list(plain.named_modules()):
        if name.rpartition(".")[2] in QUANTISED:
            plain.set_submodule(name, kind(module))
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager")
    before = {
        n: t.data_ptr()
        for n, t in model.state_dict().items()
        if "in_proj_b" not in n and "in_proj_a" not in n
    }
    same_tokens((plain, model), lambda m: m.generate(ids(9), **GREEDY))
    report = model.optimization_report
    assert merged(model) == {"linear_attn.in_proj_b_a"}
    left = {miss.where.rpartition(".")[2] for miss in report.misses}
    assert left >= {"in_proj_qkv", "in_proj_z", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {n: t.data_ptr() for n, t in model.state_dict().items() if n in before} == before
    assert "quantised" in str(report)


@slow
@pytest.mark.parametrize("kind", [Packed4Bits, Float8, EightBits])
def test_beside_quantised_linears_the_core_and_the_norms_are_rewritten_for_a_gpu(
    make_model: Make, kind: type
) -> None:
    def rules(model: Any) -> dict[tuple[str, str], int]:
        rows = fxfuse.explain(model, target="cuda").rows
        return dict(Counter((row.phase, row.rule) for row in rows for _ in range(row.matched)))

    expected, model = rules(make_model()), make_model()
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in QUANTISED:
            model.set_submodule(name, kind(module))
    for phase in ("prefill", "decode"):
        assert expected[phase, "same_input_linears"] == 4
        expected[phase, "same_input_linears"] = 1  # in_proj_b and in_proj_a
    assert rules(model) == expected
    assert expected["decode", "gdn_decode"] == 1 and expected["prefill", "gated_rms_norm"] == 1


def test_data_of_a_parameter_is_read_at_every_call() -> None:
    """As such layers do; it reaches no operator, and a trace could keep what it saw as a constant."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
            self.codes = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.gate(x) * self.up(x), self.codes.data * 2)

    model, x = fxfuse.optimize(Scaled(), inner="eager"), torch.randn(3, 4)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), model.forward(x))
            model.codes.add_(1)
    report = optimization_report(model)
    assert report is not None and report.matched == 1 and report.calls == 2
