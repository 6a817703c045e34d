"""With gradients on, a rewritten graph gives the outputs and the gradients of the untouched one."""

from collections.abc import Callable, Sequence

import pytest
import torch
from gradients import Tally, run
from torch import Tensor, nn

from fxfuse.runtime.backend import report_of
from fxfuse.testing.tensors import integer_like_


def check(seeds: Sequence[int]) -> Tally:
    tally = run(seeds)
    assert tally.wrong == [] == tally.undone, "\n".join([*tally.wrong, *tally.undone])
    return tally


def test_a_sample_of_graphs_trains_alike() -> None:
    """Mutants of as many graphs as there are blocks, and programs."""
    tally = check([*range(20_001, 20_384, 16), *range(20_000, 20_016, 2)])
    assert tally.graphs > 16 > tally.untrainable
    assert tally.rewritten > 4


def test_without_passes_nothing_is_rewritten() -> None:
    assert run(range(20_000, 20_008, 2), passes=()).rewritten == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_graphs_train_alike() -> None:
    check(range(21_000, 22_000))


def assert_same_gradient(module: nn.Module) -> None:
    """Of the sum of its results by the input; its weights are frozen, and two of its linears are merged."""

    def gradient(call: Callable[[Tensor], Tensor]) -> Tensor:
        x = torch.arange(18.0).reshape(3, 6).requires_grad_()
        return torch.autograd.grad(call(x.clone()).sum(), x)[0]

    module.requires_grad_(False)
    integer_like_(module, seed=1)
    options = {"inner": "eager", "passes": "same_input_linears", "report": "off"}
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="fxfuse", options=options, dynamic=False)
    assert torch.equal(gradient(compiled), gradient(module))
    report = report_of(module.parameters())
    assert report is not None and report.matched == 1


@pytest.mark.parametrize("filled_later", [False, True])
def test_no_gradient_passes_a_view_of_what_is_detached(filled_later: bool) -> None:
    """Of frozen linears and an input that trains; also where the memory gets its gradient afterwards."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            memory = torch.zeros_like(y) if filled_later else y
            view = memory.detach().narrow(0, 0, 3)
            y = memory.copy_(y) if filled_later else y
            return y * self.b(x) + view * 3

    assert_same_gradient(Frozen())


@pytest.mark.parametrize("idle", [lambda x: x.view_as(x), lambda x: x.clone()], ids=["view", "clone"])
def test_no_gradient_passes_what_is_made_where_gradients_are_off(idle: Callable[[Tensor], Tensor]) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 5, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = idle(x)
            return self.a(x) * self.b(x) + self.c(y)

    assert_same_gradient(Frozen())
