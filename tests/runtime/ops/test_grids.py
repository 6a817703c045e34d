"""Programs of a launch: CUDA takes 65,535 of them in every dimension of a grid but the first."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.runtime.ops import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    gated_rms_norm,
    gdn_decode,
    gdn_gates,
    qk_norm_rope_gate,
    qkvzba_split,
    recurrent_gated_delta_rule,
    rms_norm,
    silu_mul,
)
from fxfuse.runtime.ops.triton_kernel import Kernel

MOST = (2**31 - 1, 65535, 65535)
HIDDEN, HK, HV, D, HEADS, TAPS = 8192, 16, 128, 128, 64, 4


@pytest.fixture()
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grids of all launches; nothing is launched."""
    seen: list[tuple[int, ...]] = []

    def record(kernel: Kernel, grid: tuple[int, ...]) -> Any:
        seen.append(grid)
        return lambda *args, **options: None

    monkeypatch.setattr(Kernel, "__getitem__", record)
    return seen


def new(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize(("batch", "length"), [(70_000, 1), (1, 2**21), (4096, 512), (70_000, 0), (0, 5)])
def test_any_number_of_sequences_and_tokens_can_be_launched(
    grids: list[tuple[int, ...]], batch: int, length: int
) -> None:
    x, heads = new(batch, length, HIDDEN), new(batch, length, HV)
    channels = (2 * HK + HV) * D
    mixed, taps = new(batch, channels, length), new(channels, TAPS)
    q, k, v = new(batch, length, HK, D), new(batch, length, HK, D), new(batch, length, HV, D)
    state = new(batch, HV, D, D)
    rms_norm.add_launch(x, x, new(HIDDEN), 1e-6, True)
    gated_rms_norm.launch(v, v, new(D), 1e-6)
    silu_mul.launch(x, x)
    gdn_gates.launch(heads, heads, new(HV), new(HV), False)
    row = new(batch, length, 2 * HK * D + 2 * HV * D)
    qkvzba_split.launch(row, new(batch, length, 2 * HV), HK, HV, D, D, True)
    causal_conv1d.launch(mixed, taps, None, None, None, True)
    causal_conv1d_update.launch(mixed[..., :8], new(batch, channels, TAPS), taps, None, True)
    recurrent_gated_delta_rule.launch(q, k, v, heads, heads, state, True)
    chunk_gated_delta_rule.launch(q, k, v, heads, heads, state, True)
    if batch == 1:
        bounds = torch.empty(70_000, dtype=torch.int64, device="meta")
        many = new(len(bounds) - 1, HV, D, D)
        recurrent_gated_delta_rule.launch(q, k, v, heads, heads, many, True, bounds)
        chunk_gated_delta_rule.launch(q, k, v, heads, heads, many, True, bounds)
    attention, angles, kv = new(batch, length, HEADS, 512), new(batch, length, 64), new(batch, length, 4, 256)
    caches, positions = [new(batch, 4, length, 256)] * 2, torch.zeros(1, dtype=torch.int64, device="meta")
    rest = (new(256), new(256), angles, angles, *caches, positions, 1e-6)
    qk_norm_rope_gate.gate_launch(attention, kv, kv, *rest)
    if length == 1:
        parts = gdn_decode.views_of_row(row[:, 0], new(batch, 2 * HV), HK, HV, D, D, True)
        weights = (taps, None, new(HV), new(HV), new(D))
        gdn_decode.launch(*parts, new(batch, channels, TAPS), *weights, state, 1e-6)
    assert len(grids) >= 11
    for grid in grids:
        assert all(0 <= n <= most for n, most in zip(grid, MOST, strict=False)), grid
