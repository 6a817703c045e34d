"""One token of the gated delta rule becomes one call that moves its state on, whatever stands around it.

Before: S = state * exp(g); S = S + k̂ ⊗ β(v − Sᵀ k̂); o = Sᵀ q̂ / √dk; state.copy_(S)
After:  o = recurrent_gated_delta_rule(q, k, v, g, β, state, normalise=True)

For what `gdn_decode` leaves alone: another norm behind it, or heads that are too large for one program. Which
input is which is told by its shape and by who reads it; whether all of it is the rule, by running both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, read_by, writers_of
from fxfuse.passes.storage_writes import equal_sizes, storage_of, written_by
from fxfuse.patterns import idioms, ops, readings
from fxfuse.patterns.formula import Formula
from fxfuse.patterns.matcher import matches
from fxfuse.patterns.terms import is_cast
from fxfuse.runtime.ops.limits import unsupported

RULE = "recurrent_gated_delta_rule"
COPY = "aten.copy_.default"
MOVES = readings.REPEATS | (
    ops.LAYOUT
    - {ops.CAT, "aten.chunk.default", "aten.split.Tensor", "aten.split.sizes", "aten.unbind.int"}
    - {"aten.split_with_sizes.default", "aten.tensor_split.indices", "aten.tensor_split.sections"}
)


@dataclass(frozen=True)
class Candidate:
    """A state [B, HV, dk, dv] and what is computed from it: a call overwrites it, or both stay.

    Where it is computed in place, the last call that does so is both.
    """

    write: Node | None
    state: Node
    new: Node

    @property
    def sizes(self) -> Sequence[Any]:
        return self.state.meta["val"].shape


@dataclass(frozen=True)
class Reading:
    """query, key, value, g and β as nodes, and whether query and key are normalised on the way."""

    operands: tuple[Node, ...]
    normalise: bool


def candidates(program: Program) -> Iterator[Candidate]:
    """Every write of a computed tensor over an input of four dimensions, and what is returned instead."""
    for write in program.calls(COPY):
        state, new = write.args[:2]
        if not isinstance(state, Node) or state.op != "placeholder" or not isinstance(new, Node):
            continue
        if _is_state(state) and new in _dependents(state):
            yield Candidate(write, state, new)
    writers, (output,) = writers_of(program.graph), program.graph.find_nodes(op="output")
    for state in filter(_is_state, program.placeholders()):  # computed in its own memory
        last = next(reversed(writers.get(storage_of(state), ())), None)
        whole = last is not None and equal_sizes(last.meta["val"].shape, state.meta["val"].shape)
        if last is not None and whole and str(last.target) != COPY and last in _dependents(state):
            yield Candidate(last, state, last)
    states = [n for n in program.placeholders() if _is_state(n) and storage_of(n) not in writers]
    for new in (n for n in output.all_input_nodes if n.op == "call_function" and _is_state(n)):
        for state in (n for n in states if equal_sizes(n.meta["val"].shape, new.meta["val"].shape)):
            if new in _dependents(state):
                yield Candidate(None, state, new)


def _is_state(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return False
    return all(isinstance(size, int) and size > 0 for size in value.shape[1:])


def _stripped(node: Node) -> Node:
    """The node before its elements were moved or repeated."""
    while (str(node.target) in MOVES or is_cast(node)) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_per_head(node: Node, batch: Any, heads: int, width: int | None) -> bool:
    """[B, 1, h, width], [B, h, 1, width] or [B, h, width], h a divisor of `heads`; h alone without width."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    shape = list(value.shape)
    if width is not None and (not shape or not statically_known_true(shape.pop() == width)):
        return False
    if len(shape) == 3:
        one = next((i for i in (1, 2) if statically_known_true(shape[i] == 1)), None)
        if one is None:
            return False
        shape.pop(one)
    own = len(shape) == 2 and type(shape[1]) is int and statically_known_true(shape[0] == batch)
    if not own or not shape[1]:
        return False
    return heads % shape[1] == 0 if width is not None else bool(shape[1] == heads)


def _is_flat(node: Node, batch: Any, width: int) -> bool:
    """[B, 1, heads · width] or [B, heads · width]: one token with its heads side by side."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() not in (2, 3):
        return False
    return equal_sizes(value.shape, (batch, *(1,) * (value.dim() - 2), width))


def _origin(node: Node, batch: Any, heads: int, width: int | None, dtype: torch.dtype | None) -> Node | None:
    """The farthest node behind moves that has the shape of one token's heads, and the dtype if given."""
    found = None
    while True:
        value = node.meta.get("val")
        if _is_per_head(node, batch, heads, width) and dtype in (None, value.dtype):  # type: ignore[union-attr]
            found = node
        if not (str(node.target) in MOVES or is_cast(node)) or not isinstance(node.args[0], Node):
            return found
        node = node.args[0]


