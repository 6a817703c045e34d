"""What stands between attention's projections and attention becomes one call, cache writes included.

Before: q, gate = chunk(row_q, 2, -1); q = rope(norm(q), cos, sin); k = rope(norm(row_k), cos, sin)
        key_cache.index_copy_(2, positions, k); value_cache.index_copy_(2, positions, row_v)
After:  q, gate = qk_norm_rope_gate(row_q, row_k, row_v, …, cos, sin, key_cache, value_cache, positions, eps)

Without a static cache the call writes to memory of its own, from where k is read; where nothing is normed it
is given no weights. Which features of the
projections are query, gate, key and value is told by numbering them, what the other inputs are by their
shapes; whether all of it computes what the operator does, by running both.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, permutations, product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from fxfuse.passes.judge import Judge
from fxfuse.passes.numbered_features import TRIALS
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, read_by, writers_of
from fxfuse.passes.row_parts import Part, parts_of
from fxfuse.passes.storage_writes import storage_of
from fxfuse.patterns import ops
from fxfuse.patterns import readings as readings_of
from fxfuse.runtime.ops.limits import unsupported

RULE = "qk_norm_rope_gate"
LARGEST_EPS = 1e-2
INDEX_COPY = "aten.index_copy_.default"


@dataclass(frozen=True)
class Candidate:
    """The computation of attention's query and key; `writes` of key and value into a static cache, or none.

    Attributes:
        key: [B, nkv, T, D], of this call's tokens. value: of the same shape.
    """

    attention: Node
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

    `gate` is None where it stays, `weights` are where nothing is normed.
    """

    query: Part
    gate: Part | None
    key: Part
    value: Part
    weights: tuple[Node | None, Node | None]
    cos_sin: tuple[Node, Node]
    eps: float


def candidates(program: Program) -> Iterator[Candidate]:
    """One for each call of attention whose query has four dimensions."""
    for attention in program.calls(readings_of.SDPA):
        query, *rest = attention.args[:3]
        key, value = (_origin(n) for n in rest)  # type: ignore[arg-type]
        writes: tuple[Node, ...] = ()
        if all(_is_cache_write(n) for n in (key, value)) and key.args[2] is value.args[2]:
            writes, (key, value) = (key, value), (key.args[3], value.args[3])  # type: ignore[assignment]
        if isinstance(query, Node) and all(_dims(n) == 4 for n in (query, key, value)):
            yield Candidate(attention, query, key, value, writes)


def _origin(node: Node) -> Node:
    """The write, or the new tokens, behind a key or value that is cut, repeated or appended to others."""
    while True:
        source: Any = None
        if str(node.target) in readings_of.REPEATS:
            source = node.args[0]
        elif str(node.target) == ops.CAT and node.args[1:] in ((2,), (-2,)):
            source = node.args[0][-1]  # type: ignore[index]
        if not isinstance(source, Node) or _dims(source) < 4:
            return node
        node = source


def _is_cache_write(node: Node) -> bool:
    return str(node.target) == INDEX_COPY and node.args[1] in (2, -2)


