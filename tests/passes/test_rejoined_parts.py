"""Parts that are put together as they were cut are a view of the whole; in any other order they are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse import rewrite
from fxfuse.testing import integer_like_, integer_tensor

Cut = Callable[[Tensor], Tensor]

WHOLE: dict[str, Cut] = {
    "split": lambda y: torch.stack(y.split(4, -1), 2),
    "chunk": lambda y: torch.stack(y.chunk(3, -1), -2),
    "slices": lambda y: torch.stack([y[..., i : i + 4] for i in range(0, 12, 4)], 2),
    "cat": lambda y: torch.cat([part.unsqueeze(2) for part in y.split(4, 2)], 2),
    "unbind": lambda y: torch.stack(y.unflatten(-1, (3, 4)).unbind(2), 2),
    "unfold": lambda y: y.unfold(-1, 4, 4),
    "uneven": lambda y: torch.cat(y.split([5, 4, 3], -1), -1).unflatten(-1, (3, 4)),
}


def _written_in_part(y: Tensor) -> Tensor:
    heads = torch.stack(y.split(4, -1), 2)
    heads[..., :1].add_(1)
    return heads + y.view(2, -1, 3, 4)


OTHERS: dict[str, Cut] = {
    "turned": lambda y: torch.stack(y.split(4, -1)[::-1], 2),
    "one twice": lambda y: torch.stack([*y.split(4, -1)[:2], y[..., 4:8]], 2),
    "one left out": lambda y: torch.stack(y.split(3, -1)[1:], 2),
    "last": lambda y: torch.stack(y.split(4, -1), -1),
    "overlapping": lambda y: torch.stack([y[..., i : i + 4] for i in (0, 3, 8)], 2),
    "written": lambda y: (lambda parts: (y.mul_(2), parts)[1])(torch.stack(y.split(4, -1), 2)),
    "write to it": _written_in_part,
    "windows that overlap": lambda y: y.unfold(-1, 4, 2),
    "windows that leave some out": lambda y: y.unfold(-1, 5, 5),
    "windows of positions": lambda y: y[:, :4].unfold(1, 2, 2),
    "one is changed": lambda y: torch.stack([p * (i + 1) for i, p in enumerate(y.split(4, -1))], 2),
}


def _rewritten(cut: Cut, dynamic: bool) -> list[str]:
    class Cuts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 12, bias=False), nn.Linear(6, 12, bias=False)

        def forward(self, x: Tensor) -> tuple[Any, ...]:
            return tuple(cut(y * 2) + 1 for y in (self.a(x), self.b(x)))

    module, x = integer_like_(Cuts(), 1), integer_tensor((2, 5, 6), seed=0)
    with torch.no_grad():
        found = rewrite(module, (x,), passes="same_input_linears", dynamic=dynamic)
        for length in (5, 8) if dynamic else (5,):
            given = integer_tensor((2, length, 6), seed=2)
            for got, expected in zip(found.graph_module(given), module(given), strict=True):
                assert torch.equal(got, expected) and got.stride() == expected.stride()
    return [str(node.target) for node in found.graph_module.graph.nodes]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cut", WHOLE.values(), ids=WHOLE.keys())
def test_parts_in_the_order_of_the_whole_are_a_view_of_it(cut: Cut, dynamic: bool) -> None:
    assert not {"aten.stack.default", "aten.cat.default", "aten.unfold.default"} & set(
        _rewritten(cut, dynamic)
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("cut", OTHERS.values(), ids=OTHERS.keys())
def test_parts_in_another_order_or_written_later_are_copied(cut: Cut, dynamic: bool) -> None:
    assert {"aten.stack.default", "aten.cat.default", "aten.unfold.default"} & set(_rewritten(cut, dynamic))
