"""Tensors whose address is guarded (`torch._dynamo.mark_static_address`) are constants of Dynamo's graph."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.runtime.sessions import report_of


class Counting(nn.Module):
    """Two linears of one input, and how often they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.count = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        x = (self.a(x) * self.b(x)).tanh() + self.count
        self.count.mul_(2)
        return x


def guarded(layers: int) -> nn.Sequential:
    torch._dynamo.reset()
    model = nn.Sequential(*[Counting() for _ in range(layers)])
    for layer in model:
        torch._dynamo.mark_static_address(layer.count, guard=True)
    return model


def counts(model: nn.Sequential) -> Tensor:
    return torch.stack([layer.count for layer in model])


@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_they_are_written_once_for_each_call(layers: int, train: bool, inner: str) -> None:
    model = guarded(layers)
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, backend="fxfuse", options={"inner": inner, "report": "off"})
    x = torch.randn(5, 6)
    with torch.set_grad_enabled(train):
        for step in range(3):
            for layer, other in zip(model, twin, strict=True):  # each a memory of its own
                layer.count.add_(step)
                other.count.add_(step)
            torch.testing.assert_close(compiled(x), twin(x))
            assert torch.equal(counts(model), counts(twin))
            model[-1].count.add_(7)
            twin[-1].count.add_(7)
    report = report_of(model.parameters())
    assert report is not None and report.matched == (0 if train else layers)


def test_a_gradient_reaches_a_parameter() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    twin = copy.deepcopy(model)
    torch._dynamo.mark_static_address(model[0].weight, guard=True)
    x = torch.randn(3, 4, dtype=torch.double)
    compiled: Any = torch.compile(model, backend="fxfuse", options={"report": "off"})
    for module in (compiled, twin):
        module(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad)


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(3)

    def forward(self) -> Tensor:
        return self.count.add_(1) * 2


def test_a_graph_may_have_no_other_tensor() -> None:
    torch._dynamo.reset()
    module = Alone()
    torch._dynamo.mark_static_address(module.count, guard=True)
    compiled: Any = torch.compile(module, backend="fxfuse", options={"report": "off"})
    for step in range(1, 4):
        assert torch.equal(compiled(), torch.full((3,), 2.0 * step)) and module.count[0] == step
