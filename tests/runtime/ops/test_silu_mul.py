"""SwiGLU's product as an operator: transformers' expression is the original."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from fxfuse.runtime.ops.silu_mul import silu_mul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_error_is_no_larger_than_that_of_transformers(dtype: torch.dtype, no_worse: Any) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(5, 7, 500) * 3).to(dtype).split(250, -1)
    exact = F.silu(gate.double()) * up.double()
    no_worse(silu_mul(gate, up), ACT2FN["silu"](gate) * up, exact)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8\) and \(2, 1\)"):
        silu_mul(torch.ones(2, 8), torch.ones(2, 1))


def test_the_operator_keeps_torchs_rules() -> None:
    for row in (torch.randn(3, 16).bfloat16(), torch.randn(0, 16)):
        torch.library.opcheck(silu_mul, tuple(row.split(8, -1)))
