"""What a rewrite did to each kind of block, kept as data: the boxes to draw of its graph before and after."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from fxfuse.passes.outcome import Match
from fxfuse.passes.program import Program, module_path

# Move elements of their first input, or hand it back: drawn as a line, unless a pass has put them there.
_QUIET = frozenset(
    {
        "alias",
        "arange",
        "chunk",
        "clone",
        "contiguous",
        "detach",
        "detach_",
        "dropout",
        "empty",
        "expand",
        "flatten",
        "full",
        "getitem",
        "lift_fresh_copy",
        "lift_fresh",
        "narrow",
        "new_ones",
        "new_zeros",
        "ones",
        "permute",
        "reshape",
        "scalar_tensor",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "t",
        "to",
        "transpose",
        "type_as",
        "unbind",
        "unflatten",
        "unsafe_chunk",
        "unsqueeze",
        "view",
        "_unsafe_view",
        "zeros",
        "zeros_like",
        "sym_size",
        "sym_constrain_range_for_size",
        "_assert_scalar",
        "_assert_tensor_metadata",
    }
)
# Read a shape and no values: a line ends here.
_SHAPE_ONLY = frozenset({"new_ones", "new_zeros", "sym_size", "zeros_like"})


@dataclass(frozen=True)
class Box:
    """One operation: its name in the graph, the operator, what it computes with, and what it reads.

    `changed` says that only one of the two graphs has it; `outside` that it is not part of the block.
    """

    name: str
    operator: str
    detail: str
    inputs: tuple[str, ...]
    changed: bool = False
    outside: bool = False


@dataclass(frozen=True)
class Picture:
    """The same kind of block in one kind of graph, before and after."""

    block: str
    phase: str
    before: tuple[Box, ...]
    after: tuple[Box, ...]


def pictures(before: Program, after: Program, matches: Iterable[Match], phase: str) -> list[Picture]:
    """One picture for each kind of block that a match lies in: of the first block of that kind.

    A block is a module of a numbered layer (`model.layers.0.mlp`), elsewhere the matched module itself, or
    the one around it where the match is named after a merged weight.
    """
    paths = [_paths(program) for program in (before, after)]
    modules = set(paths[0].values())
    units: dict[str, str] = {}
    for match in matches:
        unit = _unit(match.where, modules)
        units.setdefault(re.sub(r"(?<![^.])\d+(?=\.|$)", "*", unit), unit)
    if not units:
        return []
    names = [{node.name for node in program.graph.nodes} for program in (before, after)]
    found = []
    for kind, unit in units.items():
        sides = [
            _boxes(program, path, unit, names[not i])
            for i, (program, path) in enumerate(zip((before, after), paths, strict=True))
        ]
        if any(box.changed for side in sides for box in side):
            found.append(Picture(kind, phase, *sides))
    return found


def _unit(where: str, modules: set[str]) -> str:
    inside = re.match(r"((?:.*?\.)?\d+\.[^.]+)", where)
    unit = inside[1] if inside else where
    return unit if any(_lies_in(path, unit) for path in modules) else unit.rpartition(".")[0]


def _lies_in(path: str, unit: str) -> bool:
    """Whether a module is the unit or below it; the unit without a name is the root with its own modules."""
    return f".{unit}." in f".{path}." if unit else "." not in path


def _paths(program: Program) -> dict[Node, str]:
    """The module that each node was traced in, else that of its weight, else that of the next node."""
    found: dict[Node, str] = {}
    last = ""
    for node in reversed(program.graph.nodes):
        own = next(iter(_weights_of(program, node)), "")
        last = module_path(node) or own or last
        found[node] = last
    return found


def _boxes(program: Program, paths: Mapping[Node, str], unit: str, others: set[str]) -> tuple[Box, ...]:
    inside = {
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and (_lies_in(paths[node], unit) or any(_lies_in(name, unit) for name in _weights_of(program, node)))
    }
    drawn = {node for node in inside if _is_drawn(node, others)}
    boxes = {n: _box(program, n, drawn, n.name not in others) for n in program.graph.nodes if n in drawn}
    outside: dict[str, Box] = {}
    for node in drawn:
        for source in _sources(node, drawn):
            if source not in drawn and not _is_weight(program, source) and _has_tensors(source):
                outside.setdefault(source.name, Box(source.name, _short(source), "", (), outside=True))
    leaving = [
        Box(f"to_{user.name}", _short(user), "", (node.name,), outside=True)
        for node in boxes
        for user in _readers(node)
        if user not in inside and user.op in ("call_function", "output")
    ]
    known = {*outside, *(box.name for box in boxes.values())}
    own = [replace(box, inputs=tuple(i for i in box.inputs if i in known)) for box in boxes.values()]
    return (*outside.values(), *own, *{(box.operator, box.inputs): box for box in leaving}.values())


def _is_drawn(node: Node, others: set[str]) -> bool:
    if _short(node) not in _QUIET:
        return isinstance(node.meta.get("val"), (torch.Tensor, list, tuple))
    # of a layout that a pass computes in another way both sides are shown
    return node.name not in others and _short(node) in ("cat", "gather_features")


def _has_tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, (tuple, list)) or (isinstance(value, torch.Tensor) and value.dim() > 0)


def _is_weight(program: Program, node: Node) -> bool:
    return node.name in program.weights or program.fused_as(node) is not None


def _weights_of(program: Program, node: Node) -> list[str]:
    return [program.name_of(n) for n in node.all_input_nodes if _is_weight(program, n)]


def _box(program: Program, node: Node, drawn: set[Node], changed: bool) -> Box:
    named = _weights_of(program, node)
    value = node.meta.get("val")
    shape = f"[{', '.join(map(str, value.shape))}]" if isinstance(value, torch.Tensor) else ""
    weight = ".".join(named[0].split(".")[-1:]) if named else ""
    inputs = tuple(dict.fromkeys(source.name for source in _sources(node, drawn)))
    return Box(node.name, _short(node), " ".join(filter(None, (weight, shape))), inputs, changed)


def _sources(node: Node, drawn: set[Node]) -> list[Node]:
    """The drawn nodes, or those outside, that a node reads through what is not drawn."""
    found: dict[Node, None] = {}
    waiting = list(reversed(node.all_input_nodes))
    seen = set(waiting)
    while waiting:
        source = waiting.pop()
        if source not in drawn and _is_quiet(source):
            fresh = [n for n in _moved(source) if n not in seen]
            seen.update(fresh)
            waiting += reversed(fresh)
        else:
            found.setdefault(source)
    return list(found)


def _readers(node: Node) -> list[Node]:
    """Who reads a node, through what is not drawn."""
    found: dict[Node, None] = {}
    waiting = [(node, user) for user in node.users]
    seen = set(waiting)
    while waiting:
        source, user = waiting.pop()
        if not _is_quiet(user) or not user.users:
            found.setdefault(user)
        elif source in _moved(user):
            fresh = [(user, n) for n in user.users if (user, n) not in seen]
            seen.update(fresh)
            waiting += fresh
    return list(found)


def _is_quiet(node: Node) -> bool:
    return node.op == "call_function" and _short(node) in _QUIET


def _moved(node: Node) -> list[Node]:
    """Whose elements a quiet operation moves; its other inputs give it a dtype or a size."""
    return [] if _short(node) in _SHAPE_ONLY else node.all_input_nodes[:1]


def _short(node: Node) -> str:
    """`aten.linear.default` to `linear`; a placeholder's own name."""
    if node.op != "call_function":
        return "result" if node.op == "output" else "input"
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))
