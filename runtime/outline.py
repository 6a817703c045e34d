"""Repeated layers are worked on once: a graph is cut at its layers, and equal pieces share what is made.

A decoder of 24 layers has two or three distinct ones. A piece takes its layer's weights and caches as inputs,
so that what is compiled for one layer serves every layer of the same structure. The graph is one of Dynamo's
or one in normal form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxfuse.passes.storage_writes import storage_of, storages, written_by
from fxfuse.patterns import ops

# What a compiled piece can be given: a list of tensors, say, cannot cross a boundary.
CARRIED = (torch.Tensor, torch.SymInt, int, float, bool)
CALLS = ("call_function", "call_method", "call_module", "get_attr")
Compile = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Piece:
    """A run of nodes as a graph of its own: what it reads from before it, and what is read after it.

    `structure` numbers the symbols of its sizes in the order of `symbols`; `layer` is that of its first node
    that is in one.
    """

    graph_module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    structure: str
    symbols: tuple[Any, ...]
    layer: tuple[str, int] | None


def value_of(node: Node) -> Any:
    """What a node stands for, as tracing or as Dynamo has recorded it."""
    return node.meta.get("val", node.meta.get("example_value"))


def layer_of(node: Node) -> tuple[str, int] | None:
    """The outermost numbered module that a node was traced in, as path and number; None outside of any.

    What computes a parametrised weight has a number, but is no layer.
    """
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if "parametrizations" in path:
            return None
        number = re.search(r"(?:\.|\[')_?(\d+)(?:'\]|\.|$)|\[(\d+)\]", path)
        if number:
            return path[: number.start()], int(number[1] or number[2])
    return None


def segments(graph: Graph) -> list[list[Node]]:
    """The call nodes in runs of one layer each: before the first, the layers of each stack, after them."""
    unused = [n for n in graph.nodes if not n.users and isinstance(value_of(n), torch.SymInt)]
    calls = [node for node in graph.nodes if node.op in CALLS and node not in unused]
    layers = [layer_of(node) for node in calls]
    place_of = {layer: i for i, layer in enumerate(dict.fromkeys(x for x in layers if x is not None))}
    runs: list[list[Node]] = [[]]
    current = -1
    for node, layer in zip(calls, layers, strict=True):
        after = layer is None and node.meta.get("nn_module_stack") and current == len(place_of) - 1
        place = len(place_of) if after else current if layer is None else max(current, place_of[layer])
        if place != current:
            runs.append([])
            current = place
        runs[-1].append(node)
    return _with_shared_views_early([run for run in runs if run])


def _with_shared_views_early(runs: list[list[Node]]) -> list[list[Node]]:
    """Views and sizes that several runs read move to the run that their input is from.

    The first layer that needs one would compute it for the others, and be the only layer of its structure.
    """
    run_of = {node: i for i, run in enumerate(runs) for node in run}
    early: set[Node] = set()
    for node in reversed([node for run in runs for node in run]):
        shared = len({run_of.get(user, len(runs)) for user in node.users}) > 1
        if (shared or not early.isdisjoint(node.users)) and _is_view_or_size(node):
            early.add(node)
    for node in [node for run in runs for node in run if node in early]:
        run_of[node] = max((run_of.get(n, 0) for n in node.all_input_nodes), default=0)
    moved: list[list[Node]] = [[] for _ in runs]
    for node in (node for run in runs for node in run):
        moved[run_of[node]].append(node)
    return [run for run in moved if run]


def _is_view_or_size(node: Node) -> bool:
    """Whether a call reads no memory, so that writes before it make no difference: a reshape may copy."""
    if isinstance(value_of(node), torch.SymInt):
        return not isinstance(node.target, OpOverload) or str(node.target).startswith("aten.sym_")
    return str(node.target) in ops.VIEWS and storage_of(node) == storage_of(node.all_input_nodes[0])


def repeats(graph_module: GraphModule) -> bool:
    """Whether there is more than one numbered layer."""
    return len(segments(graph_module.graph)) > 2


def cut(graph_module: GraphModule, looks: Callable[[Node], str] = lambda placeholder: "") -> list[Piece]:
    """The graph at its layers; as one piece where something would cross a boundary that cannot.

    That is everything but `CARRIED`, and values that share memory with another input of a piece which writes
    to it: AOTAutograd calls such a function by the tensor that both are views of, which is another one here.
    `looks` adds to the structure what else distinguishes an input of the graph.
    """
    pieces = [piece_of(graph_module, run, looks) for run in segments(graph_module.graph)]
    carried = all(isinstance(value_of(n), CARRIED) for piece in pieces for n in piece.inputs)
    if not carried or any(map(_may_write_to_shared_memory, pieces)):
        return [piece_of(graph_module, [n for n in graph_module.graph.nodes if n.op in CALLS], looks)]
    return pieces


def _may_write_to_shared_memory(piece: Piece) -> bool:
    """Whether a computed input shares memory with another one that may be written to: Dynamo does not say."""
    readers: dict[int, list[Node]] = {}
    for node in piece.inputs:
        for storage in storages(value_of(node)):
            readers.setdefault(storage, []).append(node)
    shared = {
        storage
        for storage, nodes in readers.items()
        if len(nodes) > 1 and any(node.op != "placeholder" for node in nodes)
    }
    if not shared or any("val" not in node.meta for node in piece.inputs):
        return bool(shared)
    written = (storage_of(n) for node in piece.graph_module.graph.nodes for n in written_by(node))
    return not shared.isdisjoint(written)


def piece_of(program: GraphModule, run: Sequence[Node], looks: Callable[[Node], str]) -> Piece:
    """The nodes of a run as a graph whose placeholders are in the order of their first use."""
    inside = set(run)
    read = dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in inside)
    inputs = tuple(dict.fromkeys((*_sizes_of(run, read), *read)))
    outputs = tuple(node for node in run if any(user not in inside for user in node.users))
    graph = Graph()
    copies: dict[Node, Node] = {}
    for i, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"in_{i}")
        copies[node].meta["val"] = value_of(node)
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    names = {str(symbol): symbol for symbol in _symbols_in((*inputs, *run))}
    used: dict[str, str] = {}

    def numbered(found: re.Match[str]) -> str:
        return used.setdefault(found[0], f"s{len(used)}") if found[0] in names else found[0]

    structure = re.sub(r"\bs\d+\b", numbered, _structure(graph, program))
    structure = "\n".join([structure, *(looks(node) for node in inputs)])
    layer = next((found for node in run if (found := layer_of(node)) is not None), None)
    symbols = tuple(names[n] for n in used)
    return Piece(GraphModule(program, graph), inputs, outputs, structure, symbols, layer)


def _symbolic_sizes(nodes: Iterable[Node]) -> Iterator[torch.SymInt]:
    for value in (leaf for node in nodes for leaf in tree_leaves(value_of(node))):
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        yield from (n for n in sizes if isinstance(n, torch.SymInt))


def _symbols_in(nodes: Iterable[Node]) -> set[Any]:
    """The symbols in the sizes and strides of the nodes' values."""
    return {symbol for size in _symbolic_sizes(nodes) for symbol in size.node.expr.free_symbols}


