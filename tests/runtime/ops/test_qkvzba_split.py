"""The split as an operator: Qwen3-Next's own reordering is the original."""

from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fxfuse.runtime.ops.qkvzba_split import qkvzba_split

DK, DV, HEADS = 8, 4, 2


def row(ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    values = HEADS * ratio
    sizes = [2 * HEADS * DK + 2 * values * DV, 2 * values]
    return torch.randn(2, 3, sum(sizes)).bfloat16().split(sizes, dim=-1)  # type: ignore[return-value]


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
def test_interleaved_groups_come_apart_as_in_transformers(ratio: int) -> None:
    config = Qwen3NextConfig(
        hidden_size=16,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS * ratio,
        linear_key_head_dim=DK,
        linear_value_head_dim=DV,
    )
    qkvz, ba = row(ratio)
    q, k, v, z, b, a = Qwen3NextGatedDeltaNet(config, 0).fix_query_key_value_ordering(
        qkvz.contiguous(), ba.contiguous()
    )
    mixed = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
    got = qkvzba_split(qkvz, ba, HEADS, HEADS * ratio, DK, DV, True)
    assert all(torch.equal(x, y) for x, y in zip(got, (mixed, z, b, a), strict=True))


def test_contiguous_parts_are_slices() -> None:
    qkvz, ba = row(3)
    mixed, z, b, a = qkvzba_split(qkvz, ba, HEADS, 6, DK, DV, False)
    assert torch.equal(torch.cat([mixed, z.flatten(2)], -1), qkvz) and z.shape == (2, 3, 6, DV)
    assert torch.equal(torch.cat([b, a], -1), ba)
    assert all(x.is_contiguous() for x in (mixed, z, b, a))


def test_wrong_sizes_are_named() -> None:
    qkvz, ba = row(2)
    with pytest.raises(ValueError, match="64 features are not q, k, v and z of 2 key heads of 8 and 6"):
        qkvzba_split(qkvz, ba, HEADS, 6, DK, DV, True)
    with pytest.raises(ValueError, match=r"ba \(2, 3, 7\)"):
        qkvzba_split(qkvz, ba[..., 1:], HEADS, 4, DK, DV, True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_operator_keeps_torchs_rules(interleaved: bool) -> None:
    given: Any = row(2)
    torch.library.opcheck(qkvzba_split, (*given, HEADS, 4, DK, DV, interleaved))
    torch.library.opcheck(
        qkvzba_split, (*(torch.empty(0, x.shape[-1]) for x in given), HEADS, 4, DK, DV, interleaved)
    )
