"""The kernel of RMSNorm against its reference in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import rms_norm

SHAPES = st.lists(st.integers(1, 3), max_size=4)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**20)
profile = settings.get_profile("kernels")


@profile
@given(SHAPES, st.integers(1, 70), FLOATS, FLOATS, st.booleans(), SEEDS)
def test_it_is_the_reference(
    make: Any,
    close: Any,
    doubled: Any,
    lead: list[int],
    features: int,
    dtype: Any,
    other: Any,
    centred: bool,
    seed: int,
) -> None:
    x = make(seed, *lead, features, dtype=dtype)
    weight = make(seed + 1, features, dtype=other)
    exact = rms_norm.reference(*doubled(x, weight), 1e-6, centred)
    close(rms_norm.launch(x, weight, 1e-6, centred), exact, dtype)


@profile
@given(SHAPES, st.integers(1, 70), FLOATS, FLOATS, st.booleans(), SEEDS)
def test_with_a_residual_it_is_the_reference(
    make: Any,
    close: Any,
    doubled: Any,
    lead: list[int],
    features: int,
    dtype: Any,
    other: Any,
    centred: bool,
    seed: int,
) -> None:
    x, residual = make(seed, *lead, features, dtype=dtype), make(seed + 1, *lead, features, dtype=other)
    weight = make(seed + 2, features)
    wanted = torch.promote_types(dtype, other)
    out, total = rms_norm.add_launch(x, residual, weight, 1e-6, centred)
    close(total, x.double() + residual.double(), wanted)
    close(out, rms_norm.reference(*doubled(total, weight), 1e-6, centred), wanted)


@pytest.mark.parametrize("features", [1024, 2560, 5120])
def test_widths_of_models(make: Any, close: Any, doubled: Any, features: int) -> None:
    x, weight = make(0, 3, features), make(1, features)
    close(
        rms_norm.launch(x, weight, 1e-6, True), rms_norm.reference(*doubled(x, weight), 1e-6, True), x.dtype
    )


def test_zeros_stay_zeros_and_nothing_is_launched_for_nothing(make: Any) -> None:
    zeros = torch.zeros_like(make(0, 2, 5))
    assert torch.equal(rms_norm.launch(zeros, zeros[0], 1e-6, True), zeros)
    assert rms_norm.launch(zeros[:0], zeros[0], 1e-6, True).shape == (0, 5)


@pytest.mark.parametrize("residual", [False, True])
def test_values_near_the_largest_number_of_float16_give_numbers(
    make: Any, close: Any, doubled: Any, residual: bool
) -> None:
    x, weight = (make(0, 3, 40).sign() * 6e4).half(), make(1, 40)
    if residual:
        out, total = rms_norm.add_launch(x, (x * -0.5).half(), weight, 1e-6, True)
        assert torch.equal(total.double(), x.double() * 0.5)
    else:
        out, total = rms_norm.launch(x, weight, 1e-6, True), x
    assert out.isfinite().all()
    close(out, rms_norm.reference(*doubled(total, weight), 1e-6, True), torch.float16)
