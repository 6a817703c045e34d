"""The kernel of the recurrent gated delta rule against its reference in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from fxfuse.runtime.ops import recurrent_gated_delta_rule as op

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
RATIOS = st.sampled_from([1, 2, 3, 4, 8])
profile = settings.get_profile("kernels")


@profile
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 2)),
    st.integers(1, 20),
    st.integers(1, 40),
    RATIOS,
    FLOATS,
    FLOATS,
    st.booleans(),
    st.integers(0, 2**20),
)
def test_it_is_the_reference(
    make: Any,
    close: Any,
    doubled: Any,
    sizes: tuple[int, int, int],
    dk: int,
    dv: int,
    ratio: int,
    dtype: Any,
    state_dtype: Any,
    normalise: bool,
    seed: int,
) -> None:
    batch, length, heads = sizes
    query, key = (make(seed + i, batch, length, heads, dk, dtype=dtype) for i in (0, 1))
    value = make(seed + 2, batch, length, heads * ratio, dv, dtype=dtype)
    g = -make(seed + 3, batch, length, heads * ratio).abs()
    beta = make(seed + 4, batch, length, heads * ratio, dtype=dtype).sigmoid()
    state = make(seed + 5, batch, heads * ratio, dk, dv, dtype=state_dtype)
    if not normalise:  # unnormalised keys of length above one make the recurrence itself blow up
        key = key / (1 + key.float().norm(dim=-1, keepdim=True)).to(dtype)
    *rest, exact_state, flag = doubled(query, key, value, g, beta, state, normalise)
    exact = op.reference(*rest, exact_state, flag)
    close(op.launch(query, key, value, g, beta, state, normalise), exact, dtype, noise=1e-4)
    close(state, exact_state, state_dtype, noise=1e-4)


@settings(profile, max_examples=10)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.sampled_from([torch.int32, torch.int64]),
    FLOATS,
    st.integers(0, 2**20),
)
def test_packed_sequences_are_those_alone(
    make: Any, close: Any, doubled: Any, lengths: list[int], integers: Any, dtype: Any, seed: int
) -> None:
    total = sum(lengths)
    query, key = (make(seed + i, 1, total, 1, 9, dtype=dtype) for i in (0, 1))
    value = make(seed + 2, 1, total, 2, 37, dtype=dtype)
    g, beta = -make(seed + 3, 1, total, 2).abs(), make(seed + 4, 1, total, 2, dtype=dtype).sigmoid()
    state = make(seed + 5, len(lengths), 2, 9, 37)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(integers).to(state.device)
    *rest, exact_state = doubled(query, key, value, g, beta, state)
    exact = op.reference(*rest, exact_state, True, bounds)
    close(op.launch(query, key, value, g, beta, state, True, bounds), exact, dtype, noise=1e-4)
    close(state, exact_state, torch.float32, noise=1e-4)


def test_no_token_leaves_the_state_and_zero_keys_give_numbers(make: Any) -> None:
    q, v, g = make(0, 1, 2, 1, 4), make(1, 1, 2, 2, 4), -make(2, 1, 2, 2).abs()
    state = make(3, 1, 2, 4, 4)
    before = state.clone()
    assert op.launch(q[:, :0], q[:, :0], v[:, :0], g[:, :0], g[:, :0], state, True).shape == (1, 0, 2, 4)
    assert torch.equal(state, before)
    zero = torch.zeros_like(q)
    out = op.launch(zero, zero, v, g, -g, state, True)
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(state, before * g.sum(1)[..., None, None].exp())


def test_a_thousand_tokens_stay_within_the_error_of_the_model(make: Any, close: Any, no_worse: Any) -> None:
    length, heads, dk, dv = 1000, 1, 8, 8
    query, key = (make(i, 1, length, 1, dk, dtype=torch.bfloat16) for i in (0, 1))
    value = make(2, 1, length, heads, dv, dtype=torch.bfloat16)
    g = -0.01 * make(3, 1, length, heads).abs()  # a slow decay: what is added is kept for hundreds of tokens
    beta, state = make(4, 1, length, heads, dtype=torch.bfloat16).sigmoid(), make(5, 1, heads, dk, dv)
    exact_state = state.double()
    tokens = (query, key, value, g, beta)
    exact = op.reference(*(x.double() for x in tokens), exact_state, True)
    _, their_state = torch_recurrent_gated_delta_rule(
        query,
        key,
        value,
        g=g,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    out = op.launch(*tokens, state, True)
    close(out, exact, torch.bfloat16, noise=1e-4)
    close(state, exact_state, torch.float32)
    no_worse(state, their_state, exact_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_keys_and_values_near_the_largest_number_of_float16_give_numbers(
    make: Any, close: Any, doubled: Any, dtype: Any
) -> None:
    query, key, value = (make(i, 1, 5, h, 8, dtype=dtype).sign() * 6e4 for i, h in ((0, 1), (1, 1), (2, 3)))
    query[:, 1], key[:, 3] = 0, 0
    g, beta = -make(3, 1, 5, 3).abs(), make(4, 1, 5, 3).sigmoid()
    state = 1e4 * make(5, 1, 3, 8, 8)
    *rest, exact_state = doubled(*(x.to(dtype) for x in (query, key, value)), g, beta, state)
    exact = op.reference(*rest, exact_state, True)
    out = op.launch(*(x.to(dtype) for x in (query, key, value)), g, beta, state, True)
    exact = exact.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert state.isfinite().all() and not out.isnan().any()
    close(out.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max), exact, dtype, noise=1e-4)
    close(state, exact_state, torch.float32, noise=1e-4)
