"""Whole models at real widths: 64 greedy tokens as eager's, and bf16 within the bound of a wider run."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3_5ForCausalLM

from fxfuse.runtime.shapes import text_config
from fxfuse.testing import assert_equivalent

TOKENS = 64
INNERS = ["eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]


def real(layers: int, dtype: torch.dtype) -> Qwen3_5ForCausalLM:
    """The widths of Qwen3.5-0.8B, with few layers and words."""
    torch.manual_seed(0)
    config = text_config("0.8b", num_hidden_layers=layers, vocab_size=2048)
    return Qwen3_5ForCausalLM(config).eval().to(dtype)


class ThenOneToken(nn.Module):
    """The logits of a prompt, and those of one token after it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        cache = DynamicCache(config=self.config)
        prompt = self.model(ids[:, :-1], past_key_values=cache, use_cache=True)
        return prompt.logits, self.model(ids[:, -1:], past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("inner", INNERS)
def test_bf16_is_no_less_exact_than_eager_in_prefill_and_decode(inner: str) -> None:
    plain = real(4, torch.bfloat16)
    model = copy.deepcopy(plain).optimize(inner=inner)
    ids = torch.randint(1, 2048, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equivalent(
            ThenOneToken(plain),
            ThenOneToken(model),
            ids,
            logits=("0", "1"),
            must_run=lambda: model.optimization_report.calls,
        )
    assert model.optimization_report.matched > 0 and not model.optimization_report.misses


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("inner", "size"),
    [
        ("eager", "tiny"),
        pytest.param("inductor", "tiny", marks=[pytest.mark.inductor, pytest.mark.slow]),
        pytest.param("eager", "real", marks=pytest.mark.slow),
        pytest.param("inductor", "real", marks=[pytest.mark.inductor, pytest.mark.slow]),
    ],
)
def test_64_greedy_tokens_in_fp32_are_eagers(
    make_model: Callable[..., Any], inner: str, size: str, cache: str
) -> None:
    plain = make_model(seed=5) if size == "tiny" else real(4, torch.float32)
    model = copy.deepcopy(plain).optimize(inner=inner)
    prompt = torch.randint(1, 300, (1, 17), generator=torch.Generator().manual_seed(1))

    def tokens(m: Any) -> Tensor:
        return m.generate(
            prompt,
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            cache_implementation=cache,
        )

    expected, got = tokens(plain), tokens(model)
    assert torch.equal(got, expected) and got.shape == (1, 17 + TOKENS)
    assert model.optimization_report.calls == TOKENS and not model.optimization_report.misses
