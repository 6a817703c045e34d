"""The kernel of one token of Gated DeltaNet against its reference in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

from fxfuse.runtime.ops import gdn_decode as op

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
RATIOS = st.sampled_from([1, 2, 3, 4, 8])
profile = settings.get_profile("kernels")


def arguments(
    make: Any,
    batch: int,
    heads: int,
    ratio: int,
    dk: int,
    dv: int,
    taps: int,
    dtype: Any,
    seed: int,
    **options: Any,
) -> list[Any]:
    """All arguments, the parts as views of one strided row."""
    values = heads * ratio
    channels, wide = 2 * heads * dk + values * dv, 2 * heads * dk + 2 * values * dv
    row = make(seed, batch, wide + 2 * values, dtype=dtype, scale=2.0)
    parts = op.views_of_row(
        row[:, :wide], row[:, wide:], heads, values, dk, dv, options.get("interleaved", False)
    )
    weights = options.get("weights", torch.float32)
    return [
        *parts,
        make(seed + 1, batch, channels, taps + options.get("more", 0), dtype=dtype),
        make(seed + 2, channels, taps, dtype=dtype),
        make(seed + 3, channels, dtype=dtype) if options.get("bias") else None,
        make(seed + 4, values, dtype=weights),
        make(seed + 5, values, dtype=weights),
        make(seed + 6, dv, dtype=weights),
        make(seed + 7, batch, values, dk, dv, dtype=options.get("state", torch.float32)),
        1e-6,
        options.get("round_beta", False),
    ]


@settings(profile, max_examples=40)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.integers(1, 20),
    st.integers(1, 20),
    RATIOS,
    st.sampled_from([4, 4, 1, 2, 3]),
    FLOATS,
    st.fixed_dictionaries(
        {
            "interleaved": st.booleans(),
            "bias": st.booleans(),
            "weights": FLOATS,
            "state": st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
            "more": st.integers(-1, 2),
        }
    ),
    st.integers(0, 2**20),
)
def test_it_is_the_reference(
    make: Any,
    close: Any,
    doubled: Any,
    sizes: tuple[int, int],
    dk: int,
    dv: int,
    ratio: int,
    taps: int,
    dtype: Any,
    options: dict[str, Any],
    seed: int,
) -> None:
    given_ = arguments(make, *sizes, ratio, dk, dv, taps, dtype, seed, **options)
    exact_given = doubled(*given_)
    exact = op.reference(*exact_given)
    close(op.launch(*given_), exact, dtype, noise=1e-3)
    assert torch.equal(given_[6].double(), exact_given[6])
    close(given_[12], exact_given[12], options["state"], noise=1e-4)


@pytest.mark.parametrize("ratio", [1, 3])
def test_heads_of_the_published_size(make: Any, close: Any, doubled: Any, ratio: int) -> None:
    given_ = arguments(make, 1, 1, ratio, 128, 128, 4, torch.float32, 0)
    exact_given = doubled(*given_)
    exact = op.reference(*exact_given)
    close(op.launch(*given_), exact, torch.float32, noise=1e-4)
    close(given_[12], exact_given[12], torch.float32)


def test_a_rate_rounded_as_eager_does_is_another_one(make: Any, close: Any) -> None:
    plain, rounded, expected = (
        arguments(make, 2, 2, 2, 8, 8, 4, torch.bfloat16, 0, round_beta=flag) for flag in (False, True, True)
    )
    rates = torch.linspace(-3, 3, 500).bfloat16()
    exact = rates.float().sigmoid()
    downwards = rates.sigmoid().float() < exact  # the interpreter truncates: the same there
    for given_ in (plain, rounded, expected):
        given_[4].copy_(rates[downwards][: given_[4].numel()].view_as(given_[4]))
    op.launch(*plain)
    op.launch(*rounded)
    op.reference(*expected)
    close(rounded[12], expected[12], torch.float32)
    with pytest.raises(AssertionError):
        close(plain[12], expected[12], torch.float32)


def test_rows_of_zeros_and_extreme_gates_give_numbers(make: Any, close: Any, doubled: Any) -> None:
    for a, A_log in ((100.0, 2.8), (-100.0, -20.0), (100.0, 60.0), (0.0, -torch.inf)):
        given_ = arguments(make, 1, 2, 2, 8, 8, 4, torch.float32, 0)
        for x in given_[:3]:
            x.zero_()
        given_[6].zero_()
        given_[5].fill_(a)
        given_[9].fill_(A_log)
        exact_given = doubled(*given_)
        exact = op.reference(*exact_given)
        close(op.launch(*given_), exact, torch.float32)
        close(given_[12], exact_given[12], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_near_the_largest_number_of_float16_give_numbers(
    make: Any, close: Any, doubled: Any, dtype: Any
) -> None:
    given_ = [
        x.clone() if isinstance(x, torch.Tensor) else x
        for x in arguments(make, 1, 2, 3, 8, 6, 4, dtype, 0, interleaved=True)
    ]
    for i in (0, 1, 2, 6):  # query, key, value and the columns before them
        given_[i] = (given_[i].sign() * 6e4).to(dtype)
    given_[12] *= 1e4
    exact_given = doubled(*given_)
    exact = op.reference(*exact_given)
    out = op.launch(*given_)
    assert out.isfinite().all() and given_[12].isfinite().all()
    close(out, exact, dtype, noise=1e-4)
    close(given_[12], exact_given[12], torch.float32, noise=1e-4)


def eager_step(given_: list[Any]) -> None:
    """The states moved on by transformers' expressions, in its dtypes."""
    query, key, value, _, b, a, conv_state, weight, _, A_log, dt_bias, _, state, *_ = given_
    heads, ratio = value.shape[1:3]
    row = torch.cat([x.flatten(1) for x in (query, key, value)], -1)
    window = torch.cat([conv_state, row.unsqueeze(-1)], -1)
    conv_state.copy_(window[..., 1:])
    mixed = F.silu(F.conv1d(window, weight.unsqueeze(1), groups=len(weight))[..., -1:]).transpose(1, 2)
    parts = mixed.split([query[0].numel(), key[0].numel(), value[0].numel()], -1)
    q, k = (x.unflatten(-1, (heads, -1)).repeat_interleave(ratio, 2) for x in parts[:2])
    moved = torch_recurrent_gated_delta_rule(
        q,
        k,
        parts[2].unflatten(-1, (heads * ratio, -1)),
        g=(-A_log.float().exp() * F.softplus(a.flatten(1).float() + dt_bias)).unsqueeze(1),
        beta=b.flatten(1).sigmoid().unsqueeze(1),
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )[1]
    state.copy_(moved)


