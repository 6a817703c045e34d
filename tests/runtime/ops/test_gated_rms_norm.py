"""Gated RMSNorm as an operator: transformers' module is the original, its formula in float64 the oracle."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated

from fxfuse.runtime.ops.gated_rms_norm import gated_rms_norm

EPS = 1e-6


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_error_is_no_larger_than_that_of_transformers(
    dtype: torch.dtype, weights: torch.dtype, no_worse: Any
) -> None:
    torch.manual_seed(0)
    norm = Qwen3_5RMSNormGated(128, eps=EPS).to(weights)
    norm.weight.data.normal_(1.0, 0.2)
    x, gate = (torch.randn(6, 16, 128).to(dtype) for _ in range(2))
    w, y, z = norm.weight.detach().double(), x.double(), gate.double()
    exact = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * w * F.silu(z)
    with torch.no_grad():
        no_worse(gated_rms_norm(x, gate, norm.weight, EPS), norm(x, gate), exact)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8\), \(3, 8\), \(8,\)"):
        gated_rms_norm(torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), EPS)


def test_the_operator_keeps_torchs_rules() -> None:
    row = torch.randn(3, 40).bfloat16()
    x, gate = row[:, :16].unflatten(1, (2, 8)), row[:, 20:36].unflatten(1, (2, 8))
    torch.library.opcheck(gated_rms_norm, (x, gate, torch.randn(8), EPS))
    torch.library.opcheck(gated_rms_norm, (x[:0], gate[:0], torch.randn(8), EPS))
