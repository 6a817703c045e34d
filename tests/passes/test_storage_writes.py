"""Who writes to which memory, and how often before a node runs."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.passes.modes import modes
from fxfuse.passes.storage_writes import StorageWrites, same_memory, storage_of, written_by


def graph_of(function: Any, *shapes: tuple[int, ...]) -> Graph:
    with FakeTensorMode(), torch.no_grad():
        return make_fx(function, pre_dispatch=True)(*(torch.empty(shape) for shape in shapes)).graph


def by_name(graph: Graph) -> dict[str, Node]:
    return {node.name: node for node in graph.nodes}


WRITING = {
    "in place": lambda x, y: x.add_(y),
    "copy": lambda x, y: x.copy_(y),
    "out": lambda x, y: torch.add(y, 1, out=x),
    "foreach": lambda x, y: torch._foreach_mul_([x], [y]),
    "index": lambda x, y: x.index_put_((torch.tensor([0]),), y[:1]),
    "item": lambda x, y: x.__setitem__(0, y[0]),
    "view of a view": lambda x, y: x.view(-1)[1:].view(-1).zero_(),
    "statistics": lambda x, y: F.batch_norm(y, x[0], x[1], training=True),
}


@pytest.mark.parametrize("how", WRITING)
def test_every_way_of_writing_is_seen_on_the_memory_and_on_its_views(how: str) -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        before = x.transpose(0, 1) * 1
        WRITING[how](x, y)
        return before, y.view(-1) * 1 + x.view(-1)

    graph = graph_of(function, (2, 2), (2, 2))
    writes, (x, y) = StorageWrites(graph), graph.find_nodes(op="placeholder")
    views = [n for n in graph.nodes if n is not x and storage_of(n) == storage_of(x)]
    assert all(map(writes.is_written, [x, *views]))
    assert not writes.is_written(y)
    *_, last = graph.nodes
    assert writes.version(x, last) == 1
    assert {storage_of(n) for n in written_by(writes.write_before(x, last))} == {storage_of(x)}


def test_reads_are_numbered_by_the_writes_before_them() -> None:
    def function(x: Tensor) -> list[Tensor]:
        view = x.view(-1)
        first = view * 1
        x.add_(1)
        second = view * 2
        view.mul_(3)
        return [first, second, x * 3]

    graph = graph_of(function, (2, 2))
    writes, nodes = StorageWrites(graph), by_name(graph)
    reads = [nodes["mul"], nodes["mul_1"], nodes["mul_2"]]
    assert [writes.version(n.args[0], n) for n in reads] == [0, 1, 2]
    assert [writes.write_before(n.args[0], n) for n in reads] == [None, nodes["add_"], nodes["mul_"]]


def test_reading_is_not_writing() -> None:
    graph = graph_of(lambda x: [x.view(-1) + 1, x.split(1), x.sum()], (2, 2))
    assert all(written_by(node) == [] for node in graph.nodes)


def test_an_operator_that_does_not_say_what_it_writes_may_write_to_everything() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (y,))

    graph = graph_of(function, (2, 2), (2, 2))
    x, y = graph.find_nodes(op="placeholder")
    assert StorageWrites(graph).is_written(y)
    assert not StorageWrites(graph).is_written(x)


def test_same_memory_is_the_same_elements_in_the_same_order() -> None:
    def function(x: Tensor) -> list[Tensor]:
        same = [x.view(2, 2), x[:, :]]
        other = [x.t(), x[:1], x.clone(), x.view(torch.int32), x.view(4), x.detach().view(-1), x + 0]
        return [*same, *other]

    graph = graph_of(function, (2, 2))
    (x,), (output,) = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")
    assert [same_memory(x, node) for node in output.args[0]] == [True] * 2 + [False] * 7
    rows = graph_of(lambda x: [x[:1], x[1:]], (2, 2))
    (output,) = rows.find_nodes(op="output")
    assert not same_memory(*output.args[0])


def test_modes_are_equal_exactly_where_the_same_ones_hold() -> None:
    def function(x: Tensor) -> list[Tensor]:
        a = x + 1
        with torch.autocast("cpu", torch.bfloat16):
            b = x + 2
            with torch.autocast("cpu", enabled=False):
                c = x + 3
            d = x + 4
        e = x + 5
        with torch.enable_grad():
            f = x + 6
        return [a, b, c, d, e, f, x + 7]

    graph = graph_of(function, (2, 2))
    found = modes(graph, grad_enabled=False)
    a, b, c, d, e, f, g = (found[n] for n in graph.nodes if n.name.startswith("add"))
    assert a == e == g
    assert b == d
    assert len({a, b, c, f}) == 4
