"""A value that is rounded on its way stays rounded, whatever is rewritten before and after it."""

import torch
from torch import Tensor, nn

from fxfuse import rewrite
from fxfuse.passes.pipeline import PASSES

ALL = tuple(each.name for each in PASSES)
H = 12


class WrittenInBfloat16(nn.Module):
    """Both factors are written in place, one of them in fp32, the other one in bf16, which rounds it."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        gated = gate.clone().mul_(torch.sigmoid(gate))
        rounded = x.clone().to(torch.bfloat16)
        return rounded.mul_(gated).to(torch.float32) * 2


class TwoNorms(nn.Module):
    """A zero-centred norm, rounded, and a plain norm of what it gives: rules that run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.rand(H), requires_grad=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        def normed(y: Tensor) -> Tensor:
            return y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)

        rounded = (normed(x) * (1.0 + self.first)).to(torch.float16)
        return normed(rounded.to(torch.float32)) * self.second


def _undone(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, list[str]]:
    result = rewrite(module, inputs, passes=ALL, dynamic=False)
    undone = [miss.reason for miss in result.report.misses if "undone" in miss.reason]
    with torch.no_grad():
        return result.graph_module(*inputs), undone


def test_a_write_into_a_narrower_dtype_rounds() -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(3, 3, H), torch.randn(3, 3, H)
    got, undone = _undone(WrittenInBfloat16(), x, gate)
    assert not undone
    assert torch.equal(got, got.to(torch.bfloat16).float())
    assert torch.allclose(got, WrittenInBfloat16()(x, gate), rtol=2**-7)


def test_a_norm_behind_a_rounded_norm_undoes_no_pass() -> None:
    torch.manual_seed(0)
    module, x = TwoNorms(), torch.randn(3, 3, H)
    got, undone = _undone(module, x)
    assert not undone
    assert torch.allclose(got, module(x), rtol=2**-9)
