"""A captured graph as the parts that are worked on: each of its distinct layers once, or the whole.

Tracing, the normal form and the passes cost as much for every layer of a kind as for the first, and find the
same. Layers that are written alike are found on Dynamo's graph, before any of that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import FusedWeight, Program, Weight, dotted_path
from fxfuse.passes.weights.plan import WeightPlan
from fxfuse.patterns import ops
from fxfuse.runtime import capture, outline
from fxfuse.runtime.outline import Piece
from fxfuse.runtime.pictures import Picture, pictures

# What changes a tensor's own shape, memory or history: Dynamo has recorded its inputs as they are afterwards.
REMADE = frozenset(
    {
        "_set_data_attr",
        "as_strided_",
        "detach_",
        "rename_",
        "requires_grad_",
        "resize_",
        "resize_as_",
        "set_",
        "squeeze_",
        "swapaxes_",
        "swapdims_",
        "t_",
        "transpose_",
        "unsqueeze_",
    }
)
LINEARS = frozenset({"linear", "matmul", "mm", "addmm", "bmm", "einsum"})


class Untraceable(Exception):
    """A part holds values that tracing cannot look into."""


@dataclass(frozen=True)
class Part:
    """One piece of a captured graph before and after the passes, and what each of them did."""

    given: Program
    rewritten: Program
    outcomes: dict[str, Outcome]
    piece: Piece | None = None


@dataclass(frozen=True)
class Use:
    """Where a part stands in the captured graph: its inputs there, and what its names are there."""

    part: Part
    inputs: tuple[Node, ...]
    renamed: Callable[[str], str]


@dataclass(frozen=True)
class Filled:
    """An input that passes have added: how it is filled, and from which inputs of the captured graph."""

    fused: FusedWeight
    names: tuple[str, ...]
    members: tuple[Node, ...]


class Rewriting:
    """What the passes make of one captured graph.

    Raises Untraceable where a part has constants that cannot be traced.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        inputs: Sequence[Any],
        weights: Mapping[Node, Weight],
        passes: Sequence[pipeline.Pass],
        *,
        copy_weights: bool,
        by_layer: bool,
        round_beta: bool = False,
    ) -> None:
        """`by_layer` allows to work on each distinct layer once, where the graph is one that can be cut."""
        self.graph_module = graph_module
        self._inputs = list(inputs)
        self._weights = weights
        self._passes = passes
        self._copy_weights = copy_weights
        self._round_beta = round_beta
        self._fakes = capture.Fakes(graph_module, inputs)
        self._pieces: list[Piece] = []
        self.uses: list[Use] = []
        if by_layer and _can_be_cut(graph_module):
            self._cut()
        if not self.uses:
            self.uses = [Use(self._whole(), tuple(capture.placeholders(graph_module)), str)]
        self._number, self.filled = self._fused_inputs()

    def _cut(self) -> None:
        """Find the parts of the graph's layers; leaves none where nothing repeats or must not be cut."""
        pieces = outline.cut(self.graph_module, self._looks)
        alike = len({piece.structure for piece in pieces}) < len(pieces)
        if not alike or _crossed_by_unknown_sizes(pieces) or _read_by_linears_of_several(pieces):
            return
        try:
            parts = outline.shared(pieces, self._part, lambda *pair: self._renaming(*pair) is not None)
        except capture.Uncut:
            return
        uses = []
        for piece, part in zip(pieces, parts, strict=True):
            assert part.piece is not None
            renaming = self._renaming(part.piece, piece)
            assert renaming is not None
            uses.append(Use(part, piece.inputs, renaming))
        self._pieces, self.uses = pieces, uses
        if not self._agree():
            self._pieces, self.uses = [], []

    def _looks(self, node: Node) -> str:
        """What the passes ask of a parameter beyond its shape, dtype and strides."""
        weight = self._weights.get(node)
        return "" if weight is None else f"trainable {weight.trainable}, refused {weight.refusal}"

    def _part(self, piece: Piece) -> Part:
        fakes = [self._fakes.of(node) for node in piece.inputs]
        traced = capture.trace(piece.graph_module, fakes)
        return self._apply(traced, piece.inputs, fakes, piece)

    def _whole(self) -> Part:
        fakes = self._fakes.inputs()
        traced = capture.trace(self.graph_module, fakes)
        capture.carry_over(traced, self.graph_module)
        return self._apply(traced, capture.placeholders(self.graph_module), fakes, None)

    def _apply(
        self, traced: GraphModule, inputs: Sequence[Node], fakes: Sequence[Any], piece: Piece | None
    ) -> Part:
        if capture.untraced_parts(traced):
            raise Untraceable
        weights = {
            new.name: self._weights[old]
            for new, old in zip(capture.placeholders(traced), inputs, strict=True)
            if old in self._weights
        }
        mode = capture.mode_of(fakes)
        given = Program(
            traced,
            weights,
            mode,
            torch.is_grad_enabled(),
            copy_weights=self._copy_weights,
            round_beta=self._round_beta,
            inputs_train=any(isinstance(x, torch.Tensor) and x.requires_grad for x in fakes),
        )
        return Part(given, *pipeline.apply(given, self._passes), piece)

    def _renaming(self, piece: Piece, other: Piece) -> Callable[[str], str] | None:
        """From names in one piece to those in another of the same structure; None where there is no rule."""
        if piece is other:
            return str
        pairs = set()
        if piece.layer is not None and other.layer is not None:
            (path, number), (other_path, other_number) = piece.layer, other.layer
            pairs.add((f"{dotted_path(path)}.{number}", f"{dotted_path(other_path)}.{other_number}"))
        for old, new in zip(piece.inputs, other.inputs, strict=True):
            if old in self._weights and old is not new:
                pairs.add(_without_common_end(self._weights[old].name, self._weights[new].name))
        names = dict(pairs)
        if len(names) < len(pairs) or "" in names:
            return None
        if not names:
            return str
        longest_first = sorted(names, key=len, reverse=True)
        pattern = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, longest_first))})(?!\w)")

        def renamed(text: str) -> str:
            return pattern.sub(lambda found: names[found[1]], text)

        named = [(a, b) for a, b in zip(piece.inputs, other.inputs, strict=True) if a in self._weights]
        right = all(renamed(self._weights[a].name) == self._weights[b].name for a, b in named)
        return renamed if right else None  # not where one weight is in both

    def _agree(self) -> bool:
        """Whether no two parts have claimed one parameter for different memory."""
        claimed: dict[Node, tuple[Node, ...]] = {}
        return all(
            claimed.setdefault(member, members) == members
            for use in self.uses
            for fused, members in _filled_in(use)
            if fused.shares_memory
            for member in members
        )

    def _fused_inputs(self) -> tuple[list[list[int]], list[Filled]]:
        """The inputs that were added, and for each use their numbers; parts that fill one alike share it."""
        found: dict[Any, int] = {}
        filled: list[Filled] = []
        numbers = []
        for use in self.uses:
            weights = use.part.rewritten.weights
            own = []
            for fused, members in _filled_in(use):
                names = tuple(weights[name].name for name in fused.members)
                rows = fused.transform.rows.renamed({name: str(i) for i, name in enumerate(names)})
                number = found.setdefault((members, fused.shares_memory, rows), len(filled))
                if number == len(filled):
                    filled.append(Filled(fused, names, members))
                own.append(number)
            numbers.append(own)
        return numbers, filled

    def parts(self) -> list[Part]:
        """The distinct parts, in order."""
        return list({id(use.part): use.part for use in self.uses}.values())

    def outcomes(self) -> dict[str, Outcome]:
        """What each pass did, over the whole graph."""
        found: dict[str, Outcome] = {}
        for use in self.uses:
            for name, outcome in use.part.outcomes.items():
                into = found.setdefault(name, Outcome())
                into.matches += [_match_at(match, use.renamed) for match in outcome.matches]
                into.misses += [_miss_at(miss, use.renamed) for miss in outcome.misses]
        return found

    def plan(self) -> WeightPlan:
        """The weight transforms of everything fused, over the names in the state dict."""
        plans = [use.part.rewritten.plan().renamed(use.renamed) for use in self.uses]
        sources = dict.fromkeys(source for plan in plans for source in plan.sources)
        transforms = dict.fromkeys(transform for plan in plans for transform in plan.transforms)
        return WeightPlan(tuple(sources), tuple(transforms))

    def pictures(self, phase: str) -> list[Picture]:
        """Of each distinct kind of block, before and after."""
        found: dict[str, Picture] = {}
        for part in self.parts():
            matches = [match for outcome in part.outcomes.values() for match in outcome.matches]
            for picture in pictures(part.given, part.rewritten, matches, phase):
                found.setdefault(picture.block, picture)
        return list(found.values())

    def nodes(self) -> tuple[int, int]:
        """How many nodes there are before and after, over the whole graph."""
        before = sum(len(use.part.given.graph.nodes) for use in self.uses)
        return before, sum(len(use.part.rewritten.graph.nodes) for use in self.uses)

    def phase(self) -> str:
        """ "decode" where every linear but the last sees one token, "prefill" otherwise."""
        calls = [node for use in self.uses for node in use.part.given.calls(ops.LINEAR)]
        lengths = [node.args[0].meta["val"].shape for node in calls]  # type: ignore[union-attr]
        one = [len(s) > 1 and statically_known_true(s[-2] == 1) for s in lengths]
        return "decode" if one and sum(one) * 2 > len(one) else "prefill"

    def compiled(
        self, compile_graph: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]
    ) -> Callable[..., Any]:
        """A callable for the graph, which takes the added inputs after its own."""
        if not self._pieces:
            whole = self.uses[0].part
            return compile_graph(
                whole.rewritten.graph_module, [*self._inputs, *_added(whole, len(self._inputs))]
            )
        made: list[tuple[Part, Callable[..., Any]]] = []
        calls = []
        for piece, use in zip(self._pieces, self.uses, strict=True):
            # asked again: compilers add guards on the sizes of the piece that they are given
            call = next((c for p, c in made if p is use.part and outline.serves(_piece(p), piece)), None)
            if call is None:
                part = use.part if use.part.piece is piece else self._part(piece)
                # not those of the traced placeholders, which forget whether they require gradients
                own = [self._fakes.of(node) for node in piece.inputs]
                call = compile_graph(part.rewritten.graph_module, [*own, *_added(part, len(own))])
                if part is use.part:
                    made.append((part, call))
            calls.append(call)
        return outline.stitched(self.graph_module.graph, self._pieces, calls, self._number)


