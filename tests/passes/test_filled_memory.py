"""Memory that is filled part by part becomes a cat, where nobody can tell."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fxfuse import rewrite


class Filled(nn.Module):
    def __init__(self, fill: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        return self.fill(x) * 2


def into(out: Tensor, *parts: tuple[int, int, Tensor]) -> Tensor:
    for start, end, value in parts:
        out[..., start:end] = value
    return out


def read_in_between(x: Tensor) -> Tensor:
    out = into(x.clone(), (0, 4, x[..., 4:]))
    return into(out, (4, 8, out[..., :4] * 3))


def of_channels_that_lie_last(x: Tensor) -> Tensor:
    """Their cat lies as they do, and the memory does not."""
    part = x.view(2, 3, 4, 2).movedim(-1, 1)
    out = torch.empty(2, 4, 3, 4)
    out[:, :2], out[:, 2:] = part, -part
    return out


def of_what_changes(x: Tensor) -> Tensor:
    new = x[..., :4] + 1
    out = into(x.clone(), (0, 4, new))
    new.mul_(3)
    return into(out, (4, 8, new))


SPELLED: dict[str, Callable[[Tensor], Tensor]] = {
    "the start of a clone": lambda x: into(x.clone(), (0, 4, -x[..., 4:])),
    "the midst of a clone": lambda x: into(x.clone(), (2, 4, x[..., 6:])),
    "empty memory": lambda x: into(torch.empty_like(x), (4, 8, x[..., :4]), (0, 4, -x[..., 4:])),
    "memory of its own": lambda x: into(x.new_empty(2, 3, 8), (0, 6, x[..., 2:]), (6, 8, x[..., :2])),
    "one number of each row": lambda x: into(x.clone(), (0, 4, x[..., :1])),
    "a part that is another one later": of_what_changes,
}
KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "parts that overlap": lambda x: into(x.clone(), (0, 5, x[..., :5] + 1), (4, 8, x[..., :4])),
    "a part that is read before the next": read_in_between,
    "another dtype": lambda x: into(x.clone(), (0, 4, x[..., :4].double())),
    "memory that is written afterwards": lambda x: into(x.clone(), (0, 4, x[..., 4:])).mul_(x),
    "zeros that stay": lambda x: into(torch.zeros_like(x), (0, 4, x[..., 4:])),
    "channels that lie last": of_channels_that_lie_last,
    "channels that lie last, viewed": lambda x: of_channels_that_lie_last(x).view(2, -1).sum(0),
    "every other one": lambda x: x.clone().index_fill_(-1, torch.tensor([1]), 0.0),
}


def _counted(fill: Callable[[Tensor], Tensor], name: str) -> int:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    module = Filled(fill)
    with torch.no_grad():
        rewritten = rewrite(module, [x], passes=(), dynamic=False)
        made = rewritten.graph_module
        assert not rewritten.report.misses
        assert torch.equal(made(x), module(x))
        assert made(x).stride() == module(x).stride()
    return sum(str(node.target) == name for node in made.graph.nodes)


@pytest.mark.parametrize("name", SPELLED)
def test_parts_become_a_cat(name: str) -> None:
    assert _counted(SPELLED[name], "aten.cat.default") == 1
    assert _counted(SPELLED[name], "aten.copy_.default") == 0


@pytest.mark.parametrize("name", KEPT)
def test_what_somebody_could_tell_stays(name: str) -> None:
    assert _counted(KEPT[name], "aten.cat.default") == 0