@pytest.mark.slow
def test_a_thousand_steps_stay_within_the_error_of_the_model(
    make: Any, close: Any, doubled: Any, no_worse: Any
) -> None:
    given_ = arguments(make, 1, 1, 2, 4, 4, 4, torch.bfloat16, 0)
    given_[9].fill_(-6.0)  # a slow decay: what is added is kept for hundreds of steps
    eager = [x.clone() if isinstance(x, torch.Tensor) else x for x in given_]
    exact_given = doubled(*given_)
    random = torch.Generator().manual_seed(0)
    for _ in range(1000):
        for i in range(6):
            eager[i] = given_[i] = torch.randn(given_[i].shape, generator=random).to(given_[i])
            exact_given[i] = given_[i].double()
        eager_step(eager)
        out, exact = op.launch(*given_), op.reference(*exact_given)
    no_worse(given_[12], eager[12], exact_given[12])
    close(out, exact, torch.bfloat16, noise=1e-3)
    close(given_[12], exact_given[12], torch.float32, noise=1e-4)
    assert torch.equal(given_[6].double(), exact_given[6]) and torch.equal(eager[6], given_[6])


def test_no_sequence_gives_nothing(make: Any) -> None:
    given_ = [
        x[:0] if i in (0, 1, 2, 3, 4, 5, 6, 12) else x
        for i, x in enumerate(arguments(make, 1, 2, 2, 8, 8, 4, torch.float32, 0))
    ]
    assert op.launch(*given_).shape == (0, 4, 8)