def _sizes_of(run: Sequence[Node], read: Iterable[Node]) -> list[Node]:
    """The graph's size inputs that occur in the shapes of a run: a compiler binds symbols from those."""
    symbols = _symbols_in((*read, *run))
    found = []
    for node in run[0].graph.nodes:
        value = value_of(node)
        if node.op == "placeholder" and isinstance(value, torch.SymInt) and value.node.expr in symbols:
            found.append(node)
    return found


def _structure(graph: Graph, program: GraphModule) -> str:
    """Everything that a compilation depends on: operators, arguments, and how the inputs look and alias."""
    number: dict[Node, str] = {}
    numbers: dict[int, int] = {}
    lines = []
    for i, node in enumerate(graph.nodes):
        number[node] = f"%{i}"
        args = map_arg((node.args, tuple(sorted(node.kwargs.items()))), lambda n: _Name(number[n]))
        if node.op == "placeholder":
            lines.append(f"{number[node]} {_look(value_of(node), numbers)}")
        elif node.op == "get_attr":
            lines.append(f"{number[node]} constant {_content(_attribute(program, node.target))}")
        else:
            own = "" if isinstance(node.target, (str, OpOverload)) else id(node.target)
            lines.append(f"{number[node]} {node.op} {node.target} {own} {args}")
    return "\n".join(lines)


class _Name(str):
    """Prints as a reference, not as a string."""

    def __repr__(self) -> str:
        return str(self)


def _look(value: Any, numbers: dict[int, int]) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value}"
    memory = numbers.setdefault(next(iter(storages(value)), id(value)), len(numbers))
    return (
        f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()} {value.storage_offset()} "
        f"{value.requires_grad} {value.is_conj()} {value.is_neg()} @{memory}"
    )


