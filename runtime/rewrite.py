"""rewrite(): the passes on any fx graph, without Dynamo and without side effects."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxfuse.errors import UnsupportedModelError
from fxfuse.passes import pipeline
from fxfuse.passes.pipeline import Passes
from fxfuse.passes.program import Program, Weight
from fxfuse.passes.weights import WeightPlan
from fxfuse.passes.weights.plan import Transform
from fxfuse.runtime import ops
from fxfuse.runtime.capture import ObeyedAutocast, Unrecorded, check_recorded
from fxfuse.runtime.graph_attributes import as_attribute, hold
from fxfuse.runtime.options import Options
from fxfuse.runtime.pictures import pictures
from fxfuse.runtime.refusals import refusals
from fxfuse.runtime.report import GraphRecord, Report

assert ops  # imported for the operators it registers: passes write calls of them


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph, the plan from the original's state dict to its own, and the report.

    `graph_module` takes the same inputs as the original; `plan.apply(original.state_dict())` fits its
    load_state_dict.
    """

    graph_module: GraphModule
    plan: WeightPlan
    report: Report


def rewrite(
    graph_module: nn.Module,
    example_inputs: Sequence[Any],
    *,
    passes: Passes = "default",
    weights: str = "auto",
    inner: str = "eager",
    target: str = "auto",
    dynamic: bool = True,
    round_beta: bool = False,
) -> Rewritten:
    """Rewrite a graph module; the one given is neither changed nor shared with.

    Args:
        graph_module: any torch.fx.GraphModule, or a module that make_fx can trace.
        example_inputs: positional inputs; their dtypes and strides are taken as they are; sizes other than 0
            and 1 may vary later, as far as the module does not branch on them.
        passes, weights, inner, target, round_beta: as in `fxfuse.runtime.options.Options`; `inner` and
            `target` say for whom to lower.
        dynamic: False takes every size as it is in `example_inputs`, which traces in a fraction of the time.
            Where a kernel has to know a size that only an input has, such as that of a state's heads, nothing
            matches otherwise.

    Raises OptionError for an unknown pass, and UnsupportedModelError for what tracing loses: inputs that are
    no tensors, attributes that the module assigns tensors to, tensors that are neither parameters nor
    buffers, autocast switched by calls. A graph without the idiom comes back as it was, with an empty plan.
    """
    options = Options.of(
        {"passes": passes, "weights": weights, "inner": inner, "target": target, "round_beta": round_beta}
    )
    started = time.perf_counter()
    tensors = {**dict(graph_module.named_parameters()), **dict(graph_module.named_buffers())}
    program = traced(graph_module, tensors, example_inputs, options, dynamic)
    target = options.target_for((*tensors.values(), *example_inputs))
    rewritten, outcomes = pipeline.apply(program, pipeline.selected(options.passes, options.inner, target))
    plan = rewritten.plan()
    record = GraphRecord(
        "graph", len(program.graph.nodes), len(rewritten.graph.nodes), inner, outcomes, plan.digest
    )
    matches = (match for outcome in outcomes.values() for match in outcome.matches)
    record.pictures = pictures(program, rewritten, matches, record.phase)
    state = plan.apply({name: tensor.detach() for name, tensor in tensors.items()})
    result = _with_attributes(rewritten, tensors, state, persistent=graph_module.state_dict().keys())
    for alias, name in _tied(graph_module).items():
        if name in state:
            hold(result, alias, attrgetter(name)(result))
    record.compile_seconds = time.perf_counter() - started
    return Rewritten(result, plan, Report([record]))


