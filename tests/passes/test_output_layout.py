"""What leaves the graph has the strides that it had, whatever order a pass computes it in."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse import rewrite
from fxfuse.passes.output_layout import restore_output_layout
from fxfuse.passes.program import Program


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Two [B, T, C] gated as [B, C, T]: pointwise results keep the order of their operands' memory."""
    return x.transpose(1, 2) * torch.sigmoid(gate.transpose(1, 2)) * 2


class Gated(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated(x, gate)


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_pass_changes_the_strides_of_an_output(dynamic: bool) -> None:
    result = rewrite(Gated(), torch.randn(2, 2, 5, 6).unbind(), passes=("sigmoid_gate",), dynamic=dynamic)
    for length in (5, 9) if dynamic else (5,):
        given = torch.randn(2, 2, length, 6).unbind()
        expected, got = gated(*given), result.graph_module(*given)
        assert torch.allclose(expected, got, atol=1e-5)
        assert expected.stride() == got.stride() and not got.is_contiguous()


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_an_output_in_another_order_is_copied_into_the_order_that_it_had(mode: str) -> None:
    inputs = torch.randn(2, 2, 5, 6).unbind()
    traced = make_fx(gated, tracing_mode=mode, pre_dispatch=True)(*inputs)
    given = Program(traced, {}, traced.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode)
    program = given.copy()
    (output,) = program.graph.find_nodes(op="output")
    (result,) = output.all_input_nodes
    with program.graph.inserting_after(result):
        plain = program.graph.call_function(torch.ops.aten.contiguous.default, (result,))
    output.replace_input_with(result, plain)
    program.refresh()
    assert plain.meta["val"].stride() != result.meta["val"].stride()
    assert len(restore_output_layout(program, given).matches) == 1
    program.write_code()
    expected, got = gated(*inputs), program.graph_module(*inputs)
    assert torch.equal(expected, got)
    assert expected.stride() == got.stride() and not got.is_contiguous()
