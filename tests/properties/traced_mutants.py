"""Mutants made on the graph that tracing gives, which the passes get as it is: no graph is traced twice.

Parameters are read by get_attr while a graph is changed, so that the changes are those of graphs as written;
then they become inputs, as passes have them.
"""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.pipeline import Pass
from fxfuse.passes.program import Program, Weight
from fxfuse.runtime.options import Options
from fxfuse.runtime.refusals import refusals
from fxfuse.runtime.rewrite import traced
from fxfuse.testing.changes import CHANGES, ImpossibleError
from fxfuse.testing.graph_edits import TRACED
from fxfuse.testing.mutants import ATTEMPTS, Mutant


class Draft(GraphModule):
    """A graph module without code: nobody calls it."""

    def recompile(self) -> Any:
        return None


@dataclass(frozen=True)
class Traced:
    """A traced graph with its parameters as attributes, its inputs, and what each node is on them."""

    module: GraphModule
    inputs: tuple[Tensor, ...]
    values: dict[str, Any]
    mode: FakeTensorMode


@dataclass(frozen=True)
class TracedMutant:
    """A program, what it runs on, parameters first, and what was changed."""

    program: Program
    tensors: list[Tensor]
    kind: str
    change: str


def of(module: GraphModule, inputs: Sequence[Tensor]) -> Traced:
    tensors = dict(module.named_parameters())
    program = traced(module, tensors, inputs, Options(), dynamic=False)
    graph, root = program.graph, program.graph_module
    for node, (name, tensor) in zip(program.placeholders(), tensors.items(), strict=False):
        _set(root, name, tensor)
        with graph.inserting_before(node):
            attribute = graph.get_attr(name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    made = Draft(root, graph)
    made.meta[TRACED] = True
    values: dict[str, Any] = {}
    evaluate(made, copy.deepcopy(list(inputs)), values)
    return Traced(made, tuple(inputs), values, program.fake_mode)


def _set(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.register_parameter(leaf, parameter)


def _copy(module: GraphModule) -> GraphModule:
    made = Draft(module, copy.deepcopy(module.graph))
    made.meta[TRACED] = True
    for new, old in zip(made.graph.nodes, module.graph.nodes, strict=True):
        new.meta = dict(old.meta)
    return made


def evaluate(module: GraphModule, inputs: Sequence[Any], values: dict[str, Any] | None = None) -> Any:
    """What the graph gives, node by node; `values` keeps copies of what every node is."""
    known: dict[Node, Any] = {}
    given, entered, memo = iter(inputs), [], {}
    with torch.no_grad():
        try:
            for node in module.graph.nodes:
                if node.op == "placeholder":
                    known[node] = next(given)
                elif node.op == "get_attr":
                    known[node] = copy.deepcopy(_attribute(module, str(node.target)).detach(), memo)
                elif node.op == "output":
                    return map_arg(node.args[0], known.__getitem__)
                else:
                    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                    _check_attention(node, args)
                    known[node] = node.target(*args, **kwargs)
                    if isinstance(known[node], torch.autocast):
                        entered.append(known[node])
                    entered = [each for each in entered if node.target is not _EXIT or each is not args[0]]
                if values is not None:
                    values[node.name] = copy.deepcopy(known[node])
        finally:
            for each in reversed(entered):
                each.__exit__(None, None, None)
    raise AssertionError("a graph ends with its output")


_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast


def _check_attention(node: Node, args: Sequence[Any]) -> None:
    """On a CPU attention with more or fewer values than keys raises nothing, and reads past the end."""
    attends = node.target is torch.ops.aten.scaled_dot_product_attention.default
    if attends and args[1].shape[-2] != args[2].shape[-2]:
        raise ValueError("attention needs as many keys as values")


def without_autocast(mutant: Mutant | TracedMutant) -> Callable[..., Any]:
    """The mutant without the autocast that it enters: what it computes, before it is rounded."""
    given = mutant.program.graph_module if isinstance(mutant, TracedMutant) else mutant.module
    module = copy.deepcopy(given) if isinstance(mutant, Mutant) else _copy(given)
    for node in reversed(module.graph.nodes):
        if node.target in (_ENTER, _EXIT):
            module.graph.erase_node(node)
    module.recompile()
    return module if isinstance(mutant, Mutant) else lambda *tensors: evaluate(module, tensors)


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def mutant_of(base: Traced, rng: random.Random, kinds: Sequence[str], copy_weights: bool) -> TracedMutant:
    """One change of a traced graph that leaves it able to run; raises ValueError where none is found."""
    module: GraphModule | None = None
    for kind in kinds:
        for _ in range(ATTEMPTS):
            module = _copy(base.module) if module is None else module
            try:
                change = CHANGES[kind](module, dict(base.values), rng)
                module.graph.lint()
                evaluate(module, copy.deepcopy(base.inputs))
                program, tensors = _program(module, base, copy_weights)
            except ImpossibleError:  # which leaves the graph as it was
                break
            except Exception:  # the changed graph does not run: another one
                module = None
                continue
            return TracedMutant(program, tensors, kind, change)
    raise ValueError("no change was found that this graph survives")


def _program(module: GraphModule, base: Traced, copy_weights: bool) -> tuple[Program, list[Tensor]]:
    """The program of a changed graph: values are computed anew from the first change on."""
    graph, mode = module.graph, base.mode
    named = dict(module.named_parameters())
    first_name = {id(tensor): name for name, tensor in reversed(named.items())}
    read: dict[str, list[Node]] = {name: [] for name in named}
    for node in graph.find_nodes(op="get_attr"):
        name = first_name.get(id(_attribute(module, str(node.target))))
        if name is not None:
            read[name].append(node)
    turned = [node for node in graph.nodes if _turns(node)]
    changed = None if turned else _first_change(module, base.module)
    first, weights = graph.find_nodes(op="placeholder")[0], {}
    refused = refusals(named)
    refused |= {
        first_name[id(tensor)]: f"it is also {name}"
        for name, tensor in module.named_parameters(remove_duplicate=False)
        if first_name[id(tensor)] != name
    }
    for name, nodes in read.items():
        with graph.inserting_before(first):
            placeholder = graph.placeholder(f"p_{name.replace('.', '_')}")
        with mode:
            placeholder.meta["val"] = mode.from_tensor(named[name], static_shapes=True)
        for node in nodes:
            node.replace_all_uses_with(placeholder)
            graph.erase_node(node)
        weights[placeholder.name] = Weight(name, named[name].requires_grad, refused.get(name))
    for node in graph.find_nodes(op="placeholder") if turned else ():
        value = node.meta["val"]
        if isinstance(value, Tensor):  # which a call may turn in place: the other mutants have it, too
            node.meta["val"] = value.detach()
    started = False
    for node in graph.nodes:
        started = started or node is changed
        if node.op == "call_function" and (started or changed is None):
            node.meta.pop("val", None)
    program = Program(module, weights, mode, grad_enabled=False, copy_weights=copy_weights)
    program.refresh()
    return program, [*(parameter.detach() for parameter in named.values()), *base.inputs]


def _turns(node: Node) -> bool:
    """Whether a call changes the sizes of a tensor in place."""
    return isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags


def _first_change(module: GraphModule, base: GraphModule) -> Node | None:
    """The first node that differs from the graph it was; None where a parameter does."""
    before = dict(base.named_parameters(remove_duplicate=False))
    if any(before.get(name) is not p for name, p in module.named_parameters(remove_duplicate=False)):
        return None
    for node, other in zip(module.graph.nodes, base.graph.nodes, strict=False):
        same = node.name == other.name and node.target == other.target
        if not same or str((node.args, node.kwargs)) != str((other.args, other.kwargs)):
            return None if node.op in ("get_attr", "placeholder") else node
    raise ValueError("nothing was changed")


def rewritten(
    mutant: TracedMutant, passes: Sequence[Pass]
) -> tuple[dict[str, Outcome], Callable[..., Any], Callable[..., Any]]:
    """What the passes did, the graph as it was, and the rewritten one: both take parameters and inputs."""
    program, outcomes = pipeline.without_code(mutant.program, passes)
    members = [node.name for node in mutant.program.placeholders()]

    def run(*tensors: Tensor) -> Any:
        named = {
            mutant.program.weights[member].name: tensor.detach()
            for member, tensor in zip(members, tensors, strict=True)
            if member in mutant.program.weights
        }
        state = program.plan().apply(named) if program.fused else {}
        fused = [state[each.transform.target.name] for each in program.fused]
        return evaluate(program.graph_module, [*tensors, *fused])

    return outcomes, lambda *tensors: evaluate(mutant.program.graph_module, tensors), run