def _dims(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def region_of(program: Program, found: Candidate) -> tuple[list[Node], list[Node], list[Node]]:
    """The nodes that depend on projections, with the cones of the norms' weights; those; cos and sin."""
    linears = set(program.calls(ops.LINEAR))
    caches = {storage_of(n) for n in found.caches}
    writers = {s: calls for s, calls in writers_of(program.graph).items() if s not in caches}
    everything = behind(found.results, linears, writers)
    dependent: set[Node] = set()
    for node in everything:
        if any(n in linears or n in dependent for n in node.all_input_nodes):
            dependent.add(node)
    inputs = [n for n in read_by([n for n in everything if n in dependent]) if _dims(n) and n not in linears]
    given = {*found.caches, *(write.args[2] for write in found.writes)}
    weights, angles = [], []
    for node in (n for n in inputs if n not in given):
        cone = behind([node], ())
        parameters = [n for n in read_by(cone) if n.op == "placeholder"] if cone else [node]
        if cone and not read_by(cone):  # made of numbers alone
            dependent.update(cone)
        elif (
            len(parameters) == 1
            and _dims(parameters[0]) == 1
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
    while len(found) > 2:
        parts = [n for n in found if n.target is operator.getitem or str(n.target) in readings_of.ON_ANGLES]
        if not parts:
            break
        region.update(parts)
        found = list(dict.fromkeys(m for n in found for m in (n.all_input_nodes if n in parts else [n])))
    return found


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
    if not all(isinstance(n, int) for n in (heads, head_dim, kv_heads)):
        raise Refused(found.query, "the number or size of its heads varies")
    if len(weights) > 2 or len(angles) != 2:
        raise Refused(
            found.query, f"it reads {len(weights)} weights of norms and {len(angles)} tensors of angles"
        )
    linears = set(program.calls(ops.LINEAR))
    cones = [set(behind([n], linears)) for n in found.attention.args[:3]]  # type: ignore[list-item]
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
    numbers = [x for n in region for x in tree_leaves((n.args, n.kwargs)) if _is_eps(x)]
    epsilons = sorted({abs(x) for x in numbers})
    orders: list[Any] = list(permutations(weights)) if len(weights) == 2 else [tuple(weights) * 2]
    if not weights:
        orders, epsilons = [(None, None)], [0.0]
    for parts in product(queries, keys, values):
        query, key, value = parts
        gate = next((g for g in gates if (whole := _joined(query, g, heads)) and whole.is_strided), None)
        if not all(part.is_strided for part in parts):
            continue
        for pair, cos_sin, eps in product(orders, permutations(angles), epsilons):
            yield Reading(query, gate, key, value, pair, cos_sin, eps)  # type: ignore[arg-type]


def _is_eps(x: object) -> bool:
    return isinstance(x, float) and 0 < abs(x) <= LARGEST_EPS


def _joined(query: Part, gate: Part, heads: int) -> Part | None:
    """Each head's query and gate side by side, if one projection holds both."""
    if query.linear is not gate.linear:
        return None
    size = len(query.features) // heads
    both = zip(*(_split(part.features, size) for part in (query, gate)), strict=True)
    return query.taken([feature for q, g in both for feature in (*q, *g)])


def _split(features: Sequence[int], size: int) -> list[Sequence[int]]:
    return [features[i : i + size] for i in range(0, len(features), size)]


def _flat_angles(value: Any) -> Any:
    """cos or sin as [B or 1, T, R]: without the dimension that broadcasts over heads."""
    if value.dim() == 4:
        return value.squeeze(_head_dim_of(value))
    return value.unsqueeze(0) if value.dim() == 2 else value


def _head_dim_of(value: Any) -> int:
    return 1 if statically_known_true(value.shape[1] == 1) else 2


def _operator_on(found: Candidate, reading: Reading) -> Any:
    heads, head_dim = found.query.meta["val"].shape[1::2]
    kv_heads = found.key.meta["val"].shape[1]

    def run(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        query = reading.query.of(values[reading.query.linear], (heads, head_dim))
        key = reading.key.of(values[reading.key.linear], (kv_heads, head_dim))
        static = bool(found.writes)
        # the values of a growing cache are not of the region
        value = reading.value.of(values[reading.value.linear], (kv_heads, head_dim)) if static else key
        if static:
            caches = [values[n] for n in found.caches]
            positions = values[found.writes[0].args[2]]  # type: ignore[index]
        else:
            caches = [torch.empty_like(key.transpose(1, 2).contiguous()) for _ in range(2)]
            positions = torch.zeros(1, dtype=torch.long)
        angles = [_flat_angles(values[n]) for n in reading.cos_sin]
        vectors = [None if n is None else values[n] for n in reading.weights]
        out = torch.ops.fxfuse.qk_norm_rope(
            query, key, value, *vectors, *angles, *caches, positions, reading.eps
        )
        return [out] if static else [out, caches[0]]

    return run


def _accepted(program: Program, guards: Guards, judge: Judge, found: Candidate) -> tuple[list[Node], Reading]:
    region, weights, angles = region_of(program, found)
    if not region:
        raise Refused(found.query, "its query and key are computed from no projection")
    dtype = found.query.meta["val"].dtype
    reason = guards.reason(region, found.results, {dtype, torch.float32}, found.caches)
    if reason is not None:
        raise Refused(*reason)
    last = guards.position[region[-1]]
    for result in found.results:
        early = next((u for u in result.users if u not in region and guards.position[u] < last), None)
        if early is not None:
            raise Refused(early, f"{early.name} reads {result.name} before the others are there")

    def given(node: Node, shape: Sequence[int]) -> Tensor | None:
        """Positions from the start, and caches with no more room than those need."""
        if node in found.caches:
            length = found.query.meta["val"].shape[2]
            room = length if isinstance(length, int) else max(chain(*TRIALS))
            return torch.ones(*shape[:2], room, shape[3], dtype=torch.float64)
        is_position = any(node is write.args[2] for write in found.writes)
        return torch.arange(shape[0]) if is_position and len(shape) == 1 else None

    outputs = [found.query] if found.writes else found.results
    inputs = read_by(region)
    for reading in readings(program, found, region, weights, angles):
        if any(p.linear.meta["val"].dtype != dtype for p in (reading.query, reading.key, reading.value)):
            raise Refused(found.query, "its projections and its query differ in dtype")
        heads = torch.empty(1, 1, 1, found.query.meta["val"].shape[3], device="meta", dtype=dtype)
        rest = (*reading.weights, *reading.cos_sin, *found.caches)
        limit = unsupported("qk_norm_rope", heads, heads, *(n.meta["val"] for n in rest if n is not None))
        if limit is not None:
            raise Refused(found.query, limit)
        rows = [p.linear for p in (reading.query, reading.key, reading.value) if p.linear in inputs]
        order = [inputs.index(n) for n in (*rows, *reading.weights, *reading.cos_sin) if n is not None]
        features = [hash(p.features) for p in (reading.query, reading.key, reading.value)]
        name = f"{RULE} {order} {features} {reading.eps}"
        if judge.equal(region, outputs, _operator_on(found, reading), name, found.caches, given):
            gate = reading.gate
            if gate is not None and any(guards.position[user] < last for user in gate.node.users):
                gate = None
            if gate is not None and _dims(gate.node) not in (3, 4):
                gate = None
            chosen = (reading.query, gate, reading.key, reading.value)
            return region, Reading(*chosen, reading.weights, reading.cos_sin, reading.eps)
    raise Refused(
        found.query, "run on random values it is no norm and rotation as qk_norm_rope_gate takes them"
    )


def _start(guards: Guards, positions: Any, last: Node) -> Any:
    """The first of consecutive positions where they are spelled as a range after it, which costs no call."""
    if str(positions.target) != "aten.add.Tensor" or len(positions.args) != 2 or positions.kwargs:
        return positions
    for numbers, start in (positions.args, positions.args[::-1]):
        if not isinstance(numbers, Node) or not isinstance(start, Node) or _dims(start):
            continue
        value = start.meta.get("val")
        if str(numbers.target) != "aten.arange.default" or not isinstance(value, Tensor):
            continue
        if guards.writes.version(start, positions) == guards.writes.version(start, last):
            return start
    return positions


def _replace(
    program: Program, guards: Guards, found: Candidate, region: Sequence[Node], reading: Reading
) -> None:
    aten, fxfuse = torch.ops.aten, torch.ops.fxfuse
    heads, head_dim = found.query.meta["val"].shape[1::2]
    kv_heads = found.key.meta["val"].shape[1]
    with program.graph.inserting_after(region[-1]):
        anchor = program.graph.call_function(aten.alias.default, (found.query,))
    with program.graph.inserting_before(anchor):
        key, value = (part.view(program, (kv_heads, head_dim)) for part in (reading.key, reading.value))
        angles = []
        for node in reading.cos_sin:
            dims = _dims(node)
            if dims == 4:
                node = call(program, found.query, aten.squeeze.dim, node, _head_dim_of(node.meta["val"]))
            elif dims == 2:
                node = call(program, found.query, aten.unsqueeze.default, node, 0)
            angles.append(node)
        if found.writes:
            caches, positions = found.caches, _start(guards, found.writes[0].args[2], region[-1])
        else:
            shape = [_size(program, reading.key, i) for i in range(2)]
            shape = [shape[0], kv_heads, shape[1], head_dim]
            caches = [
                call(program, found.query, aten.new_empty.default, reading.key.linear, shape)
                for _ in range(2)
            ]
            positions = _first_position(program, reading.key.linear)
        rest = (key, value, *reading.weights, *angles, *caches, positions, reading.eps)
        if reading.gate is None:
            query = reading.query.view(program, (heads, head_dim))
            out = call(program, found.query, fxfuse.qk_norm_rope.default, query, *rest)
        else:
            both = _joined(reading.query, reading.gate, heads)
            assert both is not None
            row = both.view(program, (heads, 2 * head_dim))
            results = call(program, found.query, fxfuse.qk_norm_rope_gate.default, row, *rest)
            out, gate = (call(program, found.query, operator.getitem, results, i) for i in range(2))
            if _dims(reading.gate.node) == 3:
                gate = call(program, reading.gate.node, aten.flatten.using_ints, gate, 2, 3)
            reading.gate.node.replace_all_uses_with(gate)
    program.graph.erase_node(anchor)
    found.query.replace_all_uses_with(out)
    for result, cache in zip(found.results[1:], caches, strict=False):
        result.replace_all_uses_with(cache)
    erase(program, region)
    if reading.gate is not None:
        erase(program, [reading.gate.node])


def _size(program: Program, part: Part, dim: int) -> Any:
    size = part.linear.meta["val"].shape[dim]
    return (
        size
        if isinstance(size, int)
        else call(program, part.linear, torch.ops.aten.sym_size.int, part.linear, dim)
    )


def _first_position(program: Program, row: Node) -> Node:
    """A tensor of one zero, one for the whole graph."""
    for node in program.calls("aten.zeros.default"):
        if node.meta.get("first_position"):
            return node
    first = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    with program.graph.inserting_before(first):
        options = {"dtype": torch.int64, "device": row.meta["val"].device}
        node = program.graph.call_function(torch.ops.aten.zeros.default, ([1],), options)
    node.meta["first_position"] = True
    return node


def run(program: Program) -> Outcome:
    """Rewrite what precedes every call of attention; report every candidate that stays, with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    accepted: list[tuple[Candidate, list[Node], Reading]] = []
    for found in candidates(program):
        where = module_path(found.attention)
        try:
            accepted.append((found, *_accepted(program, guards, judge, found)))
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, where, refusal.node.name, refusal.reason))
            continue
        detail = f"{len(accepted[-1][1])} calls → 1{', cache in place' if found.writes else ''}"
        outcome.matches.append(Match(RULE, where, (), detail))
    for found, region, reading in accepted:
        _replace(program, guards, found, region, reading)
    return outcome