def traced(
    graph_module: nn.Module,
    tensors: dict[str, Tensor],
    inputs: Sequence[Any],
    options: Options,
    dynamic: bool = True,
) -> Program:
    for module in graph_module.modules():
        calls = module.graph.nodes if isinstance(module, GraphModule) else ()
        for node in calls:
            try:
                check_recorded(node.target)
            except Unrecorded as error:
                raise UnsupportedModelError(f"{node.name}: {error}") from None
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise UnsupportedModelError(
                f"input {i} is of type {type(x).__name__}, no tensor: a graph would hold it as it is here; "
                "make it a part of the module"
            )
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    fakes = [
        *(mode.from_tensor(t, static_shapes=True) for t in tensors.values()),
        *(mode.from_tensor(x, static_shapes=not dynamic) for x in inputs),
    ]
    watched = _Watched(graph_module)

    def call(*args: Any) -> Any:
        named = {f"module.{name}": x for name, x in zip(tensors, args[: len(tensors)], strict=True)}
        with ObeyedAutocast():
            return torch.func.functional_call(watched, named, args[len(tensors) :])

    try:
        with mode, torch.no_grad():
            traced = make_fx(call, pre_dispatch=True)(*fakes)
    except AssertionError as error:
        named = ((f"{p}.{n}", x) for p, m in graph_module.named_modules() for n, x in vars(m).items())
        loose = [name.strip(".") for name, x in named if isinstance(x, Tensor)]
        if not loose or "FakeTensor" not in str(error):
            raise
        raise UnsupportedModelError(
            f"{', '.join(loose)}: a tensor that is neither parameter nor buffer, "
            "which no graph holds; register_buffer makes it one"
        ) from error
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    parameters = dict(graph_module.named_parameters())
    tied = {name: f"it is also {alias}" for alias, name in _tied(graph_module).items()}
    refused = refusals(parameters) | tied
    weights = {
        node.name: Weight(name, parameters[name].requires_grad, refused.get(name))
        for node, name in zip(placeholders, tensors, strict=False)
        if name in parameters
    }
    return Program(
        traced,
        weights,
        mode,
        grad_enabled=False,
        copy_weights=options.weights == "copy",
        round_beta=options.round_beta,
    )


class _Watched(nn.Module):
    """A module that is left as it was after each call.

    Raises UnsupportedModelError where the call has given an attribute another tensor: a graph has none.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        modules = self.module.named_modules()
        holding = [(path, held) for path, m in modules for held in (vars(m), m._buffers, m._parameters)]
        before = [dict(held) for _, held in holding]
        assigned: list[str] = []
        try:
            result = self.module(*args)
        finally:
            for (path, now), kept in zip(holding, before, strict=True):
                changed = [name for name, x in now.items() if x is not kept.get(name)]
                assigned += [f"{path}.{n}".strip(".") for n in changed if isinstance(now[n], Tensor)]
                if changed or len(now) != len(kept):
                    now.clear()
                    now.update(kept)
        if assigned:
            raise UnsupportedModelError(
                f"{', '.join(assigned)}: the module assigns a tensor to it, which no graph does; write to a "
                "buffer in place, or return the tensor"
            )
        return result


def _tied(module: nn.Module) -> dict[str, str]:
    """Each further name of a parameter or buffer that has several in the state dict, with its first name."""
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(tensor), name) for name, tensor in named}
    return {alias: name for alias, name in names.items() if alias != name}


def _with_attributes(
    program: Program, tensors: dict[str, Tensor], state: dict[str, Tensor], persistent: Collection[str]
) -> GraphModule:
    """The graph with its weights as parameters and buffers of its own instead of inputs."""
    placeholders, graph, root = program.placeholders(), program.graph, program.graph_module
    fused = {f.placeholder: f.transform.target.name for f in program.fused}
    attributes = dict(zip(placeholders, tensors, strict=False))
    attributes |= {node: fused[node.name] for node in placeholders if node.name in fused}
    kept = {node: name for node, name in attributes.items() if name in state}
    for name in kept.values():
        given = tensors.get(name)
        value = state[name].clone()
        is_parameter = given is None or isinstance(given, nn.Parameter)
        hold(root, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    by_name = {name: as_attribute(graph, node, name) for node, name in kept.items()}
    inverse = {t.target.name: t for t in program.plan().inverse().transforms} if fused else {}
    for node, name in attributes.items():
        if node not in kept:
            if node.users:
                _read_back(graph, node, inverse[name], by_name)
            graph.erase_node(node)
    result = GraphModule(root, graph)  # copies attributes, and makes every buffer persistent
    for name, buffer in list(result.named_buffers()):
        if name in tensors and name not in persistent:
            hold(result, name, buffer, persistent=False)
    result.graph.lint()
    return result


def _read_back(graph: torch.fx.Graph, node: Node, transform: Transform, fused: Mapping[str, Node]) -> None:
    """A member of a fused weight that is used elsewhere, too, is read from the rows it has there."""
    with graph.inserting_before(next(n for n in graph.nodes if n.op in ("call_function", "output"))):
        parts = [
            graph.call_function(torch.ops.aten.slice.Tensor, (fused[rows.source], 0, rows.start, rows.stop))
            for rows in transform.rows.segments
        ]
        whole = parts[0] if len(parts) == 1 else graph.call_function(torch.ops.aten.cat.default, (parts,))
    node.replace_all_uses_with(whole)
