"""The kernel of the split against its reference, bit for bit."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import qkvzba_split as op

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
profile = settings.get_profile("kernels")


@profile
@given(
    st.lists(st.integers(1, 3), max_size=4),
    st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 8])),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.booleans(), st.booleans()),
    FLOATS,
    st.integers(0, 2**20),
)
def test_it_is_the_reference(
    make: Any,
    lead: list[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    options: tuple[bool, bool],
    dtype: Any,
    seed: int,
) -> None:
    (key_heads, ratio), (dk, dv), (interleaved, one_row) = heads, dims, options
    values = key_heads * ratio
    width = 2 * key_heads * dk + 2 * values * dv
    if one_row:
        qkvz, ba = make(seed, *lead, width + 2 * values, dtype=dtype).split([width, 2 * values], dim=-1)
    else:
        qkvz, ba = make(seed, *lead, width, dtype=dtype), make(seed + 1, *lead, 2 * values, dtype=dtype)
    sizes = (key_heads, values, dk, dv, interleaved)
    for got, expected in zip(op.launch(qkvz, ba, *sizes), op.reference(qkvz, ba, *sizes), strict=True):
        assert torch.equal(got, expected) and got.stride() == expected.stride()


def test_no_row_gives_nothing(make: Any) -> None:
    qkvz, ba = make(0, 2, 2 * 4 + 2 * 6)[:0], make(1, 2, 4)[:0]
    assert [x.shape for x in op.launch(qkvz, ba, 1, 2, 4, 3, True)] == [(0, 14), (0, 2, 3), (0, 2), (0, 2)]
