"""The thing that passes rewrite: a graph in normal form, its weights, and the fused weights it has gained."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxfuse.passes.modes import switches_mode
from fxfuse.passes.storage_writes import same_layout, storages
from fxfuse.passes.weights.naming import fused_name
from fxfuse.passes.weights.plan import TensorSpec, Transform, WeightPlan
from fxfuse.passes.weights.row_map import RowMap
from fxfuse.passes.weights.tensor_spec import dtype_name


@dataclass(frozen=True)
class Weight:
    """A parameter as the graph sees it: a placeholder with a name in the state dict.

    `refusal` says why its memory may not be rearranged, None where it may.
    """

    name: str
    trainable: bool = False
    refusal: str | None = None


@dataclass(frozen=True)
class FusedWeight:
    """A placeholder that a pass has added, filled from the placeholders `members` by `transform`."""

    placeholder: str
    members: tuple[str, ...]
    transform: Transform
    shares_memory: bool


class _Draft(GraphModule):
    """A graph module without code, which costs more than a copy: between passes nobody calls it."""

    def recompile(self) -> Any:
        return None


@dataclass
class Program:
    """A graph whose inputs are all placeholders; `weights` has those that are parameters, by placeholder.

    `copy_weights` and `round_beta` are what `Options` says of them. `inputs_train` says that inputs ask for
    gradients, which the values of a trace do not.
    """

    graph_module: GraphModule
    weights: dict[str, Weight]
    fake_mode: Any = None
    grad_enabled: bool = False
    copy_weights: bool = False
    round_beta: bool = False
    inputs_train: bool = False
    fused: list[FusedWeight] = field(default_factory=list)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.graph_module.graph

    def copy(self) -> Program:
        """An independent graph over the same weights; the metas' values are shared.

        Its module has no code before `write_code`.
        """
        graph_module = _Draft(self.graph_module, copy.deepcopy(self.graph))
        graph_module.meta.update(self.graph_module.meta)
        for new, old in zip(graph_module.graph.nodes, self.graph.nodes, strict=True):
            new.meta = dict(old.meta)
            if hasattr(old, "_dynamo_source"):
                new._dynamo_source = old._dynamo_source
        return replace(self, graph_module=graph_module, fused=list(self.fused))

    def is_copy_of(self, other: Program) -> bool:
        """Whether this is what `other.copy()` gives: nothing in it was changed since."""
        nodes, others = self.graph.nodes, other.graph.nodes
        return (
            len(nodes) == len(others)
            and len(self.fused) == len(other.fused)
            and all(map(_is_copy, nodes, others))
        )

    def write_code(self) -> None:
        """Make the graph module one that can be called."""
        meta = self.graph_module.meta
        self.graph_module = GraphModule(self.graph_module, self.graph)
        self.graph_module.meta.update(meta)

    @property
    def needs_gradients(self) -> bool:
        """Whether grad mode is on, and something that the graph reads may be asked for a gradient."""
        values = (node.meta.get("val") for node in self.placeholders())
        return self.grad_enabled and (
            self.inputs_train
            or any(weight.trainable for weight in self.weights.values())
            or any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)
        )

    def placeholders(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def calls(self, *targets: str) -> list[Node]:
        """Call nodes whose operator has one of these names, in order."""
        return [n for n in self.graph.nodes if n.op == "call_function" and _name(n.target) in targets]

    def add_fused_weight(self, transform: Transform, members: Iterable[Node], shares_memory: bool) -> Node:
        """A new last placeholder for the transform's target; the caller of the graph fills it."""
        members = tuple(members)
        last = self.placeholders()[-1]
        spec = transform.target
        with self.graph.inserting_after(last):
            node = self.graph.placeholder("fused_" + spec.name.replace(".", "_"))
        first = members[0].meta["val"]
        node.meta["val"] = _empty_like(first, spec.shape, self.fake_mode)
        node._dynamo_source = None  # type: ignore[attr-defined]
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        self.fused.append(FusedWeight(node.name, tuple(m.name for m in members), transform, shares_memory))
        return node

    def stack(self, parameters: Sequence[Node]) -> Node:
        """The placeholder of these parameters stacked by rows, in order; the same one for the same stack."""
        members = tuple(p.name for p in parameters)
        for fused in self.fused:
            if fused.members == members:
                return next(n for n in self.placeholders() if n.name == fused.placeholder)
        names = [self.weights[name].name for name in members]
        values = [p.meta["val"] for p in parameters]
        rows = [value.shape[0] for value in values]
        spec = TensorSpec(fused_name(names), (sum(rows), *values[0].shape[1:]), dtype_name(values[0].dtype))
        transform = Transform(spec, RowMap.concat(zip(names, rows, strict=True)))
        return self.add_fused_weight(transform, parameters, shares_memory=True)

    def fused_elsewhere(self, parameters: Sequence[Node]) -> str | None:
        """The name of a parameter that another fused weight has claimed: memory is laid out one way only."""
        names = tuple(p.name for p in parameters)
        for fused in self.fused:
            common = set(fused.members) & set(names)
            if common and fused.members != names:
                return self.weights[min(common)].name
        return None

    def fused_as(self, parameter: Node) -> FusedWeight | None:
        """How this placeholder is filled, None for one that was there from the start."""
        return next((fused for fused in self.fused if fused.placeholder == parameter.name), None)

    def name_of(self, parameter: Node) -> str:
        """The name of a weight without its last part, also of a fused one; empty for what is no parameter."""
        fused, weight = self.fused_as(parameter), self.weights.get(parameter.name)
        name = fused.transform.target.name if fused is not None else weight.name if weight is not None else ""
        return name.rpartition(".")[0] or name

    def members_of(self, parameter: Node) -> tuple[str, ...]:
        """Names of the parameters that a weight consists of."""
        fused = self.fused_as(parameter)
        placeholders = (parameter.name,) if fused is None else fused.members
        return tuple(self.weights[name].name for name in placeholders)

    def is_trainable(self, parameter: Node) -> bool:
        """Whether any parameter that a weight consists of asks for gradients."""
        fused = self.fused_as(parameter)
        placeholders = (parameter.name,) if fused is None else fused.members
        return any(self.weights[name].trainable for name in placeholders)

    def permuted(self, parameter: Node, order: Sequence[int]) -> Node:
        """The placeholder of a copy of this weight with its rows in another order."""
        fused = self.fused_as(parameter)
        own = self.members_of(parameter)[0]
        value = parameter.meta["val"]
        rows = RowMap.identity(own, value.shape[0]) if fused is None else fused.transform.rows
        module, _, leaf = (own if fused is None else fused.transform.target.name).rpartition(".")
        rows = RowMap.permute("rows", order).compose(rows)
        placeholders = {p.name: p for p in self.placeholders()}
        for other in self.fused:
            if other.transform.rows == rows and not other.shares_memory:
                return placeholders[other.placeholder]
        stem = f"{module}_permuted" if module else "permuted"
        taken = {other.transform.target.name for other in self.fused}
        names = (f"{stem}{n}.{leaf}" for n in ("", *(f"_{i}" for i in range(2, len(taken) + 3))))
        name = next(name for name in names if name not in taken)
        transform = Transform(TensorSpec(name, tuple(value.shape), dtype_name(value.dtype)), rows)
        members = [parameter] if fused is None else [placeholders[name] for name in fused.members]
        return self.add_fused_weight(transform, members, shares_memory=False)

    def drop_unused_weights(self) -> None:
        """Forget fused weights that no node reads any more."""
        for node in self.placeholders():
            fused = self.fused_as(node)
            if fused is not None and not node.users:
                self.fused.remove(fused)
                self.graph.erase_node(node)

    def plan(self) -> WeightPlan:
        """The weight transforms of everything fused so far, as one plan over the names in the state dict."""
        by_name = {node.name: node.meta["val"] for node in self.placeholders()}
        sources = [
            TensorSpec(self.weights[m].name, tuple(by_name[m].shape), dtype_name(by_name[m].dtype))
            for fused in self.fused
            for m in fused.members
        ]
        return WeightPlan(tuple(dict.fromkeys(sources)), tuple(f.transform for f in self.fused))

    def refresh(self, changed: Iterable[Node] = ()) -> None:
        """Recompute `meta["val"]` of new and changed nodes, and where inputs changed shape, stride or memory.

        A result in memory of its own that is laid out as before stays as it is, and what follows with it.
        """
        for node in changed:
            node.meta.pop("val", None)
        if all("val" in node.meta or node.op != "call_function" for node in self.graph.nodes):
            return
        moved: set[Node] = set()
        origin: dict[int, Node] = {}
        for node in self.graph.nodes:
            for storage in storages(node.meta.get("val")):
                origin.setdefault(storage, node)
        modes: dict[Node, Any] = {}

        def value_of(node: Node) -> Any:
            return modes[node] if node in modes else self._value(node)

        with self.fake_mode or nullcontext(), enable_python_dispatcher(), torch.no_grad():
            try:
                for node in self.graph.nodes:
                    if node.op != "call_function":
                        continue
                    switch = switches_mode(node)
                    if not switch and "val" in node.meta and moved.isdisjoint(node.all_input_nodes):
                        continue
                    args, kwargs = map_arg((node.args, node.kwargs), value_of)
                    value = node.target(*args, **kwargs)
                    if switch:
                        modes[node] = value
                        modes.update(dict.fromkeys(node.all_input_nodes))
                        continue
                    was_its_own = all(origin[s] is node for s in storages(node.meta.get("val")))
                    is_its_own = storages(value).isdisjoint(storages(tree_leaves((args, kwargs))))
                    if was_its_own and is_its_own and same_layout(value, node.meta.get("val")):
                        continue
                    if _signature(value) != _signature(node.meta.get("val")):
                        moved.add(node)
                    node.meta["val"] = value
            finally:
                for entered in modes.values():
                    if isinstance(entered, torch.autocast):
                        entered.__exit__(None, None, None)

    def _value(self, node: Node) -> Any:
        """The value of a node; a constant that tracing gave none gets one that belongs to the fake mode."""
        if "val" not in node.meta and node.op == "get_attr":
            value = attrgetter(str(node.target))(self.graph_module)
            if isinstance(value, torch.Tensor) and self.fake_mode is not None:
                value = self.fake_mode.from_tensor(value, static_shapes=True)
            node.meta["val"] = value
        return node.meta["val"]


