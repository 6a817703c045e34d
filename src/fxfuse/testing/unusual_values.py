"""Changes with what language models seldom compute with: complex numbers, limits, autocast, shared memory."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxfuse.testing.graph_edits import (
    ImpossibleError,
    Values,
    added_output,
    floating,
    insert,
    instead,
    is_call,
    read_instead,
    readable,
    some,
    written,
)

__all__ = ["UNUSUAL"]


def _compared_in_place(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A copy becomes truth values that keep its dtype."""
    node = some(rng, readable(module, values))
    copy = insert(node, "clone", node)
    kind = rng.choice(("lt_", "ge_", "eq_", "logical_not_", "logical_and_", "sign_"))
    more = {"logical_and_": (node,), "logical_not_": (), "sign_": ()}.get(kind, (rng.choice((0, 0.5, 1)),))
    done = written(copy, kind, copy, *more)
    kept = insert(done, "sub", done, rng.choice((0, 0.5)))
    read_instead(rng, node, kept, copy)
    return f"{node.name} is compared by {kind}"


def _complex(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Pairs of elements are complex numbers for a while, as in a rotation by angles."""
    pairs = [n for n in readable(module, values) if values[n.name].shape[-1] % 2 == 0]
    node = some(rng, [n for n in pairs if values[n.name].dtype == torch.float32])
    shape = list(values[node.name].shape)
    first = insert(node, "reshape", node, [*shape[:-1], shape[-1] // 2, 2])
    number = insert(first, "view_as_complex", first)
    conjugate = insert(number, "_conj", number)
    kind = rng.choice(
        ("times its conjugate", "conjugate", "twice conjugate", "imaginary part of the conjugate")
    )
    if kind == "times its conjugate":
        last = insert(conjugate, "mul", number, conjugate)
    elif kind == "conjugate":
        last = insert(conjugate, "mul", conjugate, rng.choice((1, 2)))
    elif kind == "twice conjugate":
        last = insert(conjugate, "_conj", conjugate)
    else:
        real, imaginary = insert(conjugate, "real", conjugate), insert(conjugate, "imag", conjugate)
        last = insert(max(real, imaginary), "complex", real, imaginary)
    plain = insert(last, "resolve_conj", last)
    parts = insert(plain, "view_as_real", plain)
    back = insert(parts, "reshape", parts, shape)
    read_instead(rng, node, back, first)
    return f"{node.name}: {kind}"


def _negative_view(module: GraphModule, values: Values, rng: random.Random) -> str:
    """The negative of a value without a copy, or by one that is written before it is undone."""
    node = some(rng, readable(module, values))
    first = insert(node, rng.choice(("_neg_view", "neg")), node)
    kind = rng.choice(("read", "undone", "written"))
    last = first
    if kind == "written":
        part = insert(first, "select", first, 0, 0)
        last = insert(part, "fill_", part, 5.0)
    again = ("mul", first, rng.choice((1, 2))) if kind == "read" else ("neg", first)
    last = insert(last, *again)
    read_instead(rng, node, last, first)
    return f"{node.name}: its negative is {kind}"


def _between(sizes: Tensor, share: float) -> float:
    """Larger than about that share of the sizes, and none of them: rounding takes nothing across it."""
    ordered = sizes.unique()
    last = int(share * (len(ordered) - 1))
    above = ordered[last + 1] if last + 1 < len(ordered) else 2 * ordered[last]
    return float(ordered[last] + above) / 2


def _limited(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Large values are cut off, where an input may be larger than any that a block is written for."""
    node = some(rng, [n for n in readable(module, values) if values[n.name].numel()])
    larger = rng.choice((1, 1, 16))
    given = some(rng, [n for n in floating(module, values) if n.op == "placeholder" and n.users])
    limit = max(_between(values[node.name].abs().double(), rng.choice((0.5, 0.8))), 0.5) * larger
    kind = rng.choice(("clamp", "clamp_max", "clamp_min", "masked_fill", "mul"))
    if kind == "clamp":
        first = last = insert(node, kind, node, -limit, limit)
    elif kind in ("clamp_max", "clamp_min"):
        first = last = insert(node, kind, node, limit if kind == "clamp_max" else -limit)
    else:
        first = insert(node, "lt" if kind == "mul" else "gt", node, limit)
        last = insert(first, kind, node, first, *((0.0,) if kind == "masked_fill" else ()))
    node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in (first, last))
    if larger > 1:
        scaled = insert(given, "mul", given, larger)
        instead(given, scaled, scaled)
    return f"{node.name}: {kind} beyond {limit:.3g}"


