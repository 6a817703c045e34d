"""q and k's norms, rotation and cache write as operators: transformers' expressions are the original."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, apply_rotary_pos_emb

from fxfuse.runtime.ops.qk_norm_rope_gate import (
    MAX_HEAD_DIM,
    gate_reference,
    qk_norm_rope,
    qk_norm_rope_gate,
    refusal,
)

BATCH, HEADS, KV_HEADS, DIM, ROTARY, EPS = 2, 6, 2, 32, 8, 1e-6


def arguments(dtype: torch.dtype, length: int = 5, capacity: int = 9) -> list[Any]:
    torch.manual_seed(length)
    row = torch.randn(BATCH, length, (2 * HEADS + 2 * KV_HEADS) * DIM).to(dtype)
    parts = row.split([2 * HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=-1)
    angles = torch.randn(1, length, ROTARY // 2).repeat(BATCH, 1, 2)
    return [
        *(x.unflatten(-1, (n, -1)) for x, n in zip(parts, (HEADS, KV_HEADS, KV_HEADS), strict=True)),
        *(torch.randn(DIM).to(dtype) * 0.2 for _ in range(2)),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        *(torch.zeros(BATCH, KV_HEADS, capacity, DIM, dtype=dtype) for _ in range(2)),
        torch.arange(length) + 2,
        EPS,
    ]


def original(query_gate: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What transformers' attention does before it attends, with a static cache."""
    q_weight, k_weight, cos, sin, key_cache, value_cache, positions, eps = rest
    norms = []
    for weight in (q_weight, k_weight):
        norm = Qwen3_5RMSNorm(DIM, eps=eps)
        norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        norms.append(norm)
    query, gate = query_gate.chunk(2, dim=-1)
    query, key = norms[0](query).transpose(1, 2), norms[1](key).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    key_cache.index_copy_(2, positions, key)
    value_cache.index_copy_(2, positions, value.transpose(1, 2))
    return query, gate


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_error_is_no_larger_than_that_of_transformers(
    dtype: torch.dtype, length: int, no_worse: Any
) -> None:
    ours, theirs = arguments(dtype, length), arguments(dtype, length)
    exact = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in ours]
    (query, gate), (wanted, wanted_gate) = qk_norm_rope_gate(*ours), original(*theirs)
    exact_query, _ = gate_reference(*exact)
    assert torch.equal(gate, wanted_gate) and gate.is_contiguous() and query.is_contiguous()
    no_worse(query, wanted, exact_query)
    no_worse(ours[7], theirs[7], exact[7])
    assert torch.equal(ours[8], theirs[8])
    without = arguments(dtype, length)
    assert torch.equal(qk_norm_rope(without[0][..., :DIM], *without[1:]), query)
    assert torch.equal(without[7], ours[7])


def test_one_position_is_the_first_of_all() -> None:
    each, one = arguments(torch.float32), arguments(torch.float32)
    one[9] = torch.tensor(2)
    assert all(
        torch.equal(x, y) for x, y in zip(qk_norm_rope_gate(*each), qk_norm_rope_gate(*one), strict=True)
    )
    assert torch.equal(each[7], one[7]) and torch.equal(each[8], one[8])
    assert each[7][:, :, :2].eq(0).all() and each[7][:, :, 2:7].ne(0).all() and each[7][:, :, 7:].eq(0).all()


def test_without_weights_it_only_rotates() -> None:
    given = arguments(torch.float32)
    given[3] = given[4] = None
    query, key, value = given[0][..., :DIM], given[1], given[2]
    wanted = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *given[5:7])
    torch.testing.assert_close(qk_norm_rope(query, *given[1:]), wanted[0])
    torch.testing.assert_close(given[7][:, :, 2:7], wanted[1])
    assert torch.equal(given[8][:, :, 2:7], value.transpose(1, 2))
    torch.library.opcheck(qk_norm_rope_gate, tuple(given))
    with pytest.raises(ValueError, match="one of the norms has a weight"):
        qk_norm_rope_gate(*given[:3], torch.zeros(DIM), *given[4:])


def test_wrong_shapes_and_what_the_kernel_does_not_take_are_named() -> None:
    given = arguments(torch.float32)
    with pytest.raises(ValueError, match=r"value is \(2, 5, 1, 32\), not \(2, 5, 2, 32\)"):
        qk_norm_rope_gate(*given[:2], given[2][:, :, :1], *given[3:])
    with pytest.raises(ValueError, match="3 positions: one for each of 5 tokens"):
        qk_norm_rope_gate(*given[:9], torch.arange(3), EPS)
    with pytest.raises(ValueError, match="7 rotated features"):
        qk_norm_rope_gate(*given[:5], given[5][..., 1:], given[6][..., 1:], *given[7:])
    with pytest.raises(ValueError, match="heads of 63 features"):
        qk_norm_rope_gate(given[0][..., 1:], *given[1:])
    assert f"heads of {MAX_HEAD_DIM + 1}" in (refusal(*[torch.empty(1, 1, 1, MAX_HEAD_DIM + 1)] * 2) or "")
    assert "cpu" in (refusal(*given[:9]) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 5])
def test_the_operators_keep_torchs_rules(length: int, dtype: torch.dtype) -> None:
    given = arguments(dtype, length)
    torch.library.opcheck(qk_norm_rope_gate, tuple(given))
    torch.library.opcheck(qk_norm_rope, (given[0][..., :DIM], *given[1:]))
