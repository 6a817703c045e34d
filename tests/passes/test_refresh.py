"""After a rewrite values are computed anew where they must be, and only there."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import storage_of

aten = torch.ops.aten


def program_of(function: Callable[[Tensor], Tensor]) -> tuple[Program, dict[str, Node]]:
    with FakeTensorMode() as mode, torch.no_grad():
        traced = make_fx(function, pre_dispatch=True)(torch.empty(4, 6))
    return Program(traced, {}, mode), {node.name: node for node in traced.graph.nodes}


def replace(program: Program, old: Node, target: object, *args: object) -> Node:
    with program.graph.inserting_before(old):
        new = program.graph.call_function(target, args)
    old.replace_all_uses_with(new)
    program.graph.erase_node(old)
    return new


def test_what_follows_a_result_laid_out_as_before_is_left_alone() -> None:
    program, node = program_of(lambda x: (x.neg().view(-1) * 2).exp())
    values = {name: each.meta.get("val") for name, each in node.items()}
    new = replace(program, node["neg"], aten.mul.Tensor, node["x_1"], -1)
    program.refresh()
    assert storage_of(node["view"]) == storage_of(new)
    assert node["view"].meta["val"] is not values["view"]
    assert node["mul"].meta["val"] is values["mul"]
    assert node["exp"].meta["val"] is values["exp"]


def test_another_layout_goes_as_far_as_it_reaches() -> None:
    program, node = program_of(lambda x: (x.neg() * 2).reshape(-1).exp())
    values = {name: each.meta.get("val") for name, each in node.items()}
    with program.graph.inserting_before(node["neg"]):
        empty = program.graph.call_function(aten.empty_permuted.default, ([4, 6], [1, 0]))
    replace(program, node["neg"], aten.copy.default, empty, node["x_1"])
    node["mul"].args = (node["mul"].args[0], 3)
    program.refresh()
    assert node["mul"].meta["val"].stride() == (1, 4)
    assert values["mul"].stride() == (6, 1)
    assert storage_of(node["reshape"]) != storage_of(node["mul"])  # a view before, a copy now
    assert node["exp"].meta["val"] is values["exp"]


def test_two_views_of_memory_that_is_gone_do_not_share_memory_once_they_are_copies() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.neg()
        return y.reshape(-1) + 0, y.reshape(2, 12) + 0

    program, node = program_of(function)
    assert storage_of(node["reshape"]) == storage_of(node["reshape_1"])
    with program.graph.inserting_before(node["neg"]):
        empty = program.graph.call_function(aten.empty_permuted.default, ([4, 6], [1, 0]))
    replace(program, node["neg"], aten.copy.default, empty, node["x_1"])
    program.refresh()
    assert storage_of(node["reshape"]) != storage_of(node["reshape_1"])


def test_a_write_returns_the_memory_that_it_writes_to() -> None:
    program, node = program_of(lambda x: x.neg().add_(1))
    new = replace(program, node["neg"], aten.exp.default, node["x_1"])
    program.refresh()
    assert storage_of(node["add_"]) == storage_of(new)