def _to_token(value: Tensor, width: bool) -> tuple[Any, ...]:
    """The call that turns heads [B, h], with or without width, into those of one token [B, 1, h]; or none."""
    aten = torch.ops.aten
    if value.dim() == 2 + width:
        return aten.unsqueeze.default, 1
    return () if statically_known_true(value.shape[1] == 1) else (aten.transpose.int, 1, 2)


def _as_token(value: Tensor, width: bool) -> Any:
    target, *args = _to_token(value, width) or (None,)
    return value if target is None else target(value, *args)


def _bound(formula: Formula, node: Node, name: str) -> Node | None:
    return next((found[name] for found in matches(formula, node)), None)


def _dependents(state: Node) -> set[Node]:
    """What is computed from a state up to the next linear, or to an operator that has a name already."""
    found, memory = {state}, set()
    for node in state.graph.nodes:
        reads = any(n in found or storage_of(n) in memory for n in node.all_input_nodes)
        if reads and _is_unnamed(node):
            found.add(node)
            memory |= {storage_of(n) for n in written_by(node)} - {storage_of(state), None}
    return found - {state}


def _is_unnamed(node: Node) -> bool:
    target = str(node.target)
    return node.op == "call_function" and target != ops.LINEAR and not target.startswith("fxfuse.")


def readings_of(found: Candidate, result: Node, core: set[Node]) -> Iterator[Reading]:
    """Every reading that shapes and readers allow."""
    batch, heads, dk, dv = found.sizes
    before = set(behind([found.new], ()))
    boundary = [n for node in core for n in node.all_input_nodes if n not in core and n is not found.state]
    early = {_stripped(n): n for node in core & before for n in node.all_input_nodes if n in boundary}
    late = {_stripped(n): n for node in core - before for n in node.all_input_nodes if n in boundary}
    dtype = result.meta["val"].dtype
    for scale, g, beta in _scales(early, batch, heads):
        rest = [n for n in early if n not in scale]
        for pair in permutations(rest, 2):
            values = [_origin(n, batch, heads, dv, None) for n in _value(pair[1], early[pair[1]])]
            for value, last in product((v for v in values if v is not None), late):
                for query, key, normalise in _query_and_key(late[last], early[pair[0]], dk):
                    q = _origin(query, batch, heads, dk, dtype)
                    k = _origin(key, batch, heads, dk, None)
                    if q is not None and k is not None and equal_heads(q, k):
                        yield Reading((q, k, value, g, beta), normalise)


def _scales(
    early: Mapping[Node, Node], batch: Any, heads: int
) -> Iterator[tuple[tuple[Node, Node], Node, Node]]:
    """g and β, and what they are read as: β by itself, or as a factor of a key that is read beside it."""
    for scale in permutations(early, 2):
        decay = _bound(idioms.DECAY, scale[0], "g")
        g = decay and _origin(decay, batch, heads, None, None)
        if g is None:
            continue
        factors = (found["x"] for found in matches(idioms.ANYTHING * idioms.ANYTHING_ELSE, scale[1]))
        rates = (_origin(n, batch, heads, None, None) for n in (early[scale[1]], *factors))
        yield from ((scale, g, beta) for beta in rates if beta is not None)


def _value(stripped: Node, value: Node) -> Iterator[Node]:
    """What is written into the state: the node itself, or what it multiplies with β on its own."""
    yield value
    yield from (found["x"] for found in matches(idioms.ANYTHING * idioms.ANYTHING_ELSE, stripped))


def _query_and_key(query: Node, key: Node, dk: int) -> Iterator[tuple[Node, Node, bool]]:
    """Both before they are normalised, or as they are; the operator scales the query."""
    formulas = (idioms.L2_NORM * dk**-0.5, idioms.L2_NORM)
    scaled = _bound(idioms.ANYTHING * dk**-0.5, _stripped(query), "x")
    normed = [_bound(formula, _stripped(query), "x") for formula in formulas]
    if scaled is not None:  # and normalised before its heads were moved
        normed.append(_bound(idioms.L2_NORM, _stripped(scaled), "x"))
    raw = _bound(idioms.L2_NORM, _stripped(key), "x")
    yield from ((q, raw, True) for q in normed if q is not None and raw is not None)
    yield from ((q, key, False) for q in (scaled, query) if q is not None)


def equal_heads(query: Node, key: Node) -> bool:
    a, b = (_as_token(n.meta["val"], True) for n in (query, key))
    return equal_sizes(a.shape, b.shape)


