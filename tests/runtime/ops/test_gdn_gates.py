"""The gates of Gated DeltaNet as an operator: transformers' expressions are the original."""

import pytest
import torch
import torch.nn.functional as F

from fxfuse.runtime.ops.gdn_gates import gdn_gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_transformers_and_the_switch_rounds_beta_as_eager_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(2, 9, 12) * 3).to(dtype).split(6, -1)
    A_log, dt_bias = torch.empty(6).uniform_(0.01, 16).log(), torch.randn(6)
    g, beta = gdn_gates(a, b, A_log, dt_bias)
    assert torch.equal(g, -A_log.float().exp() * F.softplus(a.float() + dt_bias))
    assert torch.equal(beta, b.float().sigmoid()) and g.dtype == beta.dtype == torch.float32
    eager = gdn_gates(a, b, A_log, dt_bias, round_beta=True)
    assert torch.equal(eager[0], g) and torch.equal(eager[1], b.sigmoid().float())
    assert torch.equal(eager[1], beta) == (dtype == torch.float32)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 8\), \(2, 8\), \(8,\), \(7,\)"):
        gdn_gates(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), torch.ones(7))


@pytest.mark.parametrize("round_beta", [False, True])
def test_the_operator_keeps_torchs_rules(round_beta: bool) -> None:
    for row in (torch.randn(3, 12).bfloat16(), torch.randn(0, 12)):
        torch.library.opcheck(gdn_gates, (*row.split(6, -1), torch.randn(6), torch.randn(6), round_beta))