def _content(constant: Any) -> str:
    """Small constants are told apart by what they hold; others, and the caller's, by their identity."""
    own = torch._dynamo.utils.get_static_address_type(constant) is None
    small = isinstance(constant, torch.Tensor) and constant.device.type == "cpu" and constant.numel() <= 16
    if own and small:
        return f"{constant.dtype} {tuple(constant.shape)} {constant.tolist()}"
    return f"{id(constant)}"


def _attribute(root: Any, target: Any) -> Any:
    for part in str(target).split("."):
        root = getattr(root, part)
    return root


def outlined(graph_module: GraphModule, compile_piece: Compile) -> Callable[..., Any]:
    """A callable for the graph, each distinct piece of it compiled once.

    `compile_piece` is given a graph and its example values, and returns a callable that returns a tuple.
    """
    pieces = cut(graph_module)
    compiled = shared(pieces, lambda piece: compile_piece(piece.graph_module, [*map(value_of, piece.inputs)]))
    return stitched(graph_module.graph, pieces, compiled)


def shared(
    pieces: Iterable[Piece],
    make: Callable[[Piece], Made],
    agree: Callable[[Piece, Piece], bool] = lambda piece, other: True,
) -> list[Made]:
    """For each piece what was made of it, or of an earlier one that serves it and agrees with it."""
    made: list[tuple[Piece, Made]] = []
    found = []
    for piece in pieces:
        result = next((m for other, m in made if serves(other, piece) and agree(other, piece)), None)
        if result is None:
            result = make(piece)
            made.append((piece, result))
        found.append(result)
    return found


def serves(compiled: Piece, piece: Piece) -> bool:
    """Whether what was compiled for one piece holds for another.

    Layers of one structure may have sizes of different symbols: each cache has a length of its own. A
    compiler relies on what is known of a symbol, so everything known of the one must hold for the other; to
    ask makes it a guard.
    """
    if compiled.structure != piece.structure:
        return False
    exchanged = {a: b for a, b in zip(compiled.symbols, piece.symbols, strict=True) if a != b}
    if not exchanged:
        return True
    shapes = next(_symbolic_sizes(piece.graph_module.graph.nodes)).node.shape_env
    return all(shapes.var_to_range[a] == shapes.var_to_range[b] for a, b in exchanged.items()) and all(
        shapes.evaluate_expr(guard.expr.xreplace(exchanged))
        for guard in list(shapes.guards)
        if not exchanged.keys().isdisjoint(guard.expr.free_symbols)
    )


def stitched(
    graph: Graph,
    pieces: Sequence[Piece],
    calls: Sequence[Callable[..., Any]],
    added: Sequence[Sequence[int]] = (),
) -> Callable[..., Any]:
    """One straight line of Python that calls the pieces and lets go of every value after its last use.

    With `added` it takes more arguments than the graph has inputs: each piece gets those of these numbers,
    after its own.
    """
    last_use = {node: i for i, piece in enumerate(pieces) for node in piece.inputs}
    output = graph.find_nodes(op="output")[0]
    kept = set(output.all_input_nodes)
    name = {node: _Name(f"v{i}") for i, node in enumerate(graph.nodes)}
    constants: dict[str, Any] = {}

    def spelled(value: Any) -> Any:
        if isinstance(value, Node):
            return name[value]
        if isinstance(value, (list, tuple)):
            items = ", ".join(str(spelled(v)) for v in value)
            return f"[{items}]" if isinstance(value, list) else f"({items},)" if value else "()"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {spelled(v)}" for key, v in value.items()) + "}"
        constants[f"constant_{len(constants)}"] = value
        return f"constant_{len(constants) - 1}"

    names = [*(name[node] for node in graph.find_nodes(op="placeholder")), *(["*added"] if added else [])]
    lines = [f"def run({', '.join(names)}):"]
    for i, piece in enumerate(pieces):
        own = [f"added[{number}]" for number in added[i]] if added else []
        arguments = ", ".join([*(name[node] for node in piece.inputs), *own])
        targets = "".join(f"{name[node]}, " for node in piece.outputs)
        lines.append(f"    {f'{targets}= ' if targets else ''}call_{i}({arguments})")
        done = [
            name[n] for n in (*piece.inputs, *piece.outputs) if last_use.get(n, -1) == i and n not in kept
        ]
        if done:
            lines.append(f"    del {', '.join(done)}")
    lines.append(f"    return {spelled(output.args[0])}")
    scope: dict[str, Any] = {f"call_{i}": call for i, call in enumerate(calls)} | constants
    exec("\n".join(lines), scope)
    return scope["run"]
