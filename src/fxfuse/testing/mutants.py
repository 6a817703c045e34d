"""Near misses: a graph with one change, after which a pattern may match something that only looks alike.

    mutant = near_miss(module, inputs, random.Random(0))
    print(mutant.change)            # "cat: parts 0 and 2 exchanged"

A mutant runs on the same inputs. What it computes does not matter: a rewrite of it has to
give what it gives.
"""

import copy
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate

__all__ = ["CHANGES", "Mutant", "near_miss"]

# Of each kind, before another one is tried.
ATTEMPTS = 6


@dataclass(frozen=True)
class Mutant:
    """A changed graph, the kind of the change, and what it was in words."""

    module: GraphModule
    kind: str
    change: str


class _Impossible(Exception):
    """Nothing in this graph can be changed so."""


def near_miss(
    module: GraphModule, inputs: Sequence[Tensor], rng: random.Random, kinds: Sequence[str] = ()
) -> Mutant:
    """One change of the graph that leaves it able to run, of one of these kinds; the module stays as it is.

    Raises:
        ValueError: no change was found that the graph survives.
    """
    values = _values(module, inputs)
    kinds = list(kinds or CHANGES)
    rng.shuffle(kinds)
    for kind in [kind for kind in kinds for _ in range(ATTEMPTS)]:
        mutant = copy.deepcopy(module)
        by_name = {node.name: values[node.name] for node in module.graph.nodes if node.name in values}
        try:
            change = CHANGES[kind](mutant, by_name, rng)
            mutant.graph.lint()
            mutant.recompile()
            with torch.no_grad():
                type(mutant).forward(mutant, *(x.clone() for x in inputs))  # a call would print what fails
        except _Impossible:
            continue
        except Exception:  # the changed graph does not run: another one
            continue
        return Mutant(mutant, kind, change)
    raise ValueError("no change was found that this graph survives")


class _Recorder(Interpreter):
    def run_node(self, n: Node) -> Any:
        self.found: dict[str, Any]
        value = super().run_node(n)
        self.found[n.name] = value
        return value


def _values(module: GraphModule, inputs: Sequence[Tensor]) -> dict[str, Any]:
    recorder = _Recorder(copy.deepcopy(module))
    recorder.garbage_collect_values = False
    recorder.found = {}
    with torch.no_grad():
        recorder.run(*(x.clone() for x in inputs))
    return recorder.found


Values = dict[str, Any]


def _tensors(module: GraphModule, values: Values) -> list[Node]:
    """Nodes that are one floating tensor and can be read by others, parameters left out."""
    return [
        node
        for node in module.graph.nodes
        if node.op not in ("output", "get_attr")
        and isinstance(value := values.get(node.name), Tensor)
        and value.is_floating_point()
    ]


def _some(rng: random.Random, found: Sequence[Any]) -> Any:
    if not found:
        raise _Impossible
    return rng.choice(list(found))


def _is_call(node: Node) -> bool:
    return node.op.startswith("call_")


def _insert(node: Node, target: str | Callable[..., Any], *args: Any) -> Node:
    """A call right behind a node."""
    with node.graph.inserting_after(node):
        if isinstance(target, str):
            return node.graph.call_method(target, args)
        return node.graph.call_function(target, args)


