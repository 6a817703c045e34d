"""generate() in every way that people call it: the tokens of the plain model, and no graph after warm-up."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    TextGenerationPipeline,
    TextIteratorStreamer,
)

import fxfuse

Make = Callable[..., Any]
TOKENS = 8
LENGTH = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
GREEDY = {"do_sample": False, **LENGTH}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(make_model: Make) -> tuple[Any, Any]:
    """A plain model, and an optimised one with the same weights."""
    plain = make_model(seed=3)
    return plain, fxfuse.optimize(copy.deepcopy(plain), inner="eager")


def ids(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(
        1, 300, (batch, length), generator=torch.Generator().manual_seed(100 * seed + length)
    )


def tiny_qwen3(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def same(pair: tuple[Any, Any], call: Callable[[Any], Any], at_least: int = TOKENS) -> Any:
    """What both models answer; fails where they differ or the compiled graphs did not run."""
    plain, model = pair
    torch.manual_seed(0)
    expected = call(plain)
    calls = model.optimization_report.calls
    torch.manual_seed(0)
    got = call(model)
    assert model.optimization_report.calls >= calls + at_least
    assert not model.optimization_report.misses
    assert torch.equal(got, expected) if isinstance(expected, Tensor) else got == expected
    return got


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        pytest.param({"do_sample": True, "num_return_sequences": 3}, marks=slow),
        {"num_beams": 3, "do_sample": False},
        pytest.param({"num_beams": 2, "do_sample": True}, marks=slow),
        pytest.param({"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, marks=slow),
    ],
    ids=lambda how: "-".join(how),
)
def test_decoding_strategies_give_the_tokens_of_the_plain_model(
    pair: tuple[Any, Any], how: dict[str, Any]
) -> None:
    same(pair, lambda m: m.generate(ids(17), **LENGTH, **how))


@slow
def test_scores_and_a_returned_cache_are_those_of_the_plain_model(pair: tuple[Any, Any]) -> None:
    outs = [
        m.generate(ids(17), **GREEDY, return_dict_in_generate=True, output_scores=True, output_logits=True)
        for m in pair
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    for field in ("scores", "logits"):
        for a, b in zip(outs[0][field], outs[1][field], strict=True):
            torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param(DynamicCache, marks=slow), StaticCache])
def test_a_conversation_continues_with_its_cache(pair: tuple[Any, Any], kind: type) -> None:
    def conversation(model: Any) -> Tensor:
        cache = kind(config=model.config, **({"max_cache_len": 96} if kind is StaticCache else {}))
        said = ids(9)
        for turn in range(3):
            said = model.generate(said, past_key_values=cache, **GREEDY)
            said = torch.cat([said, ids(5, seed=turn + 1)], dim=1)
        return said

    said = same(pair, conversation, at_least=3 * TOKENS)
    assert said.shape[1] == 9 + 3 * (TOKENS + 5)


def test_a_prompt_in_chunks(pair: tuple[Any, Any]) -> None:
    same(pair, lambda m: m.generate(ids(24), prefill_chunk_size=8, **GREEDY), at_least=TOKENS + 2)


@slow
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_prompts_of_several_lengths_padded_on_the_left(pair: tuple[Any, Any], cache: str) -> None:
    batch = ids(14, batch=3)
    mask = torch.ones_like(batch)
    for row, empty in enumerate((0, 5, 11)):
        batch[row, :empty], mask[row, :empty] = 0, 0
    same(pair, lambda m: m.generate(batch, attention_mask=mask, cache_implementation=cache, **GREEDY))


class Pieces:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed_one_by_one(pair: tuple[Any, Any]) -> None:
    def streamed(model: Any) -> Tensor:
        pieces = Pieces()
        whole = model.generate(ids(6), streamer=pieces, **GREEDY)
        assert pieces.ended and [len(piece) for piece in pieces.given] == [6] + TOKENS * [1]
        assert torch.equal(torch.cat(pieces.given), whole[0])
        return whole

    same(pair, streamed)


@slow
def test_assisted_decoding_with_both_models_optimised_and_with_lookup() -> None:
    plain, helper = (tiny_qwen3(seed) for seed in (0, 1))
    model, helping = (fxfuse.optimize(copy.deepcopy(m), inner="eager") for m in (plain, helper))
    for how, own in (
        ({"assistant_model": helper}, {"assistant_model": helping}),
        ({"prompt_lookup_num_tokens": 3}, {"prompt_lookup_num_tokens": 3}),
    ):
        expected = plain.generate(ids(12), **GREEDY, **how)
        calls = model.optimization_report.calls
        assert torch.equal(model.generate(ids(12), **GREEDY, **own), expected)
        assert model.optimization_report.calls > calls
    assert helping.optimization_report.calls > 0


def test_what_transformers_refuses_for_recurrent_states_is_refused_in_its_words(
    pair: tuple[Any, Any],
) -> None:
    said = []
    for model in pair:
        with pytest.raises(ValueError, match="not supported with stateful models") as caught:
            model.generate(ids(12), prompt_lookup_num_tokens=3, **GREEDY)
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("stream", [pytest.param(False, marks=slow), True])
def test_a_text_generation_pipeline(pair: tuple[Any, Any], stream: bool) -> None:
    words = {f"w{i}": i for i in range(299)} | {"[PAD]": 299}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        pad_token="[PAD]",
        padding_side="left",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def answers(model: Any) -> list[str]:
        pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
        if stream:
            texts = TextIteratorStreamer(tokenizer, skip_prompt=True)
            pipe("w3 w5 w8", streamer=texts, **GREEDY)
            return ["".join(texts)]
        found = pipe(["w3 w5 w8", "w9 w10 w11 w12 w13 w14"], batch_size=2, **GREEDY)
        return [each[0]["generated_text"] for each in found]

    said = same(pair, answers)
    assert said[0].count("w") == (TOKENS if stream else 3 + TOKENS)


# transformers' own ways of compiling.


def test_the_backend_by_name_in_compile_config(make_model: Make) -> None:
    plain = make_model(seed=3)
    model = copy.deepcopy(plain)
    how = CompileConfig(backend="fxfuse", mode=None, fullgraph=False, options={"inner": "eager"})
    how._compile_all_devices = True
    expected = plain.generate(ids(17), cache_implementation="static", disable_compile=True, **GREEDY)
    got = model.generate(ids(17), cache_implementation="static", compile_config=how, **GREEDY)
    assert torch.equal(got, expected)
    report = model.optimization_report
    assert report is not None and report.calls >= TOKENS - 1 and report.matched >= 4


@slow
@pytest.mark.inductor
def test_the_backend_by_name_alone_gets_the_mode_that_transformers_asks_for(
    make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_model(layers=("full_attention",), seed=3)
    model = copy.deepcopy(plain)
    asked: list[str] = []
    options_of = torch._inductor.list_mode_options

    def spying(mode: str) -> Any:
        asked.append(mode)
        return options_of(mode)

    monkeypatch.setattr(torch._inductor, "list_mode_options", spying)
    how = CompileConfig(backend="fxfuse")
    how._compile_all_devices = True
    expected = plain.generate(ids(17), cache_implementation="static", disable_compile=True, **GREEDY)
    got = model.generate(ids(17), cache_implementation="static", compile_config=how, **GREEDY)
    assert torch.equal(got, expected)
    report = model.optimization_report
    assert report is not None and report.calls >= TOKENS - 1 and report.matched >= 2
    assert not report.failures and set(asked) == {how.mode} == {"reduce-overhead"}


def test_the_automatic_compile_on_top_of_ours_compiles_nothing_and_its_mode_is_reported_as_lost(
    make_model: Make, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make_model(seed=3)
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager")
    how = CompileConfig()  # what transformers does by itself on CUDA
    how._compile_all_devices = True
    expected = plain.generate(ids(17), cache_implementation="static", disable_compile=True, **GREEDY)
    counters.clear()
    for _ in range(2):
        got = model.generate(ids(17), cache_implementation="static", compile_config=how, **GREEDY)
        assert torch.equal(got, expected)
    report = model.optimization_report
    assert report.calls == 2 * TOKENS and [g.inner for g in report.graphs] == ["eager", "eager"]
    assert counters["stats"]["unique_graphs"] == 2 and not counters["inductor"]
    assert sum("mode='reduce-overhead', which is lost" in note for note in report.notes) == 1
    assert caplog.text.count("which is lost") == 1


# Lengths, batches and strategies vary; graphs do not.


@slow
def test_no_graph_is_added_after_warm_up_while_lengths_vary(make_model: Make) -> None:
    model = fxfuse.optimize(make_model(seed=3), inner="eager")

    def a_round(lengths: tuple[int, ...]) -> int:
        for length in lengths:
            batch = ids(length, batch=2)
            mask = torch.ones_like(batch)
            batch[1, : length // 2], mask[1, : length // 2] = 0, 0
            for how in ({"do_sample": True}, {"num_beams": 2, "do_sample": False}):
                model.generate(batch, attention_mask=mask, **LENGTH, **how)
        return len(model.optimization_report.graphs)

    counters.clear()
    warm = a_round((9, 14))
    compiled = counters["stats"]["unique_graphs"]
    assert a_round((10, 21, 33, 65)) == warm <= 8
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


@pytest.fixture(scope="module")
def compiled(make_model: Make) -> tuple[Any, Any]:
    """A plain model, and one compiled by Inductor."""
    plain = make_model(seed=3)
    return plain, fxfuse.optimize(copy.deepcopy(plain))


@slow
@pytest.mark.inductor
@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize(
    "how", [{"do_sample": True}, {"num_beams": 3, "do_sample": False}], ids=["sampling", "beams"]
)
def test_sampling_and_beams_under_inductor(
    compiled: tuple[Any, Any], how: dict[str, Any], cache: str
) -> None:
    same(compiled, lambda m: m.generate(ids(17), cache_implementation=cache, **LENGTH, **how))
