"""The kernel of the gates against its reference in float64."""

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import gdn_gates

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
profile = settings.get_profile("kernels")


@profile
@given(st.lists(st.integers(1, 3), max_size=4), st.integers(1, 70), FLOATS, FLOATS, st.integers(0, 2**20))
def test_it_is_the_reference(
    make: Any, close: Any, doubled: Any, lead: list[int], heads: int, dtype: Any, weights: Any, seed: int
) -> None:
    a, b = (make(seed + i, *lead, heads, dtype=dtype, scale=4.0) for i in range(2))
    A_log, dt_bias = (make(seed + i, heads, dtype=weights) for i in (2, 3))
    g, beta = gdn_gates.launch(a, b, A_log, dt_bias, False)
    exact = gdn_gates.reference(*doubled(a, b, A_log, dt_bias), False)
    close(g, exact[0], torch.float32)
    close(beta, exact[1], torch.float32)
    rounded = gdn_gates.launch(a, b, A_log, dt_bias, True)[1]
    close(rounded.to(dtype), exact[1], dtype)
    assert torch.equal(rounded.to(dtype).float(), rounded)


def test_extreme_gates_are_those_of_torch(make: Any) -> None:
    a = torch.tensor(
        [-100.0, -30.0, -17.0, -10.0, -1.0, 0.0, 1.0, 19.0, 21.0, 100.0], device=make(0, 1).device
    )
    for A_log in (-torch.inf, -20.0, 0.0, 2.8, 80.0):
        speed = torch.full_like(a, A_log)
        g, beta = gdn_gates.launch(a, a, speed, torch.zeros_like(a), False)
        exact = gdn_gates.reference(
            a.double(), a.double(), speed.double(), torch.zeros_like(a).double(), False
        )
        # Relative, as an absolute error would add up over a sequence; but exp may flush denormal numbers.
        least = 2e-38 * max(1.0, math.exp(A_log))
        torch.testing.assert_close(g.double().clamp(-3e38), exact[0].clamp(-3e38), rtol=2e-5, atol=least)
        torch.testing.assert_close(beta.double(), exact[1], rtol=2e-5, atol=1e-37)
