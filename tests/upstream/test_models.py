"""Bugs that others had in running Qwen3.5 and its like, on tiny models; see docs/upstream-cases.md."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, Qwen3_5TextConfig, StaticCache

import fxfuse
from fxfuse.runtime.ops.gdn_gates import gdn_gates
from fxfuse.runtime.ops.recurrent_gated_delta_rule import reference as recurrent_rule

Make = Callable[..., Any]
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
LEFT = 6


@pytest.fixture(autouse=True)
def _quiet(quiet: None) -> None:
    pass


@pytest.fixture(scope="module")
def pair(make_model: Make) -> tuple[Any, Any]:
    """A plain model, and an optimised one with the same weights."""
    plain = make_model(seed=3)
    return plain, fxfuse.optimize(copy.deepcopy(plain), inner="eager", report="off")


def logits(model: Any, ids: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **given).logits  # type: ignore[no-any-return]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_transformers_46773_padding_of_a_single_sequence_is_masked(
    pair: tuple[Any, Any], prompt: Tensor
) -> None:
    """A mask was skipped at a batch of one; where it covers a filled cache, too, it may not be applied."""
    padded = torch.cat([torch.zeros(1, LEFT, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(padded.shape[1]) >= LEFT).long()[None]
    plain, model = pair
    alone = logits(plain, prompt)
    close(logits(model, padded, attention_mask=mask)[:, LEFT:], alone)
    assert not torch.allclose(logits(model, padded)[:, LEFT:], alone, atol=1e-2)
    cache, first = DynamicCache(config=model.config), 12
    parts = []
    for a, b in ((0, first), (first, first + 4), (first + 4, padded.shape[1])):
        given = {"attention_mask": mask[:, :b], "past_key_values": cache, "use_cache": True}
        parts.append(logits(model, padded[:, a:b], **given))
    close(torch.cat(parts, dim=1)[:, LEFT:], alone)


def _answer(model: Any, ids: Tensor, **given: Any) -> Tensor | str:
    try:
        return logits(model, ids, use_cache=False, **given)
    except ValueError as error:
        return str(error)


def test_transformers_46851_packed_documents_are_what_the_plain_model_makes_of_them(
    pair: tuple[Any, Any], prompt: Tensor
) -> None:
    """By positions alone transformers lets the delta rule run on into the next document; by their bounds it
    keeps them apart, or says that it cannot. Neither becomes the other here."""
    lengths = (5, 12)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    both = {f"cu_seq_lens_{n}": bounds for n in "qk"} | {f"max_length_{n}": 12 for n in "qk"}
    for given in ({}, both):
        expected, got = (_answer(m, prompt, position_ids=positions, **given) for m in pair)
        if isinstance(expected, Tensor) and isinstance(got, Tensor):
            close(got, expected)
        else:
            assert got == expected
    # no graph that was made for one of them answers for the other
    close(logits(pair[1], prompt), logits(pair[0], prompt))


def test_axolotl_3734_a_prompt_and_a_token_are_one_graph_each(make_model: Make, prompt: Tensor) -> None:
    """A break in the loop of Gated DeltaNet made the whole forward eager."""
    plain = make_model(seed=3)
    torch._dynamo.reset()
    counters.clear()
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager", report="off")
    tokens = model.generate(prompt, **GREEDY, cache_implementation="static")
    assert torch.equal(tokens, plain.generate(prompt, **GREEDY))
    report = model.optimization_report
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    assert not counters["graph_break"] and report.calls == GREEDY["max_new_tokens"]
    options = {"inner": "eager", "report": "off"}
    whole = torch.compile(plain, backend="fxfuse", fullgraph=True, options=options)
    close(logits(whole, prompt, use_cache=False), logits(model, prompt, use_cache=False))


def test_transformers_46441_a_static_cache_starts_anew(pair: tuple[Any, Any], prompt: Tensor) -> None:
    """States of the last sequence, and what was written behind the end of this one, are not read."""
    plain, model = pair
    cache = StaticCache(config=model.config, max_cache_len=32)
    for ids in (prompt, prompt.flip(1)[:, :9]):
        cache.reset()
        given = {"past_key_values": cache, "use_cache": True}
        parts = [logits(model, ids[:, a:b], **given) for a, b in ((0, 7), (7, 8), (8, ids.shape[1]))]
        close(torch.cat(parts, dim=1), logits(plain, ids))


def test_vllm_36872_speculation_over_recurrent_states_is_refused_as_for_the_plain_model(
    pair: tuple[Any, Any], prompt: Tensor
) -> None:
    """A rejected token cannot be taken back out of a state."""
    said = []
    for model in pair:
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            model.generate(prompt, **GREEDY, prompt_lookup_num_tokens=3)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_sglang_39139_weights_go_and_come_back_at_one_address(make_model: Make, prompt: Tensor) -> None:
    """Also of vllm#48941: A, B and A again into the same memory, and every output before spoilt first."""
    twins = [make_model(seed=seed) for seed in (3, 4)]
    model = fxfuse.optimize(make_model(seed=5), inner="eager", report="off")
    logits(model, prompt)
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    outputs: list[Tensor] = []
    for twin in (twins[0], twins[1], twins[0]):
        model.load_state_dict(twin.state_dict())
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses
        kept = [output.clone() for output in outputs]
        for output in outputs:
            output.fill_(torch.nan)
        got = logits(model, prompt)
        close(got, logits(twin, prompt))
        outputs = [*kept, got]
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    # every parameter has a part in the output: none was folded into the graph
    for name, parameter in model.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(torch.randn_like(parameter))
            changed = logits(model, prompt)
            parameter.copy_(before)
        assert not torch.equal(changed, outputs[2]), name
    assert torch.equal(logits(model, prompt), outputs[2])


