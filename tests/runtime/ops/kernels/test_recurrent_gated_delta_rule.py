"""The kernel of the recurrent gated delta rule against its reference in float64."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
