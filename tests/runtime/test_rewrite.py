"""rewrite() refuses what a traced graph would silently hold fast or lose, and leaves the module as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import UnsupportedModelError
from fxfuse.testing.tensors import integer_like_, integer_tensor

X = integer_tensor((3, 8), 0)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        integer_like_(self, seed=1)

    def forward(self, x: Tensor, by: Any = 1) -> Tensor:
        return self.a(x) * by + self.b(x)


@pytest.mark.parametrize("by", [3, 2.0, None, [X]])
def test_an_input_that_is_no_tensor_is_refused(by: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"input 1 is of type {type(by).__name__}, no tensor"):
        fxfuse.rewrite(Pair(), [X, by])
    given = torch.tensor(3.0)
    assert torch.equal(fxfuse.rewrite(module := Pair(), [X, given]).graph_module(X, given), module(X, given))


class Counting(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, by: Any = 1) -> Tensor:
        self.count = self.count + 1
        return super().forward(x, self.count)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()
        self.pair.cache = None

    def forward(self, x: Tensor) -> Tensor:
        self.pair.cache = x if self.pair.cache is None else torch.cat([self.pair.cache, x])
        return self.pair(x) + self.pair.cache.sum()


class Growing(Pair):
    """Makes a parameter at its first call, and forgets how to."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh = True

    def forward(self, x: Tensor, by: Any = 1) -> Tensor:
        if hasattr(self, "fresh"):
            del self.fresh
            self.scale = nn.Parameter(x.sum())
        return super().forward(x, self.scale)


@pytest.mark.parametrize(("kind", "name"), [(Counting, "count"), (Caching, "pair.cache"), (Growing, "scale")])
def test_a_tensor_that_the_module_assigns_is_refused_and_taken_back(kind: Any, name: str) -> None:
    module = kind()
    before = {path: dict(vars(m)) for path, m in module.named_modules()}
    parameters = dict(module.named_parameters())
    with pytest.raises(UnsupportedModelError, match=f"^{name}: the module assigns a tensor"):
        fxfuse.rewrite(module, [X])
    assert {path: dict(vars(m)) for path, m in module.named_modules()} == before
    assert dict(module.named_parameters()) == parameters


def test_a_buffer_that_is_written_to_counts_on() -> None:
    class Writing(Counting):
        def forward(self, x: Tensor, by: Any = 1) -> Tensor:
            self.count.add_(1)
            return Pair.forward(self, x, self.count)

    module = Writing()
    rewritten = fxfuse.rewrite(module, [X])
    assert rewritten.report.matched == 1
    rewritten.graph_module.load_state_dict(rewritten.plan.apply(module.state_dict()))
    for _ in range(3):
        assert torch.equal(rewritten.graph_module(X), module(X))


def test_a_tensor_that_is_neither_parameter_nor_buffer_is_refused_by_name() -> None:
    class Loose(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(8)

        def forward(self, x: Tensor, by: Any = 1) -> Tensor:
            return super().forward(x, self.scale)

    with pytest.raises(UnsupportedModelError, match=r"^scale: a tensor that is neither"):
        fxfuse.rewrite(Loose(), [X])