@pytest.mark.slow
def test_transformers_42697_another_implementation_is_used_from_the_next_call_on(
    make_model: Make, prompt: Tensor
) -> None:
    plain = make_model(seed=3)
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager", report="off")
    for name in ("sdpa", "eager", "sdpa"):
        for each in (plain, model):
            each.set_attn_implementation(name)
        close(logits(model, prompt), logits(plain, prompt))
        with torch.no_grad():
            weights = [m(prompt, output_attentions=True).attentions for m in (plain, model)]
        if name == "eager":
            close(weights[1][0], weights[0][0])
    assert model.optimization_report.calls >= 3


@pytest.mark.slow
def test_vllm_41384_adapters_of_stacked_experts_take_part(prompt: Tensor) -> None:
    """`target_parameters` computes the experts' weights at each call; they were dropped without a word."""
    peft = pytest.importorskip("peft")
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def adapted() -> Any:
        torch.manual_seed(0)
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**sizes)).eval()
        lora = peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False
        )
        return peft.get_peft_model(model, lora).eval()

    plain, model = adapted(), fxfuse.optimize(adapted(), inner="eager", report="off")
    with_adapter = logits(plain, prompt)
    close(logits(model, prompt), with_adapter)
    with plain.disable_adapter(), model.disable_adapter():
        without = logits(plain, prompt)
        close(logits(model, prompt), without)
    assert not torch.allclose(with_adapter, without, atol=1e-2)
    close(logits(model, prompt), with_adapter)


def test_sglang_38975_rates_that_are_not_rounded_keep_the_state(prompt: Tensor) -> None:
    """A rate rounded to bfloat16, as eager's is, moves the state by a thousandth; ours is not rounded."""
    torch.manual_seed(0)
    heads, length = 4, 200
    q, k, v = (torch.randn(1, length, heads, 16) for _ in "qkv")
    a, b = (torch.randn(1, length, heads).bfloat16() for _ in "ab")
    A_log, dt_bias = torch.rand(heads).log(), torch.randn(heads)

    def state(g: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
        final = torch.zeros(1, heads, 16, 16, dtype=dtype)
        recurrent_rule(*(x.to(dtype) for x in (q, k, v, g, beta)), final, True)
        return final

    wide = -A_log.double().exp() * F.softplus(a.double() + dt_bias.double()), b.double().sigmoid()
    exact = state(*wide, torch.float64)
    errors = []
    for rounded in (False, True):
        found = state(*gdn_gates(a, b, A_log, dt_bias, rounded), torch.float32)
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[0] < 1e-5 and 1e-4 < errors[1] < 1e-2, errors


@pytest.mark.parametrize("world", [2, 4])
def test_sglang_19070_what_the_ranks_compute_adds_up_to_the_whole(make_model: Make, world: int) -> None:
    """On integers every partial sum is exact: a row or column on the wrong rank is seen, rounding is not."""
    sizes = {"num_key_value_heads": 2, "num_attention_heads": 4, "linear_num_key_heads": 4}
    model = make_model(**sizes)
    weights = {n: torch.randint(-2, 3, t.shape).float() for n, t in model.state_dict().items()}
    config = Qwen3_5TextConfig(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    x = torch.randint(-2, 3, (5, config.hidden_size)).float()
    mlp = "model.layers.0.mlp."
    gate, up, down = (weights[f"{mlp}{n}_proj.weight"] for n in ("gate", "up", "down"))
    expected = F.linear(F.relu(x @ gate.t()) * (x @ up.t()), down)
    total = torch.zeros_like(expected)
    for rank in range(world):
        own = fxfuse.plan(config, "sglang", tp=(rank, world)).apply(weights)
        first, second = (x @ own[mlp + "gate_up_proj.weight"].t()).chunk(2, dim=-1)
        total += F.linear(F.relu(first) * second, own[mlp + "down_proj.weight"])
    assert torch.equal(total, expected)
