"""What stands between attention's projections and attention: the candidates, and the ways to read them.

Which features of the projections are query, gate, key and value is told by numbering them, what the other
inputs are by their shapes; whether a reading is right is for `qk_norm_rope_gate` to say.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, permutations, product
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fxfuse.passes.attention_caches import INDEX_COPY, origin_of, spell_caches
from fxfuse.passes.linear_spellings import turned as turned_last
from fxfuse.passes.program import Program
from fxfuse.passes.regions import Refused, behind, is_made_of_numbers, read_by, writers_of
from fxfuse.passes.row_parts import Part, parts_of, projections
from fxfuse.passes.storage_writes import equal_sizes, storage_of
from fxfuse.patterns import ops
from fxfuse.patterns import readings as readings_of
from fxfuse.patterns.terms import is_cast

_PRODUCTS = (ops.MATMUL, ops.EINSUM)


@dataclass(frozen=True)
class Candidate:
    """The computation of attention's query and key; `writes` of key and value into a static cache, or none.

    Attributes:
        operands: query, key and value as attention reads them.
        key: [B, nkv, T, D], of this call's tokens. value: of the same shape.
    """

    attention: Node
    operands: tuple[Node, Node, Node]
    query: Node
    key: Node
    value: Node
    writes: tuple[Node, ...]

    @property
    def results(self) -> list[Node]:
        return [self.query, *(self.writes or (self.key,))]

    @property
    def caches(self) -> list[Node]:
        return [write.args[0] for write in self.writes]  # type: ignore[misc]


@dataclass(frozen=True)
class Reading:
    """One way to read a candidate's inputs as the operator's arguments.

    `gate` is None where it stays, `weights` are where nothing is normed. With `halves` cos and sin are
    [B, T, R / 2], read by either half of the R features that rotate; with `centred` weights are off by one.
    """

    query: Part
    gate: Part | None
    key: Part
    value: Part
    weights: tuple[Node | None, Node | None]
    cos_sin: tuple[Node, Node]
    eps: float
    halves: bool = False
    centred: bool = True


def candidates(program: Program) -> Iterator[Candidate]:
    """One for each call of attention whose query has four dimensions; their caches are spelled alike."""
    spell_caches(program, [n for _, operands in _attentions(program) for n in operands[1:]])
    for attention, operands in _attentions(program):
        query, *rest = operands
        key, value = (n if turned else origin for n in rest for origin, turned in [origin_of(n)])
        writes: tuple[Node, ...] = ()
        if all(_is_cache_write(n) for n in (key, value)) and key.args[2] is value.args[2]:
            writes, (key, value) = (key, value), (key.args[3], value.args[3])  # type: ignore[assignment]
        if all(dims_of(n) == 4 for n in (query, key, value)):
            yield Candidate(attention, operands, query, key, value, writes)


def _attentions(program: Program) -> Iterator[tuple[Node, tuple[Node, Node, Node]]]:
    """Calls of attention, and last products of attention by hand; with query, key and value."""
    for attention in program.calls(readings_of.SDPA):
        if all(isinstance(n, Node) for n in attention.args[:3]):
            yield attention, attention.args[:3]  # type: ignore[misc]
    for softmax in program.calls(readings_of.SOFTMAX):
        scores, last = _product_before(softmax), _product_after(softmax)
        if scores is None or last is None:
            continue
        query, key = _factors(scores)
        if str(scores.target) == ops.MATMUL:
            key = turned_last(key)
        if isinstance(query, Node) and str(query.target) == ops.MUL and len(query.all_input_nodes) == 1:
            (query,) = query.all_input_nodes  # before it was scaled
        value = _factors(last)[1]
        if isinstance(query, Node) and isinstance(key, Node) and isinstance(value, Node):
            yield last, (_of_all_heads(query), key, value)


def _factors(product: Node) -> tuple[Any, Any]:
    """Both operands of a product of matrices, as an einsum perhaps."""
    given: Any = product.args if str(product.target) == ops.MATMUL else product.args[1]
    return tuple(given[:2]) if len(given) > 1 else (None, None)


def _product_before(softmax: Node) -> Node | None:
    """The product of query and key that a softmax is of, scaled and masked."""
    node: Any = softmax.args[0]
    sizes = softmax.meta["val"].shape
    while isinstance(node, Node) and str(node.target) not in _PRODUCTS:
        same = [
            n
            for n in node.all_input_nodes
            if dims_of(n) in (4, 5) and equal_sizes(n.meta["val"].shape, sizes)
        ]
        node = same[0] if same else None
    return node


def _product_after(node: Node) -> Node | None:
    """The product of a softmax, cast perhaps, with values."""
    while len(node.users) == 1:
        (user,) = node.users
        if str(user.target) in _PRODUCTS and _factors(user)[0] is node:
            return user
        if not is_cast(user):
            return None
        node = user
    return None


def _of_all_heads(query: Node) -> Node:
    """[B, H, T, D], before it was split into groups of heads that share a key."""
    while dims_of(query) == 5 and str(query.target) in (*ops.RESHAPES, ops.UNFLATTEN, ops.UNSQUEEZE):
        query = query.args[0]  # type: ignore[assignment]
    return query


def _is_cache_write(node: Node) -> bool:
    return str(node.target) == INDEX_COPY and node.args[1] in (2, -2)


def dims_of(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def region_of(program: Program, found: Candidate) -> tuple[list[Node], list[Node], list[Node]]:
    """The nodes that depend on projections, with the cones of the norms' weights; those; cos and sin."""
    linears = projections(program)
    caches = {storage_of(n) for n in found.caches}
    writers = {s: calls for s, calls in writers_of(program.graph).items() if s not in caches}
    everything = behind(found.results, linears, writers)
    dependent: set[Node] = set()
    for node in everything:
        if any(n in linears or n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    inputs = [
        n for n in read_by([n for n in everything if n in dependent]) if dims_of(n) and n not in linears
    ]
    given = {*found.caches, *(write.args[2] for write in found.writes)}
    weights, angles = [], []
    for node in (n for n in inputs if n not in given):
        cone = behind([node], (), writers)
        parameters = [n for n in read_by(cone) if n.op == "placeholder"] if cone else [node]
        if is_made_of_numbers(node, cone):
            dependent.update(cone)
        elif (
            len(parameters) == 1
            and dims_of(parameters[0]) == 1
            and node.meta["val"].numel() == parameters[0].meta["val"].numel()
        ):
            weights.append(parameters[0])
            dependent.update(cone)
        else:
            angles.append(node)
    angles = _bases(angles, dependent)
    return [n for n in program.graph.nodes if n in dependent], list(dict.fromkeys(weights)), angles


def _bases(angles: list[Node], region: set[Node]) -> list[Node]:
    """cos and sin themselves, where parts of them are read; the calls on the way join the region."""
    found = list(dict.fromkeys(angles))
    while len(found) > 2 or any(_is_more(n) for n in found):
        parts = [n for n in found if len(found) > 2 or _is_more(n)]
        parts = [n for n in parts if str(_call_of(n).target) in readings_of.ON_ANGLES]
        if not parts:
            break
        # the last one, but first those of which there is a part already: cos of the query, then of the key
        part = max(parts, key=lambda n: (not set(found).isdisjoint(_call_of(n).all_input_nodes), n))
        region.update((part, _call_of(part)))
        read = ([m for m in _call_of(n).all_input_nodes if dims_of(m)] if n is part else [n] for n in found)
        found = list(dict.fromkeys(chain.from_iterable(read)))
    return found


def _is_more(node: Node) -> bool:
    """Whether a tensor is more than cos or sin: both as complex numbers or pairs, or wide as a head."""
    pairs = str(node.target) == ops.STACK and len(node.all_input_nodes) > 1
    return pairs or node.meta["val"].is_complex() or str(node.target) in readings_of.PADDINGS


def _call_of(node: Node) -> Node:
    """The call that gives a tensor, alone or among several: a list of tensors is no input of a region."""
    source = node.args[0] if node.target is operator.getitem else node
    return source if isinstance(source, Node) else node


def readings(
    program: Program,
    found: Candidate,
    region: Sequence[Node],
    weights: Sequence[Node],
    angles: Sequence[Node],
) -> Iterator[Reading]:
    """Every reading that the shapes allow; raises Refused where there is none."""
    heads, head_dim = found.query.meta["val"].shape[1::2]
    kv_heads = found.key.meta["val"].shape[1]
    if not all(isinstance(n, int) and n > 0 for n in (heads, head_dim, kv_heads)):
        raise Refused(
            found.query,
            "the number or size of its heads varies, or is 0: dynamic=False takes a cache's as it is",
        )
    if len(weights) > 2 or len(angles) != 2:
        raise Refused(
            found.query, f"it reads {len(weights)} weights of norms and {len(angles)} tensors of angles"
        )
    linears = projections(program)
    cones = [set(behind([n], linears)) for n in found.operands]
    by_role: list[list[Part]] = [[], [], [], []]
    rows = [n for n in read_by([*region, *cones[2]]) if n in linears]
    for part in (part for row in rows for part in parts_of(row)):
        role = next((i for i, cone in enumerate(cones) if part.node in cone), 3)
        wanted = (heads, kv_heads, kv_heads, heads)[role] * head_dim
        if len(part.features) == wanted:
            by_role[role].append(part)
    queries, keys, values, gates = by_role
    if not (queries and keys and values):
        raise Refused(found.query, "its query, key and value are no parts of projections")
    epsilons = readings_of.epsilons(tree_leaves([(n.args, n.kwargs) for n in region]))
    orders: list[Any] = list(permutations(weights)) if len(weights) == 2 else [tuple(weights) * 2]
    if not weights:
        orders, epsilons = [(None, None)], [0.0]
    width = angles[0].meta["val"].shape[-1]
    halves = [width % 2 == 1] if type(width) is int else [False]
    if type(width) is int and not halves[0] and 2 * width <= head_dim:
        halves = [False, True]
    for parts in product(queries, keys, values):
        query, key, value = parts
        gate = next((g for g in gates if (whole := joined(query, g, heads)) and whole.is_strided), None)
        if not all(part.is_strided for part in parts):
            continue
        ways = product([True, False] if weights else [True], orders, permutations(angles), epsilons, halves)
        for centred, pair, cos_sin, eps, half in ways:
            yield Reading(query, gate, key, value, pair, cos_sin, eps, half, centred)  # type: ignore[arg-type]


def joined(query: Part, gate: Part, heads: int) -> Part | None:
    """Each head's query and gate side by side, if one projection holds both."""
    if query.linear is not gate.linear:
        return None
    size = len(query.features) // heads
    both = zip(*(_split(part.features, size) for part in (query, gate)), strict=True)
    return query.taken([feature for q, g in both for feature in (*q, *g)])


def _split(features: Sequence[int], size: int) -> list[Sequence[int]]:
    return [features[i : i + size] for i in range(0, len(features), size)]
