"""The kernel of gated RMSNorm against its reference in float64."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import gated_rms_norm

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
profile = settings.get_profile("kernels")


@profile
@given(
    st.lists(st.integers(1, 3), max_size=4),
    st.integers(1, 140),
    FLOATS,
    FLOATS,
    FLOATS,
    st.integers(0, 2**20),
)
def test_it_is_the_reference(
    make: Any,
    close: Any,
    doubled: Any,
    lead: list[int],
    features: int,
    dtype: Any,
    gates: Any,
    weights: Any,
    seed: int,
) -> None:
    x = make(seed, *lead, features, dtype=dtype)
    gate = make(seed + 1, *lead, features, dtype=gates, scale=3.0)
    weight = make(seed + 2, features, dtype=weights)
    exact = gated_rms_norm.reference(*doubled(x, gate, weight), 1e-6)
    close(gated_rms_norm.launch(x, gate, weight, 1e-6), exact, dtype)


def test_gates_of_any_size_give_numbers(make: Any, close: Any, doubled: Any) -> None:
    x, weight = make(0, 4, 16), make(1, 16)
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], device=x.device)[:, None].expand(4, 16)
    exact = gated_rms_norm.reference(*doubled(x, gate, weight), 1e-6)
    close(gated_rms_norm.launch(x, gate, weight, 1e-6), exact, x.dtype)
    assert gated_rms_norm.launch(x[:0], gate[:0], weight, 1e-6).shape == (0, 16)


def test_values_near_the_largest_number_of_float16_give_numbers(make: Any, close: Any, doubled: Any) -> None:
    x, gate, weight = (make(0, 3, 40).sign() * 6e4).half(), make(1, 3, 40).half(), make(2, 40)
    out = gated_rms_norm.launch(x, gate, weight, 1e-6)
    assert out.isfinite().all()
    close(out, gated_rms_norm.reference(*doubled(x, gate, weight), 1e-6), torch.float16)
