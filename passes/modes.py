"""Grad and autocast modes that a graph switches on its way: a rewrite moves no call from one to another."""

import operator
from typing import NamedTuple

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node


class Mode(NamedTuple):
    """Whether a call records for a backward, and the switches entered around it, those of autocast."""

    gradients: bool
    entered: tuple[Node, ...] = ()


PLAIN = Mode(gradients=False)  # of inference


def switches_mode(node: Node) -> bool:
    """Whether a call computes nothing and is there for its effect on the calls after it."""
    computes = isinstance(node.target, (OpOverload, HigherOrderOperator)) or node.target is operator.getitem
    return node.op == "call_function" and not computes and node.meta.get("val") is None


def sets_grad_mode(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch._C._set_grad_enabled


def grad_enabled_at(node: Node, at_entry: bool) -> bool:
    """Whether grad mode is on where this node runs."""
    switches = node.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    before = [switch for switch in switches if switch < node]
    return bool(before[-1].args[0]) if before else at_entry


def switches_autocast(mode: Mode) -> bool:
    """Whether a node of this mode runs under an autocast that the graph enters."""
    return bool(mode.entered)


def modes(graph: Graph, grad_enabled: bool) -> dict[Node, Mode]:
    """The mode of each node, equal for exactly the nodes that run under the same ones."""
    grad = grad_enabled
    entered: list[Node] = []
    found: dict[Node, Mode] = {}
    for node in graph.nodes:
        found[node] = Mode(grad, tuple(entered))
        if not switches_mode(node):
            continue
        if sets_grad_mode(node):
            grad = bool(node.args[0])
        elif node.args and node.args[0] in entered:
            entered.remove(node.args[0])
        else:
            entered.append(node)
    return found
