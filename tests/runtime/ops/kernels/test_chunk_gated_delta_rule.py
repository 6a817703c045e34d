"""The kernels of the chunked gated delta rule against the recurrence in float64, token by token."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxfuse.runtime.ops import chunk_gated_delta_rule as op
from fxfuse.runtime.ops import recurrent_gated_delta_rule as token_by_token

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LENGTHS = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 130])
profile = settings.get_profile("kernels")


def drawn(
    make: Any, seed: int, batch: int, length: int, heads: tuple[int, int], dk: int, dv: int, dtype: Any
) -> list[Any]:
    """query, key, value, g, beta, state; any strides. Keys of length one, or the rule itself blows up."""
    key_heads, ratio = heads
    values = key_heads * ratio
    query, key = (make(seed + i, batch, length, key_heads, dk, dtype=dtype) for i in (0, 1))
    return [
        query,
        key / key.float().norm(dim=-1, keepdim=True).clamp(min=1e-3).to(dtype),
        make(seed + 2, batch, length, values, dv, dtype=dtype),
        -make(seed + 3, batch, length, values).abs(),
        make(seed + 4, batch, length, values, dtype=dtype).sigmoid(),
        make(seed + 5, batch, values, dk, dv),
    ]


def exactly(given_: list[Any], normalise: bool, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and final state in float64."""
    *wide, state = (None if x is None else x.double() for x in given_)
    if state is None:
        sequences = len(given_[2]) if cu_seqlens is None else len(cu_seqlens) - 1
        state = wide[0].new_zeros(sequences, wide[2].shape[2], wide[1].shape[-1], wide[2].shape[-1])
    return token_by_token.reference(*wide, state, normalise, cu_seqlens), state


def is_exact(close: Any, got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor], dtype: Any) -> None:
    # On a GPU products for half precision keep 16 bits of each factor.
    noise = 2e-5 if dtype == torch.float32 else 2e-4
    close(got[0], exact[0], dtype, noise=noise)
    close(got[1], exact[1], torch.float32, noise=noise)


@settings(profile, max_examples=16)
@given(
    st.integers(1, 2),
    LENGTHS,
    st.sampled_from([(1, 1), (2, 1), (1, 2), (1, 3), (1, 4)]),
    st.tuples(st.sampled_from([1, 6, 16, 20, 40]), st.sampled_from([1, 5, 16, 18])),
    FLOATS,
    st.tuples(st.booleans(), st.booleans()),
    st.integers(0, 2**20),
)
def test_it_is_the_rule(
    make: Any,
    close: Any,
    batch: int,
    length: int,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: Any,
    options: tuple[bool, bool],
    seed: int,
) -> None:
    has_state, normalise = options
    given_ = drawn(make, seed, batch, length, heads, *dims, dtype)
    given_[5] = given_[5] if has_state else None
    is_exact(close, op.launch(*given_, normalise), exactly(given_, normalise), dtype)


@settings(profile, max_examples=8)
@given(
    st.lists(st.sampled_from([0, 1, 2, 31, 33, 64, 65]), min_size=1, max_size=4),
    st.sampled_from([torch.int32, torch.int64]),
    FLOATS,
    st.booleans(),
    st.integers(0, 2**20),
)
def test_packed_sequences_are_those_alone(
    make: Any, close: Any, lengths: list[int], integers: Any, dtype: Any, has_state: bool, seed: int
) -> None:
    given_ = drawn(make, seed, 1, sum(lengths), (1, 2), 9, 7, dtype)
    given_[5] = make(seed, len(lengths), 2, 9, 7) if has_state else None
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(integers).to(given_[0].device)
    got = op.launch(*given_, True, bounds)
    is_exact(close, got, exactly(given_, True, bounds), dtype)


@pytest.mark.parametrize("heads", [(1, 8), (2, 3)])
def test_many_value_heads_read_one_key_head(make: Any, close: Any, heads: tuple[int, int]) -> None:
    given_ = drawn(make, 1, 1, 33, heads, 5, 4, torch.float32)
    is_exact(close, op.launch(*given_, True), exactly(given_, True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_the_published_size(make: Any, close: Any, dtype: Any) -> None:
    given_ = drawn(make, 0, 1, 70, (1, 1), 128, 128, dtype)
    is_exact(close, op.launch(*given_, True), exactly(given_, True), dtype)


def test_no_token_gives_the_state_and_no_sequence_nothing(make: Any) -> None:
    *rest, state = drawn(make, 0, 2, 0, (1, 2), 9, 7, torch.float32)
    out, final = op.launch(*rest, state, True)
    assert out.shape == (2, 0, 2, 7) and torch.equal(final, state)
    assert torch.equal(op.launch(*rest, None, True)[1], torch.zeros_like(state))
    out, final = op.launch(*(x[:0] for x in (*rest, state)), True)
    assert out.shape == (0, 0, 2, 7) and final.shape == (0, 2, 9, 7)


def test_equal_keys_at_full_rate_lose_no_digits(make: Any, close: Any) -> None:
    """The triangular system is all ones then, and the powers of it are larger than any number of float32."""
    given_ = drawn(make, 0, 1, 65, (1, 1), 8, 8, torch.float32)
    given_[1] = given_[1][:, :1].expand(1, 65, 1, 8)
    given_[3], given_[4] = torch.zeros_like(given_[3]), torch.ones_like(given_[4])
    is_exact(close, op.launch(*given_, True), exactly(given_, True), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zeros_extreme_gates_and_large_values_give_what_the_rule_gives(
    make: Any, close: Any, dtype: Any
) -> None:
    given_ = [x.clone() for x in drawn(make, 0, 1, 70, (1, 2), 8, 8, dtype)]
    given_[0][:, :3] = 0
    given_[1][:, 2:9] = 0
    given_[2] = (given_[2].float() * 1e4).to(dtype)  # near 65504, the largest number of float16
    given_[3][:, 5:8] = -1e4
    given_[3][:, 12] = -torch.inf  # exp(A_log) beyond float32
    given_[3][:, 20:23] = 0  # and beneath it
    given_[4][:, 4] = 0
    got = op.launch(*given_, True)
    assert got[0].isfinite().all() and got[1].isfinite().all()
    is_exact(close, got, exactly(given_, True), dtype)


def test_rows_of_padding_on_the_left_change_nothing(make: Any) -> None:
    given_ = [x.clone() for x in drawn(make, 0, 1, 70, (1, 2), 8, 8, torch.float32)]
    for x in given_[:3]:
        x[:, :32] = 0  # a chunk of float32, so that the same chunks follow
    given_[4][:, :32] = 0.5
    out, final = op.launch(*given_[:5], None, True)
    alone, alone_final = op.launch(*(x[:, 32:] for x in given_[:5]), None, True)
    assert torch.equal(out[:, :32], torch.zeros_like(out[:, :32]))
    assert torch.equal(out[:, 32:], alone) and torch.equal(final, alone_final)
