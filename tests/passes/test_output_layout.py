"""What leaves the graph has the strides that it had, whatever order a pass computes it in."""

import pytest
import torch
from torch import Tensor, nn

from fxfuse import rewrite


class Gated(nn.Module):
    """Two [B, T, C] gated as [B, C, T]: pointwise results keep the order of their operands' memory."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x.transpose(1, 2) * torch.sigmoid(gate.transpose(1, 2)) * 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_output_behind_a_call_of_another_order_keeps_its_strides(dynamic: bool) -> None:
    torch.manual_seed(0)
    module = Gated()
    result = rewrite(module, torch.randn(2, 2, 5, 6).unbind(), passes=("sigmoid_gate",), dynamic=dynamic)
    assert result.report.matched == 1
    for length in (5, 9) if dynamic else (5,):
        given = torch.randn(2, 2, length, 6).unbind()
        expected, got = module(*given), result.graph_module(*given)
        assert torch.allclose(expected, got, atol=1e-5)
        assert expected.stride() == got.stride() and not got.is_contiguous()
