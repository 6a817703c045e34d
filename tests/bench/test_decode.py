"""What bench/decode.py relies on: forced continuations, token times, weights counted once."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3_5ForCausalLM

from fxfuse.runtime.shapes import text_config

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def decode() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("decode")


def tiny(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = text_config(
        "small",
        hidden_size=32,
        intermediate_size=48,
        vocab_size=64,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        tie_word_embeddings=tied,
    )
    config.rope_parameters["mrope_section"] = [2, 1, 1]
    return Qwen3_5ForCausalLM(config).eval()


@pytest.mark.parametrize("cache", ["DynamicCache", "StaticCache"])
def test_forced_logits_are_those_of_one_long_forward(decode: Any, cache: str) -> None:
    model = tiny()
    ids, tokens = torch.randint(64, (2, 5)), torch.randint(64, (2, 4))
    settings = {"do_sample": False, **decode.CACHES[cache]}
    logits = decode.forced_logits(
        lambda *args, **more: model.generate(*args, **settings, **more), ids, tokens
    )
    with torch.no_grad():
        whole = model(torch.cat([ids, tokens], 1)).logits
    torch.testing.assert_close(logits["logits"], whole[:, 4:8].transpose(0, 1), atol=1e-4, rtol=1e-4)


def test_time_per_token_leaves_out_prompt_and_first_token(
    decode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr(decode.time, "perf_counter", lambda: next(now))
    watch = decode.Stopwatch("cpu")
    for _ in range(5):
        watch.put(torch.zeros(1))
    assert watch.seconds_per_token() == 2.0  # 10 to 16, three tokens


def test_generate_puts_the_prompt_and_then_every_token(decode: Any) -> None:
    watch = decode.Stopwatch("cpu")
    tiny().generate(torch.randint(64, (2, 5)), max_new_tokens=3, do_sample=False, streamer=watch)
    assert len(watch.times) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_operations_count_each_weight_that_a_step_reads(decode: Any, tied: bool) -> None:
    model = tiny(tied)
    table = 64 * 32
    total = sum(parameter.numel() for parameter in model.parameters())
    assert decode.bytes_per_token(model) == 4 * (total - (0 if tied else table))
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert decode.flops_per_token(model, batch=3) == 2 * 3 * linears


def test_a_model_sharing_weights_is_another_model(decode: Any) -> None:
    model = tiny()
    other = decode.sharing_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    ids = torch.randint(64, (1, 5))
    other.forward = lambda *args, **kwargs: None
    assert model(ids) is not None
