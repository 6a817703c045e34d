"""With gradients on, a rewritten graph gives the outputs and the gradients of the untouched one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradients import Tally, run
from torch import Tensor, nn

from fxfuse.runtime.sessions import report_of
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


def assert_same_gradient(module: nn.Module, trained: Sequence[str] = ()) -> None:
    """Of the sum of its results by the input and the `trained` parameters; two frozen linears are merged."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)
    integer_like_(module, seed=1)
    wanted = [module.get_parameter(name) for name in trained]

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        x = torch.arange(18.0).reshape(3, 6).requires_grad_()
        return list(torch.autograd.grad(call(x.clone()).sum(), [x, *wanted], allow_unused=True))

    options = {"inner": "eager", "passes": ("same_input_linears", "layout_chains"), "report": "off"}
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="fxfuse", options=options, dynamic=False)
    for expected, got in zip(gradients(module), gradients(compiled), strict=True):
        assert (expected is None) == (got is None)
        assert expected is None or torch.equal(got, expected)
    report = report_of(module.parameters())
    assert report is not None
    matches = [match for graph in report.graphs for o in graph.outcomes.values() for match in o.matches]
    assert [match.rule for match in matches if match.rule == "same_input_linears"]


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


class Beside(nn.Module):
    """Two frozen linears that merge, beside a linear of what is made of their input."""

    def __init__(self, value: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.value = value
        self.a, self.b, self.c = (nn.Linear(6, 5, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) + self.c(self.value(x))


@pytest.mark.parametrize("idle", [lambda x: x.view_as(x), lambda x: x.clone()], ids=["view", "clone"])
def test_no_gradient_passes_what_is_made_where_gradients_are_off(idle: Callable[[Tensor], Tensor]) -> None:
    assert_same_gradient(Beside(torch.no_grad()(idle)))


STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: torch.empty_like(x).copy_(x.square()),
    "as another dtype": lambda x: torch.empty_like(x, dtype=torch.float64).copy_(x.square()).float(),
    "in every row": lambda x: torch.empty_like(x).copy_(x[0].square()),
    "turned": lambda x: torch.empty(6, 3).copy_(x.square().t()).t(),
    "as a part": lambda x: torch.empty(4, 6).narrow(0, 0, 3).copy_(x.square()),
}


@pytest.mark.parametrize("value", STORED.values(), ids=STORED)
def test_gradients_pass_what_is_stored(value: Callable[[Tensor], Tensor]) -> None:
    assert_same_gradient(Beside(value))


class Switched(nn.Module):
    """Two frozen linears that merge, and `first`, then `second`, one of which has gradients off."""

    def __init__(self, first: Any, second: Any, off: str) -> None:
        super().__init__()
        self.first, self.second, self.off = first, second, off
        self.a, self.b, self.c = (nn.Linear(6, 5, bias=False) for _ in range(3))
        self.bias = nn.Parameter(torch.empty(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.off != "first"):
            y = self.first(self, x)
        with torch.set_grad_enabled(self.off != "second"):
            z = self.second(self, y, x)
        return self.a(x) * self.b(x) + (z * 2).sum()


IN_TURN: dict[str, tuple[Any, Any]] = {
    "a reshape of a reshape": (lambda m, x: x.reshape(2, 9), lambda m, y, x: y.reshape(6, 3)),
    "an unflattened reshape": (lambda m, x: x.reshape(2, 9), lambda m, y, x: y.unflatten(1, (3, 3))),
    "an alias": (lambda m, x: torch.ops.aten.alias(x), lambda m, y, x: y * 2),
    "a cast to its own dtype": (lambda m, x: x.to(torch.float32), lambda m, y, x: y * 2),
    "a negative that is subtracted": (lambda m, x: -x, lambda m, y, x: x * x - y),
    "a negative of a negative": (lambda m, x: -x, lambda m, y, x: -y),
    "a write to fresh memory": (lambda m, x: x * 2, lambda m, y, x: y.add_(x * 3)),
    "a function in place": (lambda m, x: (x * 2)[:2], lambda m, y, x: F.silu(y, inplace=True)),
    "a copy that is written": (lambda m, x: x.clone(), lambda m, y, x: y.add_(x * 3)),
    "a new dimension behind a root": (
        lambda m, x: (x.sum(-1) + 1).square(),
        lambda m, y, x: y.unsqueeze(-1),
    ),
    "a sum's dimension": (lambda m, x: x.sum(-1), lambda m, y, x: y.unsqueeze(-1)),
    "a flattened stack": (lambda m, x: torch.stack([x, x * 2]), lambda m, y, x: y.flatten(0, 1)),
    "a stack of one": (lambda m, x: torch.stack([x]), lambda m, y, x: y[0]),
    "a linear's bias": (lambda m, x: m.c(x), lambda m, y, x: y + m.bias),
    "a turned weight": (lambda m, x: m.c.weight.t(), lambda m, y, x: x @ y),
    "a copied turned weight": (lambda m, x: m.c.weight.t().contiguous(), lambda m, y, x: x @ y),
    "turned rows": (lambda m, x: x.mT, lambda m, y, x: m.c.weight @ y),
    "a convolution's weight": (
        lambda m, x: m.c.weight.unsqueeze(-1),
        lambda m, y, x: F.conv1d(x[None].mT, y),
    ),
    "a weight by heads": (
        lambda m, x: m.c.weight[:4].view(2, 2, 6),
        lambda m, y, x: torch.einsum("bti,hki->bthk", x[None], y),
    ),
    "rows for a linear": (lambda m, x: x[None].reshape(3, 6), lambda m, y, x: m.c(y)),
    "a chain behind a linear": (
        lambda m, x: m.c(x)[:, :4].reshape(3, 2, 2).split(1, -1),
        lambda m, y, x: torch.cat([part.reshape(3, -1) for part in y], -1),
    ),
    "equal views": (lambda m, x: x.view(2, 9), lambda m, y, x: y * 2 + x.view(2, 9)),
    "chosen columns": (lambda m, x: x * 2, lambda m, y, x: y.index_select(1, torch.arange(1, 3))),
    "an idle product": (lambda m, x: x * 2, lambda m, y, x: y * 1),
    "an idle dropout": (lambda m, x: F.dropout(x, 0.1, training=False), lambda m, y, x: y * 3),
}


# Where the second call's mode, or a detached first result, is a case of its own.
OTHERWISE = {
    "second": (
        "a negative of a negative",
        "a write to fresh memory",
        "a function in place",
        "a copy that is written",
        "a new dimension behind a root",
        "a chain behind a linear",
        "an idle product",
    ),
    "a detached first": ("a turned weight", "turned rows", "a reshape of a reshape"),
}
CASES = [(name, "first") for name in IN_TURN]
CASES += [(name, off) for off, names in OTHERWISE.items() for name in names]


@pytest.mark.parametrize(("name", "off"), CASES)
def test_gradients_pass_where_they_passed(name: str, off: str) -> None:
    """Of two calls that the normal form would write as one, the other way round as well."""
    first, second = IN_TURN[name]

    def detached(module: nn.Module, x: Tensor) -> Any:
        y = first(module, x)
        return y.detach() if isinstance(y, Tensor) else [part.detach() for part in y]

    chosen = detached if off.startswith("a ") else first
    assert_same_gradient(Switched(chosen, second, off), ("c.weight", "bias"))