def _other_input(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One use of a tensor reads another tensor of that shape, or the tensor plus one."""
    node = _some(rng, [n for n in _tensors(module, values) if n.users])
    user = _some(rng, list(node.users))
    order = list(module.graph.nodes)
    before = order[: order.index(user)]
    shape = values[node.name].shape
    others = [n for n in _tensors(module, values) if n in before and n is not node]
    alike = [n for n in others if values[n.name].shape == shape]
    known = bool(alike) and rng.random() < 0.5
    other = rng.choice(alike) if known else _insert(node, operator.add, node, 1)
    user.replace_input_with(node, other)
    return f"{user.name} reads {other.name} instead of {node.name}"


def _escape(module: GraphModule, values: Values, rng: random.Random) -> str:
    """An intermediate value leaves the graph as well."""
    node = _some(rng, [n for n in _tensors(module, values) if _is_call(n)])
    (output,) = module.graph.find_nodes(op="output")
    output.args = ((*output.args[0], node),)
    return f"{node.name} is an output, too"


def _extra_user(module: GraphModule, values: Values, rng: random.Random) -> str:
    """An intermediate value has one more reader."""
    node = _some(rng, [n for n in _tensors(module, values) if _is_call(n)])
    (output,) = module.graph.find_nodes(op="output")
    with module.graph.inserting_before(output):
        used = module.graph.call_function(operator.mul, (node, 3))
    output.args = ((*output.args[0], used),)
    return f"{node.name} has one more reader"


def _permuted_cat(module: GraphModule, values: Values, rng: random.Random) -> str:
    cats = [
        n
        for n in module.graph.nodes
        if n.op == "call_function" and n.args and isinstance(n.args[0], (list, tuple)) and len(n.args[0]) > 1
    ]
    node = _some(rng, [n for n in cats if all(isinstance(p, Node) for p in n.args[0])])
    parts = list(node.args[0])
    a, b = rng.sample(range(len(parts)), 2)
    parts[a], parts[b] = parts[b], parts[a]
    node.args = (parts, *node.args[1:])
    return f"{node.name}: parts {a} and {b} exchanged"


def _other_getitem(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One part of a split is read in the place of another."""
    node = _some(
        rng, [n for n in module.graph.nodes if n.target is operator.getitem and type(n.args[1]) is int]
    )
    old = node.args[1]
    node.args = (node.args[0], old + rng.choice((-1, 1)))
    return f"{node.name}: part {node.args[1]} instead of {old}"


def _unequal_split(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One element moves from one size of a list of sizes to another."""
    found = [
        (n, i)
        for n in module.graph.nodes
        if _is_call(n)
        for i, a in enumerate(n.args)
        if isinstance(a, (list, tuple)) and len(a) > 1 and all(type(size) is int for size in a)
    ]
    node, place = _some(rng, found)
    sizes = list(node.args[place])
    a, b = rng.sample(range(len(sizes)), 2)
    sizes[a], sizes[b] = sizes[a] + 1, sizes[b] - 1
    node.args = (*node.args[:place], type(node.args[place])(sizes), *node.args[place + 1 :])
    return f"{node.name}: sizes {sizes}"


def _exchanged_sizes(module: GraphModule, values: Values, rng: random.Random) -> str:
    found = [
        (n, i)
        for n in module.graph.nodes
        if _is_call(n)
        for i, a in enumerate(n.args)
        if isinstance(a, (list, tuple)) and len(set(map(str, a))) > 1 and all(type(size) is int for size in a)
    ]
    node, place = _some(rng, found)
    sizes = list(node.args[place])
    a, b = rng.sample(range(len(sizes)), 2)
    sizes[a], sizes[b] = sizes[b], sizes[a]
    node.args = (*node.args[:place], type(node.args[place])(sizes), *node.args[place + 1 :])
    return f"{node.name}: sizes or dimensions {sizes}"


def _literal(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A number off by one or by a factor: an epsilon, a scale, a start, a dimension."""
    found: list[tuple[Node, int]] = []
    for node in module.graph.nodes:
        if _is_call(node):
            numbers: list[Any] = []
            map_aggregate((node.args, node.kwargs), numbers.append)
            count = sum(1 for v in numbers if type(v) in (int, float))
            found += [(node, i) for i in range(count)]
    node, place = _some(rng, found)
    seen, told = -1, ""
    factor, step = rng.choice((0.5, 3.0, -1.0)), rng.choice((-1, 1))

    def changed(value: Any) -> Any:
        nonlocal seen, told
        if type(value) not in (int, float):
            return value
        seen += 1
        if seen != place:
            return value
        new = value + step if type(value) is int else value * factor + (1.0 if value == 0 else 0.0)
        told = f"{value} becomes {new}"
        return new

    node.args, node.kwargs = map_aggregate((node.args, node.kwargs), changed)
    return f"{node.name}: {told}"


def _other_dim(module: GraphModule, values: Values, rng: random.Random) -> str:
    """dim= of a call is another one."""
    node = _some(rng, [n for n in module.graph.nodes if type(n.kwargs.get("dim")) is int])
    node.kwargs = {**node.kwargs, "dim": node.kwargs["dim"] + rng.choice((-1, 1, 2))}
    return f"{node.name}: dim={node.kwargs['dim']}"


def _mutation(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A tensor is written in place somewhere between its first use and the end."""
    node = _some(rng, _tensors(module, values))
    later = [n for n in list(module.graph.nodes) if n > node and (_is_call(n) or n.op == "output")]
    reader = _some(rng, later)
    with module.graph.inserting_before(reader):
        kind = rng.choice(("add_", "mul_", "setitem", "copy_"))
        if kind == "setitem":
            place: Any = (Ellipsis, 0)
            module.graph.call_function(operator.setitem, (node, place, 5.0))
        elif kind == "copy_":
            turned = module.graph.call_method("flip", (node, (0,)))
            module.graph.call_method("copy_", (node, turned))
        else:
            module.graph.call_method(kind, (node, 2))
    return f"{node.name} is written by {kind} before {reader.name}"


def _other_dtype(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A value goes through another dtype, and back or not."""
    node = _some(rng, [n for n in _tensors(module, values) if n.users])
    users = list(node.users)
    own = values[node.name].dtype
    there = rng.choice((torch.bfloat16, torch.float64, torch.float16))
    cast = last = _insert(node, "to", node, there)
    if rng.random() < 0.7:
        last = _insert(cast, "to", cast, own)
    for user in users if rng.random() < 0.5 else [rng.choice(users)]:
        user.replace_input_with(node, last)
    return f"{node.name} goes through {there}"


def _with_weights(module: GraphModule) -> list[nn.Module]:
    """Modules with a matrix as their weight; those that are read, but never called, are no nn.Linear here."""
    weights = [(m, getattr(m, "weight", None)) for m in module.modules()]
    return [m for m, weight in weights if isinstance(weight, nn.Parameter) and weight.dim() == 2]


def _one_bias(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One linear module gains a bias."""
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    found = [(name, m) for name, m in module.named_modules() if name in called and isinstance(m, nn.Linear)]
    name, linear = _some(rng, [(name, m) for name, m in found if m.bias is None])
    linear.bias = nn.Parameter(torch.ones_like(linear.weight[:, 0]), requires_grad=False)
    return f"{name} has a bias"


def _tied(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Two linears have one weight, or weights in overlapping memory."""
    owners: list[Any] = list(_with_weights(module))
    pairs = [(a, b) for a in owners for b in owners if a is not b and len(a.weight) >= len(b.weight)]
    a, b = _some(rng, [(a, b) for a, b in pairs if a.weight.shape[1] == b.weight.shape[1]])
    if a.weight.shape == b.weight.shape and rng.random() < 0.5:
        b.weight = a.weight
        return "two linears have one weight"
    b.weight = nn.Parameter(a.weight.detach()[len(a.weight) - len(b.weight) :], requires_grad=False)
    return "the weight of one linear is a part of another's"


def _other_parameter(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A parameter is read in the place of another."""
    nodes = module.graph.find_nodes(op="get_attr")
    pairs = [
        (a, b)
        for a in nodes
        for b in nodes
        if a.target != b.target and values[a.name].shape == values[b.name].shape
    ]
    a, b = _some(rng, pairs)
    a.target = b.target
    return f"{a.name} reads {b.target}"


def _computed_weight(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A weight is scaled before it is used."""
    node = _some(rng, [n for n in module.graph.find_nodes(op="get_attr") if n.users])
    users = list(node.users)
    scaled = _insert(node, operator.mul, node, 2)
    for user in users:
        user.replace_input_with(node, scaled)
    return f"{node.name} is scaled"


def _dropped(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A call is left out where its input has its shape."""
    found = [
        (n, source)
        for n in _tensors(module, values)
        if _is_call(n)
        for source in n.all_input_nodes
        if isinstance(values.get(source.name), Tensor)
        and values[source.name].shape == values[n.name].shape
        and values[source.name].dtype == values[n.name].dtype
    ]
    node, source = _some(rng, found)
    name = node.name
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)
    return f"{name} is left out"


CHANGES: dict[str, Callable[[GraphModule, Values, random.Random], str]] = {
    "another input": _other_input,
    "an output that escapes": _escape,
    "an extra user": _extra_user,
    "a permuted cat": _permuted_cat,
    "another part": _other_getitem,
    "an unequal split": _unequal_split,
    "exchanged sizes": _exchanged_sizes,
    "a literal off": _literal,
    "another dim": _other_dim,
    "a mutation in between": _mutation,
    "another dtype in the middle": _other_dtype,
    "a bias on one": _one_bias,
    "a tied or aliased weight": _tied,
    "another parameter": _other_parameter,
    "a computed weight": _computed_weight,
    "a call left out": _dropped,
}
