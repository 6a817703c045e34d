"""rewrite(): the passes on any fx graph, without Dynamo and without side effects."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxfuse.passes import pipeline
from fxfuse.passes.program import Program, Weight
from fxfuse.passes.weights import WeightPlan
from fxfuse.runtime import live_weights
from fxfuse.runtime.options import Options
from fxfuse.runtime.report import GraphRecord, Report


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph, the plan from the original's state dict to its own, and the report.

    `graph_module` takes the same inputs as the original; `plan.apply(original.state_dict())` fits its load_state_dict.
    """

    graph_module: GraphModule
    plan: WeightPlan
    report: Report


def rewrite(
    graph_module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    passes: str | Sequence[str] = "default",
    weights: str = "auto",
    inner: str = "eager",
) -> Rewritten:
    """Rewrite a graph module; the one given is neither changed nor shared with.

    Args:
        graph_module: any torch.fx.GraphModule, or a module that make_fx can trace.
        example_inputs: positional inputs; their dtypes are taken as they are, their sizes may vary later.
        passes, weights, inner: as in `fxfuse.runtime.options.Options`; `inner` says for whom to lower.

    Raises OptionError for an unknown pass. A graph without the idiom comes back as it was, with an empty plan.
    """
    options = Options(
        passes=passes if isinstance(passes, str) else tuple(passes), weights=weights, inner=inner
    )  # type: ignore[arg-type]
    started = time.perf_counter()
    tensors = {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers())}
    program = _traced(graph_module, tensors, example_inputs, options)
    rewritten, outcomes = pipeline.apply(program, pipeline.selected(options.passes, options.inner))
    plan = rewritten.plan()
    record = GraphRecord(
        "graph", len(program.graph.nodes), len(rewritten.graph.nodes), inner, outcomes, plan.digest
    )
    result = _with_attributes(rewritten, tensors, plan.apply({k: v.detach() for k, v in tensors.items()}))
    record.compile_seconds = time.perf_counter() - started
    return Rewritten(result, plan, Report([record]))


def _traced(
    graph_module: nn.Module, tensors: dict[str, Tensor], inputs: Sequence[Any], options: Options
) -> Program:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [
        *(mode.from_tensor(t, static_shapes=True) for t in tensors.values()),
        *(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs),
    ]

    def call(*args: Any) -> Any:
        named = dict(zip(tensors, args[: len(tensors)], strict=True))
        return torch.func.functional_call(graph_module, named, args[len(tensors) :])

    with mode, torch.no_grad():
        traced = make_fx(call, pre_dispatch=True)(*fakes)
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    parameters = dict(graph_module.named_parameters())
    refused = live_weights.refusals(parameters)
    weights = {
        node.name: Weight(name, parameters[name].requires_grad, refused.get(name))
        for node, name in zip(placeholders, tensors, strict=False)
        if name in parameters
    }
    return Program(traced, weights, mode, grad_enabled=False, copy_weights=options.weights == "copy")


def _with_attributes(program: Program, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> GraphModule:
    """The graph with its weights as parameters and buffers of its own instead of inputs."""
    names = [*tensors]
    placeholders = program.placeholders()
    fused = {f.placeholder: f.transform.target.name for f in program.fused}
    attributes = {node: name for node, name in zip(placeholders, names, strict=False)}
    attributes |= {node: fused[node.name] for node in placeholders if node.name in fused}
    root = nn.Module()
    graph = program.graph
    for node, name in attributes.items():
        if not node.users and name not in state:
            graph.erase_node(node)
            continue
        _set(
            root, name, state[name].clone(), isinstance(tensors.get(name), nn.Parameter) or node.name in fused
        )
        _as_attribute(graph, node, name)
    result = GraphModule(root, graph)
    result.graph.lint()
    return result


def _as_attribute(graph: torch.fx.Graph, node: Node, name: str) -> None:
    with graph.inserting_before(node):
        attribute = graph.get_attr(name)
    attribute.meta.update(node.meta)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)


def _set(root: nn.Module, name: str, value: Tensor, is_parameter: bool) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if is_parameter:
        root.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        root.register_buffer(leaf, value)
