"""A model whose attention is written out (`attn_implementation="eager"`) is lowered like any other."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import fxfuse

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
}


def logits(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    """Of a prompt, and of a token behind it."""
    with torch.no_grad():
        parts = ids[:, :9], ids[:, 9:10]
        return [model(input_ids=part, past_key_values=cache, use_cache=True).logits.clone() for part in parts]


@pytest.mark.parametrize("cache", CACHES)
def test_the_prologue_is_one_call_and_no_key_is_repeated_for_one_token(
    make_model: Callable[..., Any], prompt: Tensor, cache: str
) -> None:
    model = make_model(("full_attention",), num_attention_heads=4, num_key_value_heads=2)
    model.set_attn_implementation("eager")
    plain, ids = copy.deepcopy(model), torch.cat([prompt, prompt.flip(-1)])
    expected = logits(plain, CACHES[cache](plain), ids)
    fxfuse.optimize(model, inner="eager", target="cuda")
    got = logits(model, CACHES[cache](model), ids)
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    matched = {row.rule: row.matched for row in model.optimization_report.rows}
    assert matched["qk_norm_rope_gate"] and matched["grouped_query_attention"], str(model.optimization_report)
