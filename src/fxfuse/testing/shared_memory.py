"""Changes of what lies in one memory: tensors turned in place, what is detached, copies that are written."""

import random
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from fxfuse.testing.graph_edits import (
    Values,
    added_output,
    insert,
    read_instead,
    readable,
    some,
    written,
)

__all__ = ["SHARED_MEMORY"]


def _turned_in_place(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A value, a copy or a view of it gets other sizes in place, and turns back or is read as it is then."""
    node = some(rng, readable(module, values))
    shape = values[node.name].shape
    ones = [dim for dim, size in enumerate(shape) if size == 1]
    kind = rng.choice(
        ["transpose_", "swapdims_", "unsqueeze_"] + ["t_"] * (len(shape) == 2) + ["squeeze_"] * bool(ones)
    )
    what = rng.choice(("itself", "a copy", "a view"))
    first = node
    if what == "a copy":
        first = insert(node, "clone", node)
    elif what == "a view":
        first = insert(node, "narrow", node, 0, 0, shape[0])
    there: tuple[Any, ...]
    back: tuple[Any, ...]
    if kind in ("transpose_", "swapdims_"):
        there = back = (kind, rng.randrange(len(shape)), rng.randrange(len(shape)))
    elif kind == "t_":
        there = back = (kind,)
    else:
        dim = rng.choice(ones) if kind == "squeeze_" else rng.randrange(len(shape) + 1)
        there, back = (kind, dim), ("unsqueeze_" if kind == "squeeze_" else "squeeze_", dim)
    last = written(first, there[0], first, *there[1:])
    turns_back = rng.random() < 0.6
    if turns_back:
        last = written(last, back[0], last, *back[1:])
    if not turns_back and rng.random() < 0.5:
        added_output(module, last)
    elif first is not node:
        read_instead(rng, node, last, first)
    return f"{node.name}: {what} is turned by {kind}{' and back' if turns_back else ''}"


def _detached(module: GraphModule, values: Values, rng: random.Random) -> str:
    """A view of what was detached is read, written, an output, or of memory that is filled later."""
    node = some(rng, readable(module, values))
    shape, kind = values[node.name].shape, rng.choice(("read", "written", "an output", "filled later"))
    dim = rng.randrange(len(shape))
    made = insert(node, rng.choice(("empty_like", "zeros_like")), node) if kind == "filled later" else node
    detached = insert(made, "detach", made)
    whole = rng.random() < 0.5
    view = insert(detached, "narrow", detached, dim, 0, shape[dim] if whole else min(1, shape[dim]))
    if kind == "read" and whole:
        read_instead(rng, node, view, detached)
    elif kind == "written":
        written(view, rng.choice(("mul_", "add_")), view, 2)
    elif kind == "filled later":
        stored = written(view, "copy_", made, node)
        readers = [user for user in node.users if user > stored]
        for reader in readers[: rng.choice((1, len(readers)))]:
            reader.replace_input_with(node, stored)
        added_output(module, insert(stored, "mul", view, 3))
        added_output(module, stored) if rng.random() < 0.5 else None
    else:
        added_output(module, view if rng.random() < 0.5 else insert(view, "mul", view, 3))
    return f"{node.name}: {'all' if whole else 'a part'} of it, detached, is {kind}"


def _written_copy(module: GraphModule, values: Values, rng: random.Random) -> str:
    """Weights, caches or values are copied; the copy, or what was copied, is written before it is read."""
    node = some(rng, [n for n in module.graph.nodes if n.users and _is_floating(values.get(n.name))])
    shape = values[node.name].shape
    kind, readers = rng.choice(("clone", "repeat", "transposed", "rows")), list(node.users)
    if kind == "transposed":
        turned = insert(node, "transpose", node, 0, -1)
        made = insert(turned, "clone", turned)
        copy = insert(made, "transpose", made, 0, -1)
    elif kind == "rows":
        rows = insert(node, "arange", shape[0])
        copy = insert(max(rows, node), "index_select", node, 0, rows)
    else:
        copy = insert(node, kind, node, *([[1] * len(shape)] if kind == "repeat" else []))
    for reader in readers if rng.random() < 0.7 else [rng.choice(readers)]:
        reader.replace_input_with(node, copy)
    what = rng.choice(("the copy", "the copy", "what was copied"))
    target = copy if what == "the copy" else node
    before = max(rng.choice(readers).prev, copy)
    if rng.random() < 0.5:
        dim = rng.randrange(len(shape))
        target = insert(before, "narrow", target, dim, rng.randrange(shape[dim]), 1)
        before = target
    written(before, rng.choice(("mul_", "add_", "fill_")), target, 2)
    return f"{node.name}: copied by {kind}, {what} is written"


def _is_floating(value: object) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and 0 not in value.shape
    )


SHARED_MEMORY: dict[str, Callable[[GraphModule, Values, random.Random], str]] = {
    "turned in place": _turned_in_place,
    "a view of what is detached": _detached,
    "a copy that is written": _written_copy,
}
