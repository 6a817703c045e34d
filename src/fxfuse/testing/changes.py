"""The changes that near misses are made with: each edits a graph module in one place and says what it did."""

import operator
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from fxfuse.testing.graph_edits import (
    TRACED,
    ImpossibleError,
    Values,
    added_output,
    floating,
    insert,
    instead,
    is_call,
    some,
    written,
)
from fxfuse.testing.shared_memory import SHARED_MEMORY
from fxfuse.testing.unusual_values import UNUSUAL

__all__ = ["CHANGES", "ImpossibleError"]

LINEARS = (F.linear, torch.ops.aten.linear.default)


def _other_input(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One use of a tensor reads another tensor of that shape, or the tensor plus one."""
    node = some(rng, [n for n in floating(module, values) if n.users])
    user = some(rng, list(node.users))
    order = list(module.graph.nodes)
    before = order[: order.index(user)]
    shape = values[node.name].shape
    others = [n for n in floating(module, values) if n in before and n is not node]
    alike = [n for n in others if values[n.name].shape == shape]
    known = bool(alike) and rng.random() < 0.5
    other = rng.choice(alike) if known else insert(node, "add", node, 1)
    user.replace_input_with(node, other)
    return f"{user.name} reads {other.name} instead of {node.name}"


def _escape(module: GraphModule, values: Values, rng: random.Random) -> str:
    """An intermediate value leaves the graph as well."""
    node = some(rng, [n for n in floating(module, values) if is_call(n)])
    added_output(module, node)
    return f"{node.name} is an output, too"


def _extra_user(module: GraphModule, values: Values, rng: random.Random) -> str:
    """An intermediate value has one more reader."""
    node = some(rng, [n for n in floating(module, values) if is_call(n)])
    (output,) = module.graph.find_nodes(op="output")
    added_output(module, insert(output.prev, "mul", node, 3))
    return f"{node.name} has one more reader"


def _permuted_cat(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Two parts of a concatenation change places."""
    cats = [
        n
        for n in module.graph.nodes
        if n.op == "call_function" and n.args and isinstance(n.args[0], (list, tuple)) and len(n.args[0]) > 1
    ]
    node = some(rng, [n for n in cats if all(isinstance(p, Node) for p in n.args[0])])
    parts = list(node.args[0])
    a, b = rng.sample(range(len(parts)), 2)
    parts[a], parts[b] = parts[b], parts[a]
    node.args = (parts, *node.args[1:])
    return f"{node.name}: parts {a} and {b} exchanged"


def _other_getitem(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One part of a split is read in the place of another."""
    node = some(
        rng, [n for n in module.graph.nodes if n.target is operator.getitem and type(n.args[1]) is int]
    )
    old = node.args[1]
    node.args = (node.args[0], old + rng.choice((-1, 1)))
    return f"{node.name}: part {node.args[1]} instead of {old}"


def _split_along(node: Node, values: Values) -> int | None:
    """The dimension that a call splits its first argument along, None where it is no split."""
    parts = values.get(node.name)
    if not is_call(node) or not isinstance(parts, (list, tuple)) or len(parts) < 2:
        return None
    whole = values.get(node.args[0].name) if node.args and isinstance(node.args[0], Node) else None
    if not isinstance(whole, Tensor) or not all(isinstance(p, Tensor) for p in parts):
        return None
    if any(p.dim() != whole.dim() for p in parts):
        return None
    if any(user.target is not operator.getitem for user in node.users):
        return None
    shapes = zip(*(p.shape for p in parts), strict=True)
    along = [dim for dim, sizes in enumerate(shapes) if sum(sizes) == whole.shape[dim]]
    return along[0] if along else None


def _unequal_split(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One element moves from one part of a split to another; each is cut or lengthened to its size again."""
    found = [n for n in module.graph.nodes if _split_along(n, values) is not None]
    node = some(rng, found)
    dim = _split_along(node, values)
    assert dim is not None
    sizes = [part.shape[dim] for part in values[node.name]]
    givers = [i for i, size in enumerate(sizes) if size > 1]
    giver = some(rng, givers)
    taker = rng.choice([i for i in range(len(sizes)) if i != giver])
    sizes[taker], sizes[giver] = sizes[taker] + 1, sizes[giver] - 1
    split = insert(node.prev, "split_with_sizes", node.args[0], sizes, dim)
    for part in list(node.users):
        part.replace_input_with(node, split)
        place = part.args[1] % len(sizes) if isinstance(part.args[1], int) else -1
        if place == giver:
            first = insert(part, "narrow", part, dim, 0, 1)
            whole = insert(first, "cat", [part, first], dim)
            part.replace_all_uses_with(whole, delete_user_cb=lambda u, f=first, w=whole: u not in (f, w))
        elif place == taker:
            cut = insert(part, "narrow", part, dim, 0, sizes[taker] - 1)
            instead(part, cut, cut)
    module.graph.erase_node(node)
    return f"{node.name}: sizes {sizes} along {dim}"


def _exchanged_sizes(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Two sizes of a reshape or two dimensions of a permutation change places; the shape stays."""
    found = [
        (n, i)
        for n in module.graph.nodes
        if is_call(n) and isinstance(values.get(n.name), Tensor)
        for i, a in enumerate(n.args)
        if isinstance(a, (list, tuple)) and len(set(map(str, a))) > 1 and all(_is_size(size) for size in a)
    ]
    found += [
        (n, 1)
        for n in module.graph.nodes
        if n.op == "call_method" and n.target in ("view", "reshape", "permute") and len(n.args) > 2
    ]
    node, place = some(rng, found)
    spread = not isinstance(node.args[place], (list, tuple))
    sizes = list(node.args[place:] if spread else node.args[place])
    shape = list(values[node.name].shape)
    a, b = rng.sample(range(len(sizes)), 2)
    sizes[a], sizes[b] = sizes[b], sizes[a]
    rest = () if spread else node.args[place + 1 :]
    node.args = (*node.args[:place], *(sizes if spread else (type(node.args[place])(sizes),)), *rest)
    if len(sizes) == len(shape) and shape[a] != shape[b]:
        dims = [size % len(sizes) for size in sizes if type(size) is int]
        if sorted(dims) == list(range(len(sizes))):
            back = insert(node, "reshape", node, shape)
        else:
            back = insert(node, "transpose", node, a, b)
        instead(node, back, back)
    return f"{node.name}: sizes or dimensions {sizes}"


def _is_size(value: Any) -> bool:
    return type(value) is int or isinstance(value, Node)


def _literal(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A number off by one or by a factor: an epsilon, a scale, a start, a dimension."""
    found: list[tuple[Node, int]] = []
    for node in module.graph.nodes:
        if is_call(node):
            numbers: list[Any] = []
            map_aggregate((node.args, node.kwargs), numbers.append)
            count = sum(1 for v in numbers if type(v) in (int, float))
            found += [(node, i) for i in range(count)]
    node, place = some(rng, found)
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
    places = {n: _place_of_dim(n) for n in module.graph.nodes}
    node = some(
        rng, [n for n, place in places.items() if place is not None or type(n.kwargs.get("dim")) is int]
    )
    step, place = rng.choice((-1, 1, 2)), places[node]
    if place is None:
        node.kwargs = {**node.kwargs, "dim": node.kwargs["dim"] + step}
    else:
        node.args = (*node.args[:place], node.args[place] + step, *node.args[place + 1 :])
    return f"{node.name}: its dimension moved by {step}"


def _place_of_dim(node: Node) -> int | None:
    """Which argument of an ATen call is its dimension; None where none is, or by keyword."""
    if not isinstance(node.target, OpOverload):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    place = names.index("dim") if "dim" in names else len(names)
    return place if place < len(node.args) and type(node.args[place]) is int else None


def _mutation(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A tensor is written in place somewhere between its first use and the end."""
    node = some(rng, floating(module, values))
    later = [n for n in list(module.graph.nodes) if n > node and (is_call(n) or n.op == "output")]
    reader = some(rng, later)
    kind, before = rng.choice(("add_", "mul_", "setitem", "copy_", "relu_", "cumsum_")), reader.prev
    if kind == "setitem" and not module.meta.get(TRACED):
        with module.graph.inserting_before(reader):
            module.graph.call_function(operator.setitem, (node, (Ellipsis, 0), 5.0))  # type: ignore[arg-type]
    elif kind == "setitem":
        part = insert(before, "select", node, -1, 0)
        insert(part, "fill_", part, 5.0)
    elif kind == "copy_":
        turned = insert(before, "flip", node, (0,))
        written(turned, "copy_", node, turned)
    else:
        written(before, kind, node, *{"relu_": (), "cumsum_": (-1,)}.get(kind, (2,)))
    return f"{node.name} is written by {kind} before {reader.name}"


def _other_dtype(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A value goes through another dtype, and back or not."""
    node = some(rng, [n for n in floating(module, values) if n.users])
    users = list(node.users)
    own = values[node.name].dtype
    there = rng.choice((torch.bfloat16, torch.float64, torch.float16))
    cast = last = insert(node, "to", node, there)
    if rng.random() < 0.7:
        last = insert(cast, "to", cast, own)
    for user in users if rng.random() < 0.5 else [rng.choice(users)]:
        user.replace_input_with(node, last)
    return f"{node.name} goes through {there}"


def _one_bias(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One linear gains a bias."""
    called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
    found: list[Any] = [
        (name, m)
        for name, m in module.named_modules()
        if name in called and isinstance(m, nn.Linear) and m.bias is None
    ]
    found += [
        (n.name, n) for n in module.graph.nodes if n.target in LINEARS and len(n.args) == 2 and not n.kwargs
    ]
    name, linear = some(rng, found)
    if isinstance(linear, Node):
        bias = nn.Parameter(torch.ones(values[linear.name].shape[-1]), requires_grad=False)
        module.register_parameter(f"{name}_bias", bias)
        with module.graph.inserting_before(linear):
            linear.args = (*linear.args, module.graph.get_attr(f"{name}_bias"))
    else:
        linear.bias = nn.Parameter(torch.ones_like(linear.weight[:, 0]), requires_grad=False)
    return f"{name} has a bias"


def _tied(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Two linears have one weight, or weights in overlapping memory."""
    weights = [(m, getattr(m, "weight", None)) for m in module.modules()]
    owners: list[Any] = [m for m, weight in weights if isinstance(weight, nn.Parameter) and weight.dim() == 2]
    pairs = [(a, b) for a in owners for b in owners if a is not b and len(a.weight) >= len(b.weight)]
    a, b = some(rng, [(a, b) for a, b in pairs if a.weight.shape[1] == b.weight.shape[1]])
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
    a, b = some(rng, pairs)
    a.target = b.target
    return f"{a.name} reads {b.target}"


def _computed_weight(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A weight is scaled before it is used."""
    node = some(rng, [n for n in module.graph.find_nodes(op="get_attr") if n.users])
    users = list(node.users)
    scaled = insert(node, "mul", node, 2)
    for user in users:
        user.replace_input_with(node, scaled)
    return f"{node.name} is scaled"


def _dropped(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A call is left out where its input has its shape."""
    found = [
        (n, source)
        for n in floating(module, values)
        if is_call(n)
        for source in n.all_input_nodes
        if isinstance(values.get(source.name), Tensor)
        and values[source.name].shape == values[n.name].shape
        and values[source.name].dtype == values[n.name].dtype
    ]
    node, source = some(rng, found)
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
    **UNUSUAL,
    **SHARED_MEMORY,
}