def _can_be_cut(graph_module: GraphModule) -> bool:
    """Whether every call has its effect on values alone, not on the calls of other pieces."""
    for node in graph_module.graph.nodes:
        if _called(node) in REMADE or _called(node) == "_set_grad_enabled":
            return False
    return True


def _called(node: Node) -> str:
    """The name of the method, function or operator that a node calls."""
    target = getattr(node.target, "overloadpacket", node.target)
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _crossed_by_unknown_sizes(pieces: Sequence[Piece]) -> bool:
    return any(free_unbacked_symbols(outline.value_of(node)) for piece in pieces for node in piece.inputs)


def _read_by_linears_of_several(pieces: Sequence[Piece]) -> bool:
    """Whether linears of several pieces read one input, as those of cross-attention: they may be merged."""
    readers: dict[Node, int] = {}
    for i, piece in enumerate(pieces):
        inner = capture.placeholders(piece.graph_module)
        for node, copied in zip(piece.inputs, inner, strict=True):
            linear = any(_called(user) in LINEARS and user.args[:1] == (copied,) for user in copied.users)
            if linear and readers.setdefault(node, i) != i:
                return True
    return False


def _added(part: Part, own: int) -> list[Any]:
    """The values of the inputs that passes have added to a part, after its own."""
    return [node.meta["val"] for node in part.rewritten.placeholders()[own:]]


def _piece(part: Part) -> Piece:
    assert part.piece is not None
    return part.piece


def _filled_in(use: Use) -> Iterator[tuple[FusedWeight, tuple[Node, ...]]]:
    """The inputs that were added to a part, with those of the captured graph that fill them here."""
    at = {node.name: i for i, node in enumerate(use.part.rewritten.placeholders())}
    for fused in use.part.rewritten.fused:
        yield fused, tuple(use.inputs[at[name]] for name in fused.members)


def _without_common_end(old: str, new: str) -> tuple[str, str]:
    """Two dotted names up to where their last parts are the same."""
    a, b = old.split("."), new.split(".")
    while a and b and a[-1] == b[-1]:
        a.pop(), b.pop()
    return ".".join(a), ".".join(b)


def _match_at(match: Match, renamed: Callable[[str], str]) -> Match:
    members = tuple(map(renamed, match.members))
    return replace(match, where=renamed(match.where), members=members, detail=renamed(match.detail))


def _miss_at(miss: Miss, renamed: Callable[[str], str]) -> Miss:
    return replace(miss, where=renamed(miss.where), reason=renamed(miss.reason))