def _operator_on(found: Candidate, reading: Reading, shape: Sequence[int]) -> Any:
    def run(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        given = [_as_token(values[n], i < 3) for i, n in enumerate(reading.operands)]
        state = values[found.state].clone() if found.write is None else values[found.state]
        out = torch.ops.fxfuse.recurrent_gated_delta_rule(*given, state, reading.normalise)
        return [out.reshape(-1, *shape[1:]), *([state] if found.write is None else [])]

    return run


def _accepted(program: Program, guards: Guards, judge: Judge, found: Candidate) -> Any:
    """(region, result, reading) under which the candidate is the operator, None for what is no step at all.

    Raises Refused for what almost is.
    """
    batch, heads, _, dv = found.sizes
    writers, dependents = writers_of(program.graph), _dependents(found.state)
    before = set(behind([found.new], ()))
    late = [n for n in program.graph.nodes if n in dependents and n not in before]
    by_head = [n for n in late if _is_per_head(n, batch, heads, dv)]
    for results in (by_head, [n for n in late if _is_flat(n, batch, heads * dv)]):
        first = next((n for n in results if found.new in behind([n], ())), None)
        if first is not None:
            break
    else:
        return None
    core = (set(behind([first], ())) | before) & dependents
    refused: Refused | None = None
    for result in reversed(results):
        for reading in readings_of(found, result, core):
            whole = behind([result, found.write or found.new], set(reading.operands), writers)
            tensors = {n for n in read_by(whole) if isinstance(n.meta.get("val"), Tensor)}
            if found.new not in whole or tensors - {*reading.operands, found.state}:
                continue
            try:
                reason = _reason(guards, judge, found, result, whole, reading)
            except Refused as refusal:  # of this reading, by the operator itself: another one may be right
                reason = refusal.node, refusal.reason
            if reason is None:
                return whole, result, reading
            refused = Refused(*reason)
    if refused is not None:
        raise refused
    return None


def _reason(
    guards: Guards, judge: Judge, found: Candidate, result: Node, region: list[Node], reading: Reading
) -> tuple[Node, str] | None:
    value = result.meta["val"]
    given = [_as_token(n.meta["val"], i < 3) for i, n in enumerate(reading.operands)]
    limit = unsupported(RULE, *given, found.state.meta["val"])
    if limit is not None:
        return found.state, limit
    if given[0].dtype != value.dtype:
        return result, "its query and its result differ in dtype"
    if found.new.meta["val"].dtype != found.state.meta["val"].dtype and found.write is None:
        return found.new, "the state that is returned and the one before it differ in dtype"
    outputs, states = ([result, found.new], []) if found.write is None else ([result], [found.state])
    reason = guards.reason(region, outputs, {value.dtype, torch.float32}, states, restored=True)
    if reason is not None:
        return reason
    users = {user for n in outputs for user in n.users} - set(region)
    early = next((u for u in users if guards.position[u] < guards.position[region[-1]]), None)
    if early is not None:
        return early, f"{early.name} reads the result before the whole step is done"
    shape = [size if isinstance(size, int) else -1 for size in value.shape]
    inputs = read_by(region)
    name = f"{RULE} {[inputs.index(n) for n in reading.operands if n in inputs]} {reading.normalise}"
    if not judge.equal(region, outputs, _operator_on(found, reading, shape), name, states):
        return result, "run on random values it is no step of the gated delta rule"
    return None


def _replace(
    program: Program, guards: Guards, found: Candidate, region: list[Node], result: Node, reading: Reading
) -> None:
    aten = torch.ops.aten
    with program.graph.inserting_after(region[-1]):
        anchor = program.graph.call_function(aten.alias.default, (result,))
    with program.graph.inserting_before(anchor):
        given = []
        for i, node in enumerate(reading.operands):
            target, *args = _to_token(node.meta["val"], i < 3) or (None,)
            given.append(node if target is None else call(program, result, target, node, *args))
        rule: Any = torch.ops.fxfuse.recurrent_gated_delta_rule.default
        state = found.state
        if found.write is None:
            state = call(program, result, aten.clone.default, state)
            state.kwargs = {"memory_format": torch.contiguous_format}
        out = call(program, result, rule, *given, state, reading.normalise)
        value, (batch, heads, _, dv) = result.meta["val"], found.sizes
        if not _is_per_head(result, batch, heads, dv):
            out = call(program, result, aten.flatten.using_ints, out, 2 if value.dim() == 3 else 1, 3)
        elif value.dim() == 3:
            out = call(program, result, aten.squeeze.dim, out, 1)
        elif not statically_known_true(value.shape[1] == 1):
            out = call(program, result, aten.transpose.int, out, 1, 2)
        guards.put_in_place(program, result, out)
        if found.write is None:
            guards.put_in_place(program, found.new, state)
    program.graph.erase_node(anchor)
    erase(program, region)


def run(program: Program) -> Outcome:
    """Rewrite every step; report every candidate that stays, with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    accepted: list[tuple[Candidate, Any]] = []
    for found in candidates(program):
        where = module_path(found.new)
        try:
            whole = _accepted(program, guards, judge, found)
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, where, refusal.node.name, refusal.reason))
            continue
        if whole is not None:
            accepted.append((found, whole))
            outcome.matches.append(Match(RULE, where, (), f"{len(whole[0])} calls → 1"))
    for found, (region, result, reading) in accepted:
        _replace(program, guards, found, region, result, reading)
    return outcome
