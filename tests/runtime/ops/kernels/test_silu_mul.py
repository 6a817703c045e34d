"""The kernel of silu_mul against its reference in float64."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import silu_mul

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
profile = settings.get_profile("kernels")


@profile
@given(st.lists(st.integers(1, 4), max_size=4), st.integers(1, 1500), FLOATS, FLOATS, st.integers(0, 2**20))
def test_it_is_the_reference(
    make: Any, close: Any, doubled: Any, lead: list[int], features: int, dtype: Any, other: Any, seed: int
) -> None:
    a = make(seed, *lead, features, dtype=dtype, scale=3.0)
    b = make(seed + 1, *lead, features, dtype=other, scale=3.0)
    close(silu_mul.launch(a, b), silu_mul.reference(*doubled(a, b)), dtype)


def test_large_values_and_nothing(make: Any, close: Any, doubled: Any) -> None:
    edge = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=make(0, 1).device)
    a, b = edge[:, None].expand(5, 5), edge.expand(5, 5)
    close(silu_mul.launch(a, b), silu_mul.reference(*doubled(a, b)), torch.float32)
    assert silu_mul.launch(a[:0], b[:0]).shape == (0, 5)
