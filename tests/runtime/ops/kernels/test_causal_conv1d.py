"""The kernel of the causal convolution against its reference in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import causal_conv1d

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
profile = settings.get_profile("kernels")


@profile
@given(
    st.integers(1, 2),
    st.integers(1, 140),
    st.integers(1, 40),
    st.sampled_from([4, 4, 1, 2, 3, 7]),
    FLOATS,
    st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
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
    dtype: Any,
    options: tuple[bool, ...],
    seed: int,
) -> None:
    has_bias, has_state, packed, apply_silu = options
    x = make(seed, batch, channels, length, dtype=dtype)
    weight = make(seed + 1, channels, taps, dtype=dtype)
    bias = make(seed + 2, channels) if has_bias else None
    state = make(seed + 3, batch, channels, taps + seed % 3 - 1, dtype=dtype) if has_state else None
    numbers = make(seed + 4, batch, length).gt(1.0).cumsum(1) if packed else None
    arguments = (x, weight, bias, state, numbers)
    exact = causal_conv1d.reference(*doubled(*arguments), apply_silu)
    out = causal_conv1d.launch(*arguments, apply_silu)
    close(out, exact, dtype)
    assert out.stride() == exact.stride()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_nothing_gives_nothing(make: Any, shape: tuple[int, ...]) -> None:
    weight = make(0, 3, 4)
    assert causal_conv1d.launch(weight.new_empty(shape), weight, None, None, None, True).shape == shape