# An operator puts its name together anew each time that it is asked.
_name = cache(str)

_MISSING = object()


def _is_copy(node: Node, other: Node) -> bool:
    return (
        node.name == other.name
        and node.target == other.target
        and len(node.meta) == len(other.meta)
        and all(value is other.meta.get(key, _MISSING) for key, value in node.meta.items())
        and _same_arguments(node.args, other.args)
        and _same_arguments(node.kwargs, other.kwargs)
    )


def _same_arguments(given: Any, other: Any) -> bool:
    """Of a node and of its copy: copies of nodes have their names, constants are the same objects."""
    if isinstance(given, Node):
        return isinstance(other, Node) and given.name == other.name
    if isinstance(given, (list, tuple)):
        same_kind = isinstance(other, (list, tuple)) and len(given) == len(other)
        return same_kind and all(map(_same_arguments, given, other))
    if isinstance(given, dict):
        same_keys = isinstance(other, dict) and list(given) == list(other)
        return same_keys and all(_same_arguments(value, other[key]) for key, value in given.items())
    return given is other


def module_path(node: Node) -> str:
    """Dotted path of the module that a node was traced in; empty where Dynamo left none."""
    stack = node.meta.get("nn_module_stack") or {}
    return dotted_path(next(reversed(stack.values()))[0] if stack else "")


def dotted_path(path: str) -> str:
    """`L['self']._modules['model'].layers[0]` to `model.layers.0`."""
    path = re.sub(r"^L\['\w+'\]", "", path)  # the variable that held the model
    return ".".join(re.findall(r"\w+", path.replace("_modules", ""))).removeprefix("self.")


def _empty_like(value: Any, shape: tuple[int, ...], fake_mode: Any) -> Any:
    if fake_mode is None:
        return value.new_empty(shape)
    with fake_mode:
        return torch.empty(shape, dtype=value.dtype, device=value.device)


def _signature(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    if isinstance(value, torch.Tensor):
        # the memory first: where it differs, symbolic sizes are not compared, which would add guards
        return value.untyped_storage()._cdata, value.dtype, tuple(value.shape), value.stride()
    return value
