"""Gated attention output as an operator: transformers' expression is the original."""

from typing import Any

import pytest
import torch

from fxfuse.runtime.ops.sigmoid_gate_mul import sigmoid_gate_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_error_is_no_larger_than_that_of_transformers(dtype: torch.dtype, no_worse: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 32).to(dtype).transpose(1, 2)
    gate = (torch.randn(2, 5, 4, 64) * 3).to(dtype)[..., 32:]
    no_worse(sigmoid_gate_mul(x, gate), x * torch.sigmoid(gate), x.double() * gate.double().sigmoid())


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8\) and \(2, 1\)"):
        sigmoid_gate_mul(torch.ones(2, 8), torch.ones(2, 1))


def test_the_operator_keeps_torchs_rules() -> None:
    x = torch.randn(2, 4, 5, 8).transpose(1, 2)
    torch.library.opcheck(sigmoid_gate_mul, (x, torch.randn(2, 5, 4, 16)[..., 8:]))
    torch.library.opcheck(sigmoid_gate_mul, (x[:0], torch.randn(0, 5, 4, 8)))
