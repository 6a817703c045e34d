"""What operators say of tensors that no kernel may be launched on, and what they do with unusual ones."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse.runtime.ops
from fxfuse.errors import ShapeError

assert fxfuse.runtime.ops  # registers the operators
B, T, HK, R, DK, DV, S, K, D, H = 5, 3, 2, 3, 4, 6, 4, 4, 8, 7
HV = HK * R
C = 2 * HK * DK + HV * DV


def arguments(name: str) -> list[Any]:
    """Small ones that fit; no size but the batch's is B."""
    torch.manual_seed(0)
    new = torch.randn
    row = [new(B, T, H), new(B, T, H)]
    rule = [new(B, T, HK, DK), new(B, T, HK, DK), new(B, T, HV, DV), -new(B, T, HV).abs(), new(B, T, HV)]
    state = new(B, HV, DK, DV)
    attention = [new(B, T, 2, D), new(B, T, 2, D), new(D), new(D), new(B, T, 4), new(B, T, 4)]
    attention += [new(B, 2, 9, D), new(B, 2, 9, D), torch.arange(T), 1e-6]
    found: dict[str, list[Any]] = {
        "rms_norm": [row[0], new(H), 1e-6, True],
        "add_rms_norm": [*row, new(H), 1e-6, True],
        "gated_rms_norm": [*row, new(H), 1e-6],
        "silu_mul": row,
        "sigmoid_gate_mul": row,
        "gdn_gates": [*row, new(H), new(H), False],
        "qkvzba_split": [new(B, 2 * HK * DK + 2 * HV * DV), new(B, 2 * HV), HK, HV, DK, DV, True],
        "causal_conv1d": [new(B, C, T), new(C, K), new(C), new(B, C, S), None, True],
        "causal_conv1d_update": [new(B, C, T), new(B, C, S), new(C, K), new(C), True],
        "recurrent_gated_delta_rule": [*rule, state, True, None],
        "chunk_gated_delta_rule": [*rule, state, True, None],
        "chunk_gated_delta_rule_backward": [new(B, T, HV, DV), new(state.shape), *rule, state, True, None],
        "qk_norm_rope": [new(B, T, 4, D), *attention],
        "qk_norm_rope_gate": [new(B, T, 4, 2 * D), *attention],
        "gdn_decode": [
            *(new(B, HK, DK), new(B, HK, DK), new(B, HK, R, DV), new(B, HK, R, DV)),
            *(new(B, HK, R), new(B, HK, R), new(B, C, S), new(C, K), new(C), new(HV), new(HV), new(DV)),
            *(state, 1e-6, False),
        ],
    }
    return found[name]


INSIDE = {"gather_features", "embedding", "embedding_backward"}  # which only we write into graphs
OPERATORS = sorted(
    {
        name.removeprefix("fxfuse::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fxfuse::")
    }
    - INSIDE
)


def written(name: str) -> list[int]:
    """The arguments that an operator writes to, by its schema."""
    arguments = getattr(torch.ops.fxfuse, name).default._schema.arguments
    return [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]


def call(name: str, given: list[Any]) -> list[Tensor]:
    """Outputs, and the arguments after the call."""
    out = getattr(torch.ops.fxfuse, name)(*given)
    return [*(out if isinstance(out, (tuple, list)) else (out,)), *(given[i] for i in written(name))]


def floats(given: list[Any]) -> Iterator[tuple[int, Tensor]]:
    return ((i, x) for i, x in enumerate(given) if isinstance(x, Tensor) and x.is_floating_point())


@pytest.mark.parametrize("name", OPERATORS)
def test_a_tensor_of_another_kind_or_size_is_named(name: str) -> None:
    for i, x in floats(arguments(name)):
        wrong = [x.int(), x.to(torch.complex64), x[0, ..., 0] if x.dim() > 1 else x.sum()]
        if (name, i) != ("rms_norm", 0):  # which may have any rows
            wrong += [x.unsqueeze(0), torch.cat([x, x[:1]])]
        for bad in wrong:
            given = arguments(name)
            given[i] = bad
            with pytest.raises(ShapeError) as raised:
                call(name, given)
            assert name.removeprefix("add_") in str(raised.value), (i, bad.dtype, bad.shape)


@pytest.mark.parametrize("name", filter(written, OPERATORS))
def test_what_is_written_may_not_be_expanded(name: str) -> None:
    for i in written(name):
        given = arguments(name)
        given[i] = given[i][:1].expand_as(given[i])
        with pytest.raises(ShapeError, match=rf"{name} writes \w+ .* in place.*contiguous\(\) copy"):
            call(name, given)


@pytest.mark.parametrize("name", OPERATORS)
def test_float64_is_computed_by_the_reference(name: str) -> None:
    plain, wide = arguments(name), arguments(name)
    for i, x in floats(wide):
        wide[i] = x.double()
    for got, expected in zip(call(name, wide), call(name, plain), strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_no_sequence_gives_nothing(name: str) -> None:
    given = [x[:0] if isinstance(x, Tensor) and len(x) == B else x for x in arguments(name)]
    before = call(name, arguments(name))
    for got, expected in zip(call(name, given), before, strict=True):
        assert got.shape == (0, *expected.shape[1:]) and got.dtype == expected.dtype


@pytest.mark.parametrize("name", OPERATORS)
def test_states_and_inputs_of_any_strides_give_the_same(name: str) -> None:
    dense, strided = arguments(name), arguments(name)
    for i, x in floats(strided):
        room = x.new_full((*x.shape[::-1], 2), torch.nan)[..., 0]
        strided[i] = room.permute(*reversed(range(x.dim()))).copy_(x)
    assert any(not x.is_contiguous() for _, x in floats(strided))
    for got, expected in zip(call(name, strided), call(name, dense), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_heads_and_taps_that_do_not_exist_are_named() -> None:
    for name in ("recurrent_gated_delta_rule", "chunk_gated_delta_rule"):
        for cut in ((..., slice(0)), (slice(None), slice(None), slice(0))):
            given = arguments(name)
            given[0], given[1] = given[0][cut], given[1][cut]
            if cut[0] is ...:
                given[5] = given[5][:, :, :0]
            with pytest.raises(ShapeError, match=f"{name} takes query and key"):
                call(name, given)
    given = arguments("causal_conv1d")
    with pytest.raises(ShapeError, match=r"weight \(52, 0\) is not \[C, K\] with K >= 1"):
        call("causal_conv1d", [given[0], given[1][:, :0], *given[2:]])
    given = arguments("qkvzba_split")
    with pytest.raises(ShapeError, match="0 key heads"):
        call("qkvzba_split", [*given[:2], 0, *given[3:]])


def test_places_and_numbers_of_sequences_are_integers() -> None:
    given = arguments("qk_norm_rope")
    with pytest.raises(ShapeError, match=r"positions are of .*float32, not integers"):
        call("qk_norm_rope", [*given[:9], given[9].float(), given[10]])
    given = arguments("causal_conv1d")
    with pytest.raises(ShapeError, match=r"seq_idx \(5, 3\), torch.float32, is not \[B, T\] of integers"):
        call("causal_conv1d", [*given[:4], torch.zeros(B, T), True])
