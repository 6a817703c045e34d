"""One decoded token of Gated DeltaNet, all between the input and the output projection, becomes one call.

Before: q, k, v = split(silu(conv1d(cat([conv_state, mixed]), w))); conv_state.copy_(…); β = sigmoid(b)
        g = -exp(A_log) * softplus(a + dt_bias); S = S * exp(g) + k̂ ⊗ β(v − (S * exp(g))ᵀ k̂); state.copy_(S)
        y = norm(Sᵀ q̂ / √dk) * silu(z)
After:  y = gdn_decode(q, k, v, z, b, a, conv_state, …, state, …)     parts of the projection's row, as views

What the row's parts are is told by numbering its features, what the other inputs are by their shapes; whether
all of it computes what the operator does, by running both.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from fxfuse.errors import ShapeError
from fxfuse.passes.judge import Judge
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.regions import Guards, Refused, behind, call, erase, read_by, writers_of
from fxfuse.passes.row_parts import Part, parts_of
from fxfuse.passes.storage_writes import storage_of
from fxfuse.patterns import ops
from fxfuse.patterns import readings as readings_of
from fxfuse.runtime.ops.limits import unsupported

RULE = "gdn_decode"


@dataclass(frozen=True)
class Sizes:
    """Heads and their sizes: Hk, r = HV / Hk, dk, dv."""

    key_heads: int
    ratio: int
    dk: int
    dv: int

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.dk + self.value_features

    @property
    def value_features(self) -> int:
        return self.value_heads * self.dv

    @property
    def value_heads(self) -> int:
        return self.key_heads * self.ratio

    def dims(self) -> tuple[tuple[int, ...], ...]:
        """Dimensions of query, key, value, z, b and a, without the batch."""
        k, v = (self.key_heads, self.dk), (self.key_heads, self.ratio, self.dv)
        return k, k, v, v, v[:2], v[:2]

    @classmethod
    def of(cls, conv_state: Node, state: Node) -> "Sizes":
        (_, channels, _), (_, heads, dk, dv) = (n.meta["val"].shape for n in (conv_state, state))
        if not all(isinstance(n, int) for n in (channels, heads, dk, dv)):
            raise Refused(state, "sizes of its states vary: rewrite(…, dynamic=False) takes them as they are")
        key_heads, rest = divmod(channels - heads * dv, 2 * dk) if dk else (0, 0)
        if rest or key_heads < 1 or heads % key_heads:
            raise Refused(
                conv_state, f"{channels} channels are not the queries, keys and values of {heads} heads"
            )
        return cls(key_heads, heads // key_heads, dk, dv)


@dataclass(frozen=True)
class Candidate:
    """Everything between two projections that moves two states on.

    Attributes:
        region: nodes in graph order, the writes of the states among them. result: what out_proj reads.
    """

    region: tuple[Node, ...]
    result: Node
    conv_state: Node
    state: Node


@dataclass(frozen=True)
class Reading:
    """One way to read a candidate's inputs as the operator's arguments."""

    sizes: Sizes
    parts: tuple[Part, ...]
    conv_weight: Node
    conv_bias: Node | None
    per_head: tuple[Node, Node]
    norm_weight: Node
    eps: float


def candidates(program: Program) -> Iterator[Candidate]:
    """What is read by one linear, computed from others, and writes to a state of four dimensions."""
    writers, linears = writers_of(program.graph), program.calls(ops.LINEAR)
    for linear in linears:
        result = linear.args[0]
        if not isinstance(result, Node) or result.op != "call_function":
            continue
        region = behind([result], set(linears), writers)
        inputs = read_by(region)
        rows = [n for n in inputs if n in linears]
        states = {_dims(n): n for n in inputs if n.op == "placeholder" and storage_of(n) in writers}
        if set(states) == {3, 4} and rows and all(_is_one_token(row) for row in rows):
            yield Candidate(tuple(region), result, states[3], states[4])


def _is_one_token(row: Node) -> bool:
    shape = row.meta["val"].shape
    return len(shape) == 3 and statically_known_true(shape[1] == 1)


def _dims(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def readings(found: Candidate) -> Iterator[Reading]:
    """Every reading that the shapes allow; raises Refused where there is none."""
    sizes = Sizes.of(found.conv_state, found.state)
    inputs = [n for n in read_by(found.region) if isinstance(n.meta.get("val"), Tensor)]
    rows = [n for n in inputs if str(n.target) == ops.LINEAR]
    parameters = [n for n in inputs if n not in (*rows, found.conv_state, found.state)]
    by_shape: dict[tuple[Any, ...], list[Node]] = defaultdict(list)
    for node in parameters:
        by_shape[tuple(node.meta["val"].shape)].append(node)
    taps = [n for n in parameters if _is_conv_weight(n, sizes.channels)]
    biases = by_shape.get((sizes.channels,), [])
    vectors = [n for n in parameters if n not in (*taps, *biases)]
    if len(taps) != 1 or len(biases) > 1 or len(vectors) != 3:
        raise Refused(
            found.result,
            f"it reads {len(parameters)} tensors besides its rows and states: {_names(parameters)}",
        )
    orders = [
        order
        for order in permutations(vectors)
        if [tuple(n.meta["val"].shape) for n in order]
        == [(sizes.value_heads,), (sizes.value_heads,), (sizes.dv,)]
    ]
    choices = list(_parts(rows, sizes))
    epsilons = readings_of.epsilons(tree_leaves([(n.args, n.kwargs) for n in found.region]))
    if not orders or not choices or not epsilons:
        raise Refused(found.result, "its inputs do not have the shapes of gates, norm and the parts of a row")
    for parts, (A_log, dt_bias, norm_weight), eps in product(choices, orders, epsilons):
        bias = biases[0] if biases else None
        yield Reading(sizes, parts, taps[0], bias, (A_log, dt_bias), norm_weight, eps)


def _is_conv_weight(node: Node, channels: int) -> bool:
    shape = tuple(node.meta["val"].shape)
    return shape[:1] == (channels,) and (len(shape) == 2 or (len(shape) == 3 and shape[1] == 1))


def _names(nodes: Sequence[Node]) -> str:
    return ", ".join(f"{n.name} {list(n.meta['val'].shape)}" for n in nodes)


def _parts(rows: Sequence[Node], sizes: Sizes) -> Iterator[tuple[Part, ...]]:
    """query, key, value, z, b, a: told apart by how many features they have."""
    found: dict[int, list[Part]] = defaultdict(list)
    for row in rows:
        for part in parts_of(row):
            found[len(part.features)].append(part)
    keys = sizes.key_heads * sizes.dk
    for mixed in found[sizes.channels]:
        q, k = mixed.taken(mixed.features[:keys]), mixed.taken(mixed.features[keys : 2 * keys])
        v = mixed.taken(mixed.features[2 * keys :])
        for z in found[sizes.value_features]:
            for b, a in permutations(found[sizes.value_heads], 2):
                parts = (q, k, v, z, b, a)
                if all(part.is_strided for part in parts):
                    yield parts


def _operator_on(found: Candidate, reading: Reading, shape: Sequence[int]) -> Any:
    def run(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        dims = reading.sizes.dims()
        parts = [p.of(values[p.linear], d).squeeze(1) for p, d in zip(reading.parts, dims, strict=True)]
        taps = values[reading.conv_weight]
        out = torch.ops.fxfuse.gdn_decode(
            *parts,
            values[found.conv_state],
            taps.reshape(taps.shape[0], taps.shape[-1]),
            None if reading.conv_bias is None else values[reading.conv_bias],
            *(values[n] for n in reading.per_head),
            values[reading.norm_weight],
            values[found.state],
            reading.eps,
        )
        elements = prod(shape[1:])
        if elements < 1 or out.numel() % elements:
            raise ShapeError(f"{found.result.name} {list(shape)} is no view of the result {tuple(out.shape)}")
        return [out.reshape(-1, *shape[1:])]

    return run


def _shape_of(result: Node) -> list[int]:
    """The shape as an argument of reshape; one size may vary."""
    shape = [size if isinstance(size, int) else -1 for size in result.meta["val"].shape]
    if shape.count(-1) > 1:
        raise Refused(result, "more than one size varies")
    return shape


def _accepted(guards: Guards, judge: Judge, found: Candidate) -> Reading:
    """The reading under which the candidate is the operator; raises Refused."""
    dtype = found.result.meta["val"].dtype
    states = (found.conv_state, found.state)
    reason = guards.reason(found.region, [found.result], {dtype, torch.float32}, states)
    if reason is not None:
        raise Refused(*reason)
    early = [u for u in found.result.users if guards.position[u] < guards.position[found.region[-1]]]
    if early:
        raise Refused(early[0], f"{early[0].name} reads the result before a state is written")
    shape = _shape_of(found.result)
    for reading in readings(found):
        if any(part.linear.meta["val"].dtype != dtype for part in reading.parts):
            raise Refused(found.result, "its rows and its result differ in dtype")
        limit = unsupported(RULE, *_operands(found, reading))
        if limit is not None:
            raise Refused(found.result, limit)
        name = f"{[part.features for part in reading.parts]} {reading.eps} {_order(found, reading)}"
        run = _operator_on(found, reading, shape)
        if judge.equal(found.region, [found.result], run, name, states):
            return reading
    raise Refused(
        found.result, "run on random values it is no step of the gated delta rule as gdn_decode takes it"
    )


def _operands(found: Candidate, reading: Reading) -> list[Tensor]:
    """Tensors as the operator will see them, but without memory."""
    parts = [
        torch.empty(1, *dims, device="meta", dtype=part.linear.meta["val"].dtype)
        for part, dims in zip(reading.parts, reading.sizes.dims(), strict=True)
    ]
    rest = (found.conv_state, reading.conv_weight, *reading.per_head, reading.norm_weight, found.state)
    return [*parts, *(n.meta["val"] for n in rest)]


def _order(found: Candidate, reading: Reading) -> list[int]:
    inputs = read_by(found.region)
    rows = [part.linear for part in reading.parts]
    return [inputs.index(n) for n in (*rows, *reading.per_head, reading.norm_weight)]


def _replace(program: Program, found: Candidate, reading: Reading) -> None:
    aten = torch.ops.aten
    with program.graph.inserting_after(found.region[-1]):
        anchor = program.graph.call_function(aten.alias.default, (found.result,))
    with program.graph.inserting_before(anchor):
        views = []
        for part, dims in zip(reading.parts, reading.sizes.dims(), strict=True):
            views.append(call(program, part.node, aten.squeeze.dim, part.view(program, dims), 1))
        taps = reading.conv_weight
        if taps.meta["val"].dim() == 3:
            taps = call(program, found.result, aten.squeeze.dim, taps, 1)
        out = call(
            program,
            found.result,
            torch.ops.fxfuse.gdn_decode.default,
            *views,
            found.conv_state,
            taps,
            reading.conv_bias,
            *reading.per_head,
            reading.norm_weight,
            found.state,
            reading.eps,
            program.round_beta,
        )
        shaped = call(program, found.result, aten.reshape.default, out, _shape_of(found.result))
    program.graph.erase_node(anchor)
    found.result.replace_all_uses_with(shaped)
    erase(program, found.region)


def run(program: Program) -> Outcome:
    """Rewrite every step; report every candidate that stays, with the reason."""
    outcome, guards, judge = Outcome(), Guards(program), Judge()
    accepted: list[tuple[Candidate, Reading]] = []
    for found in candidates(program):
        where = module_path(found.result).rpartition(".")[0] or module_path(found.result)
        try:
            accepted.append((found, _accepted(guards, judge, found)))
        except Refused as refusal:
            outcome.misses.append(Miss(RULE, where, refusal.node.name, refusal.reason))
            continue
        outcome.matches.append(Match(RULE, where, (), f"{len(found.region)} calls → 1"))
    for found, reading in accepted:
        _replace(program, found, reading)
    return outcome
