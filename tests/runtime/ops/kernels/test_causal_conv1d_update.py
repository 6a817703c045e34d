"""The kernel of the convolution's step against its reference in float64."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import causal_conv1d_update

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
profile = settings.get_profile("kernels")


@profile
@given(
    st.integers(1, 3),
    st.integers(1, 140),
    st.sampled_from([1, 1, 1, 2, 3, 5, 8, 9, 20]),
    st.sampled_from([4, 4, 1, 2, 3, 7]),
    st.sampled_from([-1, 0, 1, 2, 6]),
    FLOATS,
    st.tuples(st.booleans(), st.booleans()),
    st.integers(0, 2**20),
)
def test_it_is_the_reference(
    make: Any,
    close: Any,
    doubled: Any,
    batch: int,
    channels: int,
    length: int,
    taps: int,
    more: int,
    dtype: Any,
    options: tuple[bool, bool],
    seed: int,
) -> None:
    has_bias, apply_silu = options
    x = make(seed, batch, channels, length, dtype=dtype)
    state = make(seed + 1, batch, channels, taps + more, dtype=dtype)
    weight = make(seed + 2, channels, taps, dtype=dtype)
    bias = make(seed + 3, channels) if has_bias else None
    given_x, exact_state, *rest = doubled(x, state, weight, bias)
    exact = causal_conv1d_update.reference(given_x, exact_state, *rest, apply_silu)
    out = causal_conv1d_update.launch(x, state, weight, bias, apply_silu)
    close(out, exact, dtype)
    assert torch.equal(state.double(), exact_state) and out.stride() == exact.stride()


def test_no_token_leaves_the_state(make: Any) -> None:
    state, weight = make(0, 2, 5, 4), make(1, 5, 4)
    before = state.clone()
    assert causal_conv1d_update.launch(before[..., :0], state, weight, None, True).shape == (2, 5, 0)
    assert torch.equal(state, before)