def _autocast(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Some calls in a row run under autocast."""
    calls = [node for node in module.graph.nodes if is_call(node)]
    first = some(rng, calls)
    rest = [node for node in calls if node >= first]
    last = rng.choice(rest[: rng.choice((3, len(rest)))])
    with module.graph.inserting_before(first):
        entered = module.graph.call_function(
            torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, False)
        )
    with module.graph.inserting_after(last):
        module.graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    return f"{first.name} to {last.name} under autocast"


def _linears(module: GraphModule) -> list[Node]:
    targets = (F.linear, torch.ops.aten.linear.default)
    found = [n for n in module.graph.nodes if n.target in targets and len(n.args) >= 2 and not n.kwargs]
    modules = dict(module.named_modules())
    return found + [
        n for n in module.graph.nodes if n.op == "call_module" and type(modules[n.target]) is nn.Linear
    ]


def _batched_weight(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A linear becomes a product with a batch of its weight."""
    node = some(rng, _linears(module))
    x: Any = node.args[0]
    if values[x.name].dim() not in (2, 3):
        raise ImpossibleError
    if node.op == "call_module":
        with module.graph.inserting_before(node):
            weight: Any = module.graph.get_attr(f"{node.target}.weight")
    else:
        weight = node.args[1]
    turned = insert(node.prev, "t", weight)
    made = insert(turned, "unsqueeze", turned, 0)
    rows, columns = values[node.name].shape[-1], values[x.name].shape[-1]
    count = rng.choice((1, values[x.name].shape[0])) if values[x.name].dim() == 3 else rng.choice((1, 3))
    if count > 1 or rng.random() < 0.5:
        made = insert(made, "expand", made, [count, columns, rows])
    product = insert(made, "matmul", x, made)
    if values[x.name].dim() == 2:
        product = insert(product, "sum", product, [0])
    node.replace_all_uses_with(product)
    module.graph.erase_node(node)
    return f"{node.name}: {count} times the weight"


def _written_constant(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A tensor made in the graph is written before it is used."""
    node = some(rng, readable(module, values))
    value, kind = values[node.name], rng.choice(("arange", "ones_like", "new_zeros", "full"))
    last = value.shape[-1]
    if kind == "arange":
        made = insert(node.prev, "arange", last)
        part = insert(made, "select", made, 0, 0)
        write = insert(part, "fill_", part, last - 1)
        used = insert(max(write, node), "index_select", node, -1, made)
    else:
        made = (
            insert(node, "full", [last], 2.0)
            if kind == "full"
            else insert(node, kind, node, *(([last],) if kind == "new_zeros" else ()))
        )
        part = insert(made, "narrow", made, 0, 0, 1)
        write = insert(part, rng.choice(("fill_", "add_", "mul_")), part, 3)
        used = insert(write, "mul", node, made)
    readers = [user for user in node.users if user > used and user is not used]
    for reader in readers if rng.random() < 0.5 else readers[:1]:
        reader.replace_input_with(node, used)
    if not readers:
        added_output(module, used)
    return f"{node.name} meets a written {kind}"


def _shared_outputs(module: GraphModule, values: Values, rng: random.Random) -> str:
    """An output, and a view of it, or itself once more; both may be written at the end."""
    (output,) = module.graph.find_nodes(op="output")
    node = some(rng, [n for n in floating(module, values) if values[n.name].dim()])
    kind = rng.choice(("itself", "a part", "a transpose", "a detached part"))
    before, shown = output.prev, node
    if kind != "itself":
        shown = (
            insert(before, "narrow", node, 0, 0, 1)
            if "part" in kind
            else insert(before, "transpose", node, 0, -1)
        )
    if kind == "a detached part":
        shown = insert(shown, "detach", shown)
    if rng.random() < 0.5:
        insert(output.prev, rng.choice(("add_", "mul_")), shown, 2)
    added_output(module, node)
    added_output(module, shown)
    return f"{node.name} and {kind} are outputs"


def _stride_zero(module: GraphModule, values: Values, rng: random.Random) -> str:
    """One row stands for all of them, in memory once."""
    node = some(rng, [n for n in readable(module, values) if values[n.name].shape[0] > 0])
    shape, dim = list(values[node.name].shape), rng.randrange(values[node.name].dim())
    if not shape[dim]:
        raise ImpossibleError
    first = insert(node, "narrow", node, dim, 0, 1)
    last = insert(first, "expand", first, shape)
    read_instead(rng, node, last, first)
    return f"{node.name}: one for all along {dim}"


def _nothing_of_it(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A part without elements is joined to a value, or goes its way beside it."""
    node = some(rng, readable(module, values))
    dim = rng.randrange(values[node.name].dim())
    first = insert(node, "narrow", node, dim, 0, 0)
    if rng.random() < 0.5:
        last = insert(first, "cat", rng.choice(([first, node], [node, first])), dim)
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in (first, last))
    else:
        added_output(module, insert(first, "mul", first, 2))
    return f"{node.name}: nothing along {dim}"


def _counts(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Whole numbers meet a neutral number of another type, which makes them floating."""
    node = some(rng, readable(module, values))
    truth = insert(node, "gt", node, 0)
    counts = last = insert(truth, "to", truth, rng.choice((torch.int64, torch.int32)))
    if rng.random() < 0.5:
        counts = last = written(counts, "cumsum_", counts, 0)
    kind, number = rng.choice(
        (("mul", 1.0), ("add", 0.0), ("rsub", 0.0), ("div", 1), ("sub", 0.0), ("mul", 1))
    )
    last = insert(last, kind, last, number)
    used = insert(last, "mul", node, last)
    added_output(module, last) if rng.random() < 0.5 else None
    node.replace_all_uses_with(used, delete_user_cb=lambda user: user not in (truth, used))
    return f"{node.name} times counts by {kind} {number}"


def _read_by_strides(module: GraphModule, values: Values, rng: random.Random) -> str:
    """What lies first in memory is an output: it depends on how a value is laid out."""
    found = [n for n in floating(module, values) if is_call(n) and values[n.name].numel() > 3]
    node = some(rng, [n for n in found if values[n.name].dim() > 1])
    kind, last = rng.choice(("itself", "a product", "a cast", "a transposed copy")), node
    if kind == "a product":
        last = insert(node, "mul", node, 2)
    elif kind == "a cast":
        last = insert(node, "to", node, torch.float64)
    elif kind == "a transposed copy":
        turned = insert(node, "transpose", node, 0, -1)
        flat = insert(turned, "reshape", turned, [-1])
        square = insert(flat, "reshape", flat, [2, -1] if values[node.name].numel() % 2 == 0 else [1, -1])
        last = insert(square, "mul", square, 2)
    added_output(module, insert(last, "as_strided", last, [3], [1], 0))
    return f"{node.name}: {kind} is read by strides"


def _overlapping(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A call writes its result to memory made for it, or to that of a value that is read before."""
    node = some(rng, readable(module, values))
    empty = insert(node, rng.choice(("empty_like", "ones_like", "clone")), node)
    made = insert(empty, rng.choice(("relu", "abs", "neg")), node)
    stored = written(made, "copy_", empty, made)
    used = insert(stored, "add", stored, empty)
    readers = [user for user in node.users if user > used]
    for reader in readers[: rng.choice((1, len(readers)))]:
        reader.replace_input_with(node, used)
    if not readers:
        added_output(module, used)
    return f"{node.name}: stored, then read twice"


UNUSUAL: dict[str, Callable[[GraphModule, Values, random.Random], str]] = {
    "a comparison in place": _compared_in_place,
    "complex numbers": _complex,
    "a negative without a copy": _negative_view,
    "a limit": _limited,
    "an autocast region": _autocast,
    "a batch of one weight": _batched_weight,
    "a constant that is written": _written_constant,
    "outputs in one memory": _shared_outputs,
    "one row for all": _stride_zero,
    "a part without elements": _nothing_of_it,
    "counts": _counts,
    "memory read by strides": _read_by_strides,
    "a result that is stored": _overlapping,
}
