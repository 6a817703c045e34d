"""The recurrent gated delta rule as an operator: transformers' function is the oracle."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from fxfuse.runtime.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from fxfuse.runtime.ops.recurrent_gated_delta_rule import (
    MAX_KEY_DIM,
    recurrent_gated_delta_rule,
    reference,
    refusal,
)


def inputs(length: int, ratio: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Any]:
    torch.manual_seed(length * 10 + ratio)
    heads, dk, dv = 2 * ratio, 8, 6
    query, key = (torch.randn(batch, length, 2, dk).to(dtype) for _ in range(2))
    value = torch.randn(batch, length, heads, dv).to(dtype)
    g, beta = F.logsigmoid(torch.randn(batch, length, heads)), torch.rand(batch, length, heads)
    return [query, key, value, g, beta, torch.randn(batch, heads, dk, dv) * 0.1]


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_state_are_those_of_transformers(dtype: torch.dtype, ratio: int) -> None:
    for normalise in (True, False):
        q, k, v, g, beta, state = inputs(5, ratio, dtype)
        k = k if normalise else F.normalize(k, dim=-1)
        expected, expected_state = torch_recurrent_gated_delta_rule(
            q.repeat_interleave(ratio, 2),
            k.repeat_interleave(ratio, 2),
            v,
            g=g,
            beta=beta,
            initial_state=state.clone(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=normalise,
        )
        address = state.data_ptr()
        out = recurrent_gated_delta_rule(q, k, v, g, beta, state, normalise)
        assert out.dtype == dtype and state.data_ptr() == address
        torch.testing.assert_close(state, expected_state, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 2**-7)


def test_it_is_the_chunked_rule() -> None:
    *given, state = inputs(70, 2)
    expected, final = chunk_gated_delta_rule(*given, state.clone(), True)
    torch.testing.assert_close(
        recurrent_gated_delta_rule(*given, state, True), expected, atol=2e-5, rtol=1e-4
    )
    torch.testing.assert_close(state, final, atol=2e-5, rtol=1e-4)


def test_a_thousand_steps_stay_near_float64() -> None:
    *given, state = inputs(1000, 2, torch.bfloat16)
    exact_state = state.double()
    exact = reference(*[x.double() for x in given], exact_state, True)
    out = reference(*given, state, True)
    torch.testing.assert_close(state.double(), exact_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=2**-7)


def test_wrong_shapes_and_what_the_kernel_does_not_take_are_named() -> None:
    *given, state = inputs(2, 2)
    with pytest.raises(ValueError, match=r"a state \[B, HV, dk, dv\], here .* not \(2, 4, 6, 8\)"):
        recurrent_gated_delta_rule(*given, state.mT, True)
    wide = torch.empty(1, 1, 1, MAX_KEY_DIM + 1)
    assert f"key heads of {MAX_KEY_DIM + 1}" in (refusal(wide, wide) or "")
    assert "cpu" in (refusal(*given, state) or "")


@pytest.mark.parametrize("length", [0, 1, 3])
def test_the_operator_keeps_torchs_rules(length: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(recurrent_gated_delta_rule, (*inputs(length, 2, dtype), True))


def test_packed_sequences_keep_torchs_rules() -> None:
    *given, state = inputs(5, 2, batch=1)
    bounds = torch.tensor([0, 2, 2, 5])
    torch.library.opcheck(recurrent_gated_delta_rule, (*given, state.repeat(3, 1, 1, 1), True, bounds))
