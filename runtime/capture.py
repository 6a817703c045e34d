"""From Dynamo's graph to the normal form that patterns match on: pre-dispatch ATen with mutation kept."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import count
from typing import Any

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy

from fxfuse.runtime.graph_attributes import as_attribute, hold

Input = torch.Tensor | torch.SymInt | int

_regions = count(1)


def placeholders(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


class Uncut(Exception):
    """A value inside of a graph cannot be made anew as the input of a part of it."""


class Fakes:
    """Values of Dynamo's graph as fakes that the inner compiler can use, with Dynamo's symbols.

    `example_value` belongs to another fake mode. Values that share memory there do so here.
    """

    def __init__(self, graph_module: GraphModule, example_inputs: Sequence[Input]) -> None:
        self._inputs = dict(zip(placeholders(graph_module), example_inputs, strict=True))
        self._fakes: dict[Node, Any] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def inputs(self) -> list[Any]:
        """All inputs of the graph, in order."""
        return [self.of(node) for node in self._inputs]

    def of(self, node: Node) -> Any:
        """The value of an input, or of a node within. Raises Uncut where that has to be what it is."""
        if node not in self._fakes:
            self._fakes[node] = self._input(node) if node in self._inputs else self._within(node)
        return self._fakes[node]

    def _input(self, node: Node) -> Any:
        value = self._inputs[node]
        if not isinstance(value, torch.Tensor):
            return node.meta["example_value"]
        if isinstance(value, FakeTensor):
            return value
        context = TracingContext.get()
        symbolic = context.tensor_to_context.get(value)
        source = symbolic.tensor_source if symbolic is not None else None
        assert context.fake_mode is not None
        return context.fake_mode.from_tensor(value, symbolic_context=symbolic, source=source)

    def _within(self, node: Node) -> Any:
        value = node.meta["example_value"]
        if not isinstance(value, torch.Tensor):
            return value
        if (
            type(value) is not FakeTensor
            or value.layout != torch.strided
            or value.is_conj()
            or value.is_neg()
        ):
            raise Uncut(node.name)
        mode = mode_of(self.inputs()) or TracingContext.get().fake_mode
        if not self._storages:
            for other in self._inputs:
                if (
                    isinstance(was := other.meta["example_value"], torch.Tensor)
                    and was.layout == torch.strided
                ):
                    self._storages[was.untyped_storage()._cdata] = self.of(other).untyped_storage()
        memory, layout = value.untyped_storage(), (value.storage_offset(), value.shape, value.stride())
        with mode or nullcontext(), torch.no_grad():
            if memory._cdata not in self._storages:
                made = torch.empty((memory.nbytes(),), dtype=torch.uint8, device=value.device)
                self._storages[memory._cdata] = made.untyped_storage()
            elif value.requires_grad:
                raise Uncut(node.name)  # the gradient of shared memory has a history that is cut off here
            fake = torch.empty((0,), dtype=value.dtype, device=value.device)
            fake.set_(self._storages[memory._cdata], *layout)  # type: ignore[call-overload]
        if not value.requires_grad:
            return fake
        with mode or nullcontext(), torch.enable_grad():
            made = fake.requires_grad_().clone()  # computed, not a leaf: it may be written to
        if made.stride() != value.stride() or value.storage_offset() != 0:
            raise Uncut(node.name)
        self._storages[memory._cdata] = made.untyped_storage()
        return made


def untraced_parts(graph_module: GraphModule) -> list[str]:
    """Fakes that a trace kept as constants, as of the parts of a tensor subclass: such a graph cannot run."""
    return [
        str(node.target)
        for node in graph_module.graph.find_nodes(op="get_attr")
        if isinstance(getattr(graph_module, str(node.target), None), FakeTensor)
    ]


def mode_of(fakes: Sequence[Any]) -> FakeTensorMode | None:
    """The mode that the fakes belong to; Dynamo's own differs where it was given fakes to begin with."""
    return next((f.fake_mode for f in fakes if isinstance(f, FakeTensor)), None)


# Take effect while a graph is traced and leave no call in it.
_UNRECORDED = frozenset({torch.set_autocast_enabled, torch.set_autocast_dtype})


