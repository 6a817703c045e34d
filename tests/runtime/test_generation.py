"""generate() with a clock: a time for every token, and tokens that are dictated."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3_5ForCausalLM

from fxfuse.runtime import generation
from fxfuse.runtime.generation import TokenClock, generate
from fxfuse.runtime.shapes import text_config

PROMPT = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def model() -> Any:
    narrow = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 256, "num_attention_heads": 2}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
    torch.manual_seed(0)
    config = text_config("small", **narrow, **linear, num_key_value_heads=1, linear_value_head_dim=16)
    config.eos_token_id = config.pad_token_id = 7
    return Qwen3_5ForCausalLM(config).eval()


def test_the_clock_tells_call_prompt_and_tokens_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([9.0, 10.0, 13.0, 13.5, 15.0])
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = TokenClock()
    for _ in range(4):
        clock.put(torch.zeros(1))
    assert clock.first_token_seconds == 4.0
    assert clock.prompt_seconds == 3.0
    assert clock.token_seconds == [0.5, 1.5]
    assert clock.seconds_per_token == 1.0
    assert clock.total_seconds == 5.0


def test_there_is_a_time_for_every_token(model: Any) -> None:
    found = generate(model, PROMPT, 12, logits=True)
    assert found.tokens.shape == (2, 12)
    assert len(found.clock.token_seconds) == 11
    assert found.logits.shape == (12, 2, 256)
    assert 7 not in found.tokens, "an end token would have cut the output short"


def test_its_own_tokens_replayed_give_its_own_logits(model: Any) -> None:
    found = generate(model, PROMPT, 8, logits=True)
    again = generate(model, PROMPT, 8, logits=True, replay=found.tokens)
    assert torch.equal(again.tokens, found.tokens)
    assert torch.equal(again.logits, found.logits)


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}])
def test_replayed_tokens_are_chosen_and_their_logits_are_those_of_one_long_forward(
    model: Any, settings: dict[str, Any]
) -> None:
    forced = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    found = generate(model, PROMPT, 5, logits=True, replay=forced, **settings)
    assert torch.equal(found.tokens, forced)
    with torch.no_grad():
        whole = model(torch.cat([PROMPT, forced], 1)).logits
    torch.testing.assert_close(found.logits, whole[:, 19:24].transpose(0, 1), atol=1e-4, rtol=1e-4)
