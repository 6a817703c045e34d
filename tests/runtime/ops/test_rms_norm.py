"""RMSNorm as an operator: transformers' modules are the original, their formula in float64 is the oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from fxfuse.runtime.ops.rms_norm import MAX_FEATURES, add_rms_norm, refusal, rms_norm

EPS = 1e-6


def exact(x: Tensor, weight: Tensor, zero_centred: bool) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + zero_centred)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("module", [Qwen3_5RMSNorm, LlamaRMSNorm])
def test_its_error_is_no_larger_than_that_of_transformers(
    module: Any, dtype: torch.dtype, no_worse: Any
) -> None:
    torch.manual_seed(0)
    norm, centred = module(1024, eps=EPS).to(dtype), module is Qwen3_5RMSNorm
    norm.weight.data.normal_(0.0 if centred else 1.0, 0.2)
    x = (torch.randn(3, 5, 1024) * 4).to(dtype)
    with torch.no_grad():
        no_worse(rms_norm(x, norm.weight, EPS, centred), norm(x), exact(x, norm.weight, centred))


def test_a_zero_centred_weight_of_zero_passes_the_signal() -> None:
    x = torch.randn(4, 32)
    torch.testing.assert_close(
        rms_norm(x, torch.zeros(32), EPS, True), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    )
    assert torch.equal(rms_norm(x, torch.zeros(32), EPS, False), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_the_one_that_is_normed(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(2, 3, 64).to(dtype), torch.randn(2, 3, 64).to(dtype), torch.randn(64))
    out, total = add_rms_norm(x, residual, weight, EPS, True)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, rms_norm(total, weight, EPS, True))


def test_a_weight_in_float32_does_not_widen_a_bfloat16_output() -> None:
    assert rms_norm(torch.ones(2, 8).bfloat16(), torch.ones(8), EPS, True).dtype == torch.bfloat16


def test_wrong_shapes_and_what_the_kernel_does_not_take_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8\), \(7,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(7), EPS, True)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8), EPS, True)
    wide = torch.ones(1, MAX_FEATURES + 1)
    assert f"{MAX_FEATURES + 1} features" in (refusal(wide, wide[0]) or "")
    assert "cpu" in (refusal(torch.ones(2, 8), torch.ones(8)) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_torchs_rules(dtype: torch.dtype) -> None:
    for x in (torch.randn(2, 3, 8).to(dtype), torch.randn(8, 3).to(dtype).T, torch.randn(0, 8).to(dtype)):
        weight = torch.randn(8)
        weight = weight if x.shape[-1] == 8 else torch.randn(x.shape[-1])
        torch.library.opcheck(rms_norm, (x, weight, EPS, True))
        torch.library.opcheck(add_rms_norm, (x, torch.randn(x.shape), weight, EPS, False))