class Unrecorded(Exception):
    """A graph calls what takes effect while it is traced, and would not when it runs."""

    def __init__(self, call: Any) -> None:
        super().__init__(f"torch.{call.__name__} is lost in tracing: use `with torch.autocast(...)`")


def check_recorded(called: Any) -> None:
    """Raise Unrecorded for a function that tracing would carry out instead of writing it down."""
    if called in _UNRECORDED:
        raise Unrecorded(called)


class ObeyedAutocast(TorchFunctionMode):
    """While a graph is traced, the autocast that it enters is on: tracing writes it down and enters nothing.

    What a value is cast to, and so which casts do nothing, depends on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._entered: list[torch.autocast] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.amp.autocast_mode._enter_autocast:
            entered = torch.autocast(*args)
            entered.__enter__()  # which is written down, too
            self._entered.append(entered)
            return entered
        if func is torch.amp.autocast_mode._exit_autocast and args[0] in self._entered:
            self._entered.remove(args[0])
            args[0].__exit__(None, None, None)
            return None
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for entered in reversed(self._entered):
            entered.__exit__(*raised)


class _Retracer(Interpreter):
    """Runs Dynamo's graph to be traced again, its constants by the values given for them."""

    def __init__(self, graph_module: GraphModule, constants: dict[str, Any] | None = None) -> None:
        super().__init__(graph_module)
        self._constants = constants or {}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self._constants:
            return self._constants[target]
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        check_recorded(target)
        # `x.data` reaches no operator, so that tracing would keep the fake of today as a constant
        if target is torch._C._autograd._get_data_attr:  # type: ignore[attr-defined]
            return args[0].detach()
        if target is torch.ops.higher_order.tag_activation_checkpoint:
            body, *rest = args
            if "_checkpoint_context_fn" not in body.meta:  # that is selective: only torch knows what it keeps
                return self._checkpointed(body, rest)
        return super().call_function(target, args, kwargs)

    def _checkpointed(self, body: GraphModule, args: Sequence[Any]) -> Any:
        """The body of an activation checkpoint in line, marked for AOTAutograd to compute it again."""
        region = next(_regions)
        for node in body.graph.nodes:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = region
        return _Retracer(body).run(*args)


def trace(graph_module: GraphModule, fakes: Sequence[Any]) -> GraphModule:
    """The same computation as pre-dispatch ATen; `nn_module_stack` survives, the graph given stays."""
    constants = _constants(graph_module)
    context = TracingContext.try_get()
    mode = mode_of(fakes) or (context.fake_mode if constants and context is not None else None)

    def call(*args: Any) -> Any:
        values = dict(zip(constants, args[len(fakes) :], strict=True))
        with ObeyedAutocast():
            return _Retracer(graph_module, values).run(*args[: len(fakes)])

    run = make_fx(call, pre_dispatch=True)
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        with preserve_node_meta(), mode or nullcontext():
            values = constants.values()
            traced = run(*fakes, *(values if mode is None else map(mode.from_tensor, values)))
    finally:  # where it raises, transforms of torch.func that the graph has entered are still open
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
    for node, (name, value) in zip(placeholders(traced)[len(fakes) :], constants.items(), strict=True):
        hold(traced, name, value)
        as_attribute(traced.graph, node, name)
    traced.recompile()
    return traced


def _constants(graph_module: GraphModule) -> dict[str, torch.Tensor]:
    """The tensors of a graph that are no inputs, as those whose address a caller has marked to be guarded.

    Tracing must not meet them themselves: what a graph writes to them would be written then and there.
    """
    named = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    found = {name: getattr(graph_module, name, None) for name in sorted(named)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def carry_over(traced: GraphModule, original: GraphModule) -> None:
    """Give the traced graph what AOTAutograd reads off Dynamo's: sources and static marks of the inputs."""
    traced.meta.update(original.meta)
    sources: Any = getattr(original, "_param_name_to_source", {})
    traced._param_name_to_source = sources
    for new, old in zip(placeholders(traced), placeholders(original), strict=True):
        new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]
        new.meta["tensor_dict"] = old.meta.get("tensor_dict", {})
