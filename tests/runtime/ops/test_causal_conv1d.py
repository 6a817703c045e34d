"""The causal convolution and its step as operators: transformers' expressions are the original."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.runtime.ops.causal_conv1d import causal_conv1d
from fxfuse.runtime.ops.causal_conv1d_update import causal_conv1d_update

CHANNELS = 12
DTYPES = [torch.float32, torch.bfloat16]


def whole(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution as transformers writes it: padded on both sides, then cut."""
    padding = weight.shape[-1] - 1
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=padding, groups=len(weight))
    return F.silu(y[..., : x.shape[-1]])


def drawn(dtype: torch.dtype, length: int = 9, taps: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    x = torch.randn(2, length, CHANNELS).to(dtype).transpose(1, 2)
    return x, torch.randn(CHANNELS, taps).to(dtype)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_its_error_is_no_larger_than_that_of_transformers(
    length: int, dtype: torch.dtype, no_worse: Any
) -> None:
    x, weight = drawn(dtype, length)
    out = causal_conv1d(x, weight, None, None, None, True)
    no_worse(out, whole(x, weight), whole(x.double(), weight.double()))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("cut", [1, 2, 6])
def test_a_state_stands_for_the_tokens_before(cut: int, taps: int) -> None:
    x, weight = drawn(torch.float32, taps=taps)
    bias = torch.randn(CHANNELS)
    state = F.pad(x[..., :cut], (taps, 0))[..., -taps:]
    out = causal_conv1d(x[..., cut:], weight, bias, state, None, True)
    torch.testing.assert_close(out, whole(x, weight, bias)[..., cut:])


def test_packed_sequences_give_what_each_gives_alone() -> None:
    x, weight = drawn(torch.float32, 11)
    lengths = [1, 3, 2, 5]
    numbers = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).expand(2, -1)
    out = causal_conv1d(x, weight, None, None, numbers, True)
    alone = torch.cat([whole(part, weight) for part in x.split(lengths, -1)], -1)
    torch.testing.assert_close(out, alone)
    assert not torch.allclose(alone, whole(x, weight))


@pytest.mark.parametrize("columns", [3, 4, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_one_by_one_are_the_whole_and_keep_the_last_columns(dtype: torch.dtype, columns: int) -> None:
    x, weight = drawn(dtype)
    state = torch.zeros(2, CHANNELS, columns, dtype=dtype)
    address = state.data_ptr()
    steps = [causal_conv1d_update(x[..., t : t + 1], state, weight, None, True) for t in range(9)]
    expected = causal_conv1d(x, weight, None, None, None, True)
    torch.testing.assert_close(torch.cat(steps, -1), expected)
    assert torch.equal(state, x[..., -columns:]) and state.data_ptr() == address


def test_several_tokens_in_one_step_are_several_steps() -> None:
    x, weight = drawn(torch.float32)
    state, other = torch.randn(2, 2, CHANNELS, 4).unbind()
    other.copy_(state)
    out = causal_conv1d_update(x, state, weight, None, True)
    steps = [causal_conv1d_update(x[..., t : t + 1], other, weight, None, True) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, -1), out)
    assert torch.equal(state, other)


def test_wrong_shapes_are_named() -> None:
    x, weight = drawn(torch.float32)
    with pytest.raises(ValueError, match=r"initial_state \(2, 12, 2\) is not \[B, C, S\] with S >= K - 1"):
        causal_conv1d(x, weight, None, x[..., :2], None, True)
    with pytest.raises(ValueError, match=r"conv_state \(2, 11, 4\)"):
        causal_conv1d_update(x, torch.zeros(2, 11, 4), weight, None, True)
    with pytest.raises(ValueError, match=r"seq_idx .* is not \[B, T\].*|weight"):
        causal_conv1d(x, weight, None, None, torch.zeros(2, 3), True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_keep_torchs_rules(dtype: torch.dtype) -> None:
    x, weight = drawn(dtype)
    bias, state, numbers = (
        torch.randn(CHANNELS),
        torch.randn(2, CHANNELS, 4).to(dtype),
        torch.zeros(2, 9).long(),
    )
    for given in ((None, None, None), (bias, state, None), (None, None, numbers)):
        torch.library.opcheck(causal_conv1d, (x, weight, *given, True))
    torch.library.opcheck(causal_conv1d, (x[..., :0], weight, None, None, None, False))
    for length in (0, 1, 9):
        torch.library.opcheck(causal_conv1d_update, (x[..., :length], state, weight, bias, True))
