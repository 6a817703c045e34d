"""What stands between attention's projections and attention becomes one call, cache writes included.

Before: q, gate = chunk(row_q, 2, -1); q = rope(norm(q), cos, sin); k = rope(norm(row_k), cos, sin)
        key_cache.index_copy_(2, positions, k); value_cache.index_copy_(2, positions, row_v)
After:  q, gate = qk_norm_rope_gate(row_q, row_k, row_v, …, cos, sin, key_cache, value_cache, positions, eps)

Without a static cache the call writes to memory of its own, from where k is read; where nothing is normed it
is given no weights. What is what among the inputs is read in `attention_inputs`; whether all of it computes
what the operator does is told by running both.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.attention_inputs import (
    Candidate,
    Reading,
    candidates,
    dims_of,
    joined,
    readings,
    region_of,
)
from fxfuse.passes.judge import Judge
from fxfuse.passes.numbered_features import TRIALS
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, call, erase, read_by
from fxfuse.passes.row_parts import Part
from fxfuse.passes.storage_writes import equal_sizes
from fxfuse.runtime.ops.limits import unsupported

RULE = "qk_norm_rope_gate"


def _flat_angles(value: Any, tokens: Any) -> Any:
    """cos or sin as [B or 1, T, R]: without the dimension that broadcasts over heads."""
    if value.dim() == 4:
        return value.squeeze(_head_dim_of(value))
    if _is_tokens_first(value, tokens):
        return value.transpose(0, 1)
    return value.unsqueeze(0) if value.dim() == 2 else value


def _is_tokens_first(value: Any, tokens: Any) -> bool:
    """Whether angles are [T, 1, R], as heads behind the tokens read them."""
    return value.dim() == 3 and equal_sizes(value.shape[:2], (tokens, 1)) and not equal_sizes([tokens], [1])


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
        angles = [_flat_angles(values[n], key.shape[1]) for n in reading.cos_sin]
        angles = [torch.cat([t, t], -1) for t in angles] if reading.halves else angles
        off = 0.0 if reading.centred else 1.0
        vectors = [None if n is None else values[n] - off for n in reading.weights]
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
    at = None if found.writes else _first_user(guards, found, region)
    reason = guards.reason(region, found.results, {dtype, torch.float32}, found.caches, at, restored=True)
    if reason is not None:
        raise Refused(*reason)
    last = guards.position[at or region[-1]]
    late = next((n for n in read_by(region) if guards.position[n] >= last), None)
    if late is not None:
        raise Refused(late, f"{late.name} is computed after the query or key is read")
    for result in found.writes:
        before = (u for u in result.users if u not in region and guards.position[u] < last)
        early = next((u for u in before if not guards.shows_later(u, last)), None)
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
        if guards.position[reading.value.linear] >= last:
            raise Refused(reading.value.linear, "its value is computed after the query or key is read")
        heads = torch.empty(1, 1, 1, found.query.meta["val"].shape[3], device="meta", dtype=dtype)
        rest = (*reading.weights, *reading.cos_sin, *found.caches)
        limit = unsupported("qk_norm_rope", heads, heads, *(n.meta["val"] for n in rest if n is not None))
        if limit is not None:
            raise Refused(found.query, limit)
        rows = [p.linear for p in (reading.query, reading.key, reading.value) if p.linear in inputs]
        if any(n not in inputs for n in (*reading.weights, *reading.cos_sin) if n is not None):
            continue  # a table of angles from which the other one is computed
        order = [inputs.index(n) for n in (*rows, *reading.weights, *reading.cos_sin) if n is not None]
        features = [hash(p.features) for p in (reading.query, reading.key, reading.value)]
        name = f"{RULE} {order} {features} {reading.eps} {reading.halves} {reading.centred}"
        if judge.equal(region, outputs, _operator_on(found, reading), name, found.caches, given):
            gate = reading.gate
            if gate is not None and any(guards.position[user] < last for user in gate.node.users):
                gate = None
            if gate is not None and dims_of(gate.node) not in (3, 4):
                gate = None
            return region, replace(reading, gate=gate)
    raise Refused(
        found.query, "run on random values it is no norm and rotation as qk_norm_rope_gate takes them"
    )


def _first_user(guards: Guards, found: Candidate, region: Sequence[Node]) -> Node | None:
    """What reads a result first, None where all of them and the value are there at the end of the region."""
    users = {user for result in found.results for user in result.users if user not in region}
    first = min(users, key=lambda user: guards.position.get(user, 0), default=None)
    end = guards.position[region[-1]]
    if first is None or max(guards.position[found.value], end) == end < guards.position[first]:
        return None
    return first


def _start(guards: Guards, positions: Any, last: Node) -> Any:
    """The first of consecutive positions where they are spelled as a range after it, which costs no call."""
    if str(positions.target) != "aten.add.Tensor" or len(positions.args) != 2 or positions.kwargs:
        return positions
    for numbers, start in (positions.args, positions.args[::-1]):
        if not isinstance(numbers, Node) or not isinstance(start, Node) or dims_of(start):
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
    at = None if found.writes else _first_user(guards, found, region)
    with program.graph.inserting_after(region[-1]) if at is None else program.graph.inserting_before(at):
        anchor = program.graph.call_function(aten.alias.default, (region[0],))
    with program.graph.inserting_before(anchor):
        key, value = (part.view(program, (kv_heads, head_dim)) for part in (reading.key, reading.value))
        angles = []
        for node in reading.cos_sin:
            dims = dims_of(node)
            if dims == 4:
                node = call(program, found.query, aten.squeeze.dim, node, _head_dim_of(node.meta["val"]))
            elif dims == 2:
                node = call(program, found.query, aten.unsqueeze.default, node, 0)
            elif _is_tokens_first(node.meta["val"], found.query.meta["val"].shape[2]):
                node = call(program, found.query, aten.transpose.int, node, 0, 1)
            if reading.halves:
                node = call(program, found.query, aten.cat.default, [node, node], -1)
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
        weights = [_zero_centred(program, found.query, n, reading) for n in reading.weights]
        rest = (key, value, *weights, *angles, *caches, positions, reading.eps)
        if reading.gate is None:
            query = reading.query.view(program, (heads, head_dim))
            out = call(program, found.query, fxfuse.qk_norm_rope.default, query, *rest)
        else:
            both = joined(reading.query, reading.gate, heads)
            assert both is not None
            row = both.view(program, (heads, 2 * head_dim))
            results = call(program, found.query, fxfuse.qk_norm_rope_gate.default, row, *rest)
            out, gate = (call(program, found.query, operator.getitem, results, i) for i in range(2))
            if dims_of(reading.gate.node) == 3:
                gate = call(program, reading.gate.node, aten.flatten.using_ints, gate, 2, 3)
            reading.gate.node.replace_all_uses_with(gate)
        for result, new in zip(found.results, [out, *caches], strict=False):
            guards.put_in_place(program, result, new)
    program.graph.erase_node(anchor)
    erase(program, region)
    if reading.gate is not None:
        erase(program, [reading.gate.node])


def _zero_centred(program: Program, like: Node, weight: Node | None, reading: Reading) -> Node | None:
    """w − 1 of a norm that multiplies by w, in float32: exact from 0.5 to 2, within 3e-8 around it."""
    if weight is None or reading.centred:
        return weight
    aten = torch.ops.aten
    if weight.meta["val"].dtype != torch.float32:
        weight = call(program, like, aten.to.dtype, weight, torch.float32)
    return call(program, like, aten.sub.Tensor, weight, 1.0)


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
    outcome, judge, found_all = Outcome(), Judge(), list(candidates(program))
    guards = Guards(program)  # of the graph in which caches are spelled alike
    accepted: list[tuple[Candidate, list[Node], Reading]] = []
    for found in found_all:
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
