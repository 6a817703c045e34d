"""Whether a call computes what a part of a graph does: both are run in float64 on the same random values.

A formula or a shape says where to look; this says whether it is so, whatever the spelling. Values are drawn
at two magnitudes, so that epsilons count, and at larger and mixed ones where an operator acts on some values
only, until the outputs show what it does; one that did nothing to any of them is not taken for nothing. Masks
and whole numbers are drawn as 0 and 1, each of them either in turn, so that none is dropped unseen; where a
region does not run on them they are 0. Sizes that vary get primes, and so does a batch that is too large.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import cycle, product
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from fxfuse.errors import ShapeError
from fxfuse.passes.left_out import LeftOut, is_unknown, left_out
from fxfuse.passes.numbered_features import TRIALS
from fxfuse.passes.regions import Refused, read_by
from fxfuse.patterns import ops

# Elements that a value may have to be computed in float64: half a gigabyte.
MOST_ELEMENTS = 2**26
MAGNITUDES = ((1.0,), (1e-3,))
# Beyond the threshold of softplus; its exponentials are finite in float64. A single value is beyond it in a
# quarter of the trials. A large factor hides what another one does: in every other trial one input in turn is
# large and the others are small, in others each has a magnitude of its own. As many are made as it takes, up
# to a bound.
MIXED = (0.3, 1.0, 3.0, 10.0, 30.0)
ONE_LARGE = (0.1, 30.0)
LARGE = ((30.0,), ONE_LARGE, MIXED, ONE_LARGE) * 8
OF_UNKNOWN = 8  # of these, for an operator of which nobody has said that it does the same to all values
TOLERANCE = 1e-7
_FAR = (50, 75, 100, 150, 200, 300, 400, 500, 600, 700, 1e3, 3e3, 1e4, 1e5, 1e6)
# From there on a function may overflow, and what is not finite tells nothing.
LINE = (*(n / 4 for n in range(-160, 161)), *_FAR, *(-far for far in _FAR))
MOST_TIED = 6  # sizes for which combinations of primes are tried
# What whole inputs stay 0, in the order in which it is tried: none, numbers, masks as well.
_NUMBERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ZEROS: tuple[tuple[torch.dtype, ...], ...] = ((), _NUMBERS, (*_NUMBERS, torch.bool))
_FAILURES = (RuntimeError, IndexError, ValueError)

Values = dict[Node, Any]
Candidate = Callable[[Mapping[Node, Any]], Sequence[Tensor]]


class Judge:
    """Judges regions of one graph; equal ones once."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}

    def equal(
        self,
        region: Sequence[Node],
        outputs: Sequence[Node],
        candidate: Candidate,
        name: str,
        states: Sequence[Node] = (),
        given: Callable[[Node, Sequence[int]], Tensor | None] = lambda node, shape: None,
        along: Sequence[Node] = (),
    ) -> bool:
        """Whether `candidate` gives the values of `outputs`, and leaves `states` as the region does.

        Args:
            candidate: called with the values of the region's inputs, which it may write to.
            name: tells candidates apart where the regions are equal.
            given: a value for an input that must not be drawn at random, such as indices.
            along: inputs to which functions of one number are applied; these are compared at all of `LINE`.

        Raises Refused where an input is too large to be drawn.
        """
        key = name + "\n" + _structure(region, outputs, states)
        if key not in self._known:
            same = self._run(region, outputs, candidate, states, given)
            self._known[key] = same and _same_along(region, outputs, candidate, given, along)
        return self._known[key]

    def _run(
        self,
        region: Sequence[Node],
        outputs: Sequence[Node],
        candidate: Candidate,
        states: Sequence[Node],
        given: Callable[[Node, Sequence[int]], Tensor | None],
    ) -> bool:
        with unset_fake_temporarily(), torch.no_grad():
            batch = _large_batch(region)
            unseen = {each: False for node in region for each in left_out(node)}  # whether it has acted
            unknown = any(is_unknown(node) for node in region)
            known = len(MAGNITUDES) + (OF_UNKNOWN if unknown else bool(unseen))  # trials made in any case

            def shown(values: Values, written: Values) -> list[Tensor]:
                return [values[node] for node in outputs] + [written[state] for state in states]

            for trial, magnitudes in enumerate((*MAGNITUDES, *LARGE)):
                if trial >= known and not unseen:
                    break
                sizes = TRIALS[trial % len(TRIALS)]
                fewer = Fewer(batch, sizes[0])
                for zeros in _ZEROS:
                    inputs = _drawn(region, sizes, magnitudes, trial, given, fewer, zeros)
                    theirs, ours = _copied(inputs), _copied(inputs)
                    try:
                        values = run(region, theirs, fewer)
                        expected = shown(values, theirs)
                    except (Refused, *_FAILURES):  # an index out of range, say
                        if zeros is _ZEROS[-1]:
                            raise
                        continue
                    if all(bool(torch.isfinite(e).all()) for e in expected):
                        break  # no row is masked as a whole
                try:
                    got = [*candidate(ours), *(ours[s] for s in states)]
                except ShapeError as error:  # the operator's own word on what it does not take
                    raise Refused(outputs[0], str(error)) from error
                except KeyError as error:  # an input that the region does not read
                    if not isinstance(error.args[0], Node):
                        raise
                    raise Refused(outputs[0], "one of its inputs is computed from another") from error
                except (RuntimeError, IndexError):  # where the region runs
                    return False
                if not _all_close(expected, got):
                    return False
                for each in list(unseen):
                    without = run(region, others := _copied(inputs), fewer, each)
                    if not _all_close(expected, shown(without, others)):
                        del unseen[each]
                    elif each.acts(values, without):
                        unseen[each] = True
        idle = [each.node for each, acted in unseen.items() if not acted]
        if idle:
            raise Refused(idle[0], f"{idle[0].name} acts on values that no trial has: it cannot be left out")
        return True


def _same_along(
    region: Sequence[Node],
    outputs: Sequence[Node],
    candidate: Candidate,
    given: Callable[[Node, Sequence[int]], Tensor | None],
    along: Sequence[Node],
) -> bool:
    """Whether both give the same, digit by digit, for inputs on a line; the others are 0."""
    with unset_fake_temporarily(), torch.no_grad():
        fewer, line = Fewer(_large_batch(region), TRIALS[0][0]), torch.tensor(LINE, dtype=torch.float64)
        inputs = _drawn(region, TRIALS[0], (0.0,), 0, given, fewer, _ZEROS[-1])
        count = max(min((inputs[node].numel() for node in along), default=len(LINE)), 1)
        for start in range(0, len(LINE) if along else 0, count):
            for node in along:
                places = torch.arange(start, start + inputs[node].numel()).clamp(max=len(LINE) - 1)
                inputs[node] = line[places].view_as(inputs[node])
            values, got = run(region, _copied(inputs), fewer), candidate(_copied(inputs))
            for expected, y in zip((values[n] for n in outputs), got, strict=True):
                known = expected.isfinite()
                if not torch.allclose(expected[known], y[known], TOLERANCE, TOLERANCE):
                    return False
    return True


class Fewer(NamedTuple):
    """`few` sequences are run instead of a batch; all of them where that is None."""

    batch: int | None
    few: int

    def size(self, size: Any) -> Any:
        return self.few if size == self.batch else size

    def shape(self, value: Any) -> Any:
        """A list of sizes, of which the first may be the batch; any other argument as it is."""
        if self.batch is None or not isinstance(value, (list, tuple)) or not value:
            return value
        return [self.size(value[0]) if type(value[0]) is int else value[0], *value[1:]]

    def check(self, node: Node, value: Any) -> None:
        """Raise Refused where a value is no batch of fewer sequences."""
        expected = node.meta.get("val")
        if self.batch is None or not isinstance(expected, Tensor):
            return
        wanted = [self.size(size) if i == 0 else size for i, size in enumerate(expected.shape)]
        if len(wanted) != value.dim() or any(
            type(a) is int and a != b for a, b in zip(wanted, value.shape, strict=True)
        ):
            raise Refused(node, f"{node.name} is too large to run it and compare")


def _large_batch(region: Sequence[Node]) -> int | None:
    """The first size of an input with too many elements, if it is more than would be run instead."""
    for node in read_by(region):
        value = node.meta.get("val")
        shape: list[Any] = list(value.shape) if isinstance(value, Tensor) else []
        if len(shape) > 1 and all(type(n) is int for n in shape) and prod(shape) > MOST_ELEMENTS:
            return shape[0] if shape[0] > max(primes[0] for primes in TRIALS) else None
    return None


def _all_close(expected: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return all(_close(e, g) for e, g in zip(expected, got, strict=True))


def _close(expected: Tensor, got: Tensor) -> bool:
    if expected.shape != got.shape or not bool(torch.isfinite(expected).all()):
        return False
    scale = expected.abs().amax() if expected.numel() else torch.zeros(())
    return bool(((expected - got).abs() <= TOLERANCE * scale).all())


def _copied(values: Values) -> Values:
    return {node: v.clone() if isinstance(v, Tensor) else v for node, v in values.items()}


def _drawn(
    region: Sequence[Node],
    primes: Sequence[int],
    magnitudes: Sequence[float],
    seed: int,
    given: Callable[[Node, Sequence[int]], Tensor | None],
    fewer: Fewer,
    zeros: Sequence[torch.dtype],
) -> Values:
    sizes = _sizes(region, primes)
    generator = torch.Generator().manual_seed(seed)
    drawn_nodes = [node for node in read_by(region) if _is_inexact(node.meta.get("val"))]
    alone = drawn_nodes[seed // 2 % len(drawn_nodes)] if magnitudes is ONE_LARGE and drawn_nodes else None
    values: Values = {}
    for node in read_by(region):
        value = node.meta.get("val")
        constant = _constant(node)
        if constant is not None:
            values[node] = constant
            continue
        if isinstance(value, (list, tuple)):
            raise Refused(node, f"{node.name} is several tensors: which of them share memory is not known")
        if not isinstance(value, Tensor):
            values[node] = _concrete(value, sizes, primes)
            continue
        shape = [_concrete(size, sizes, primes) for size in value.shape]
        shape = fewer.shape(shape) if len(shape) > 1 else shape
        drawn = given(node, shape)
        if drawn is None and prod(shape) > MOST_ELEMENTS:
            raise Refused(node, f"{node.name} has {prod(shape)} elements: too many to run it and compare")
        if drawn is None and _is_inexact(value):
            dtype = torch.complex128 if value.is_complex() else torch.float64
            drawn = torch.randn(shape, generator=generator, dtype=dtype)
            drawn *= magnitudes[node is alone] if alone is not None else _one_of(magnitudes, generator)
        elif drawn is None:
            drawn = torch.zeros(shape, dtype=value.dtype)
            if value.dtype not in zeros:
                bits = torch.Generator().manual_seed(len(values))
                drawn += torch.randint(2, shape, generator=bits).to(value.dtype) ^ bool(seed % 2)
        values[node] = drawn
    return values


def _is_inexact(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _one_of(magnitudes: Sequence[float], generator: torch.Generator) -> float:
    return magnitudes[int(torch.randint(len(magnitudes), (), generator=generator))]


def _constant(node: Node) -> Tensor | None:
    """The tensor that a node names, in float64 where it is floating; None if anybody might write to it."""
    module = node.graph.owning_module
    copied = all(str(user.target) == ops.CONSTANT_COPY for user in node.users)
    if node.op != "get_attr" or module is None or not copied:
        return None
    value = attrgetter(str(node.target))(module)
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return None
    return value.to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def _sizes(region: Sequence[Node], primes: Sequence[int]) -> dict[Any, int]:
    """Primes for the sizes that vary, different ones unless the graph says that products are equal."""
    sizes: dict[Any, int] = {}
    values = [node.meta.get("val") for node in read_by(region)]
    numbers: list[Any] = [n for v in values for n in (v.shape if isinstance(v, Tensor) else [v])]
    numbers = [n for n in numbers if isinstance(n, torch.SymInt)]
    for number in numbers:
        _concrete(number, sizes, primes)
    env: Any = numbers[0].node.shape_env if numbers else None
    found = [env.replace(guard.expr) for guard in env.guards] if env else []
    equal = [e for e in found if isinstance(e, sympy.Eq) and e.free_symbols and e.free_symbols <= set(sizes)]
    tied = sorted(set[Any]().union(*(each.free_symbols for each in equal)), key=str)
    if all(each.subs(sizes) for each in equal) or not all(map(env.has_guarding_hint, tied)):
        return sizes
    traced = tuple(env.guarding_hint_or_throw(symbol) for symbol in tied)
    return {**sizes, **_together(tuple(equal), tuple(tied), tuple(primes), traced)}


@lru_cache(64)
def _together(
    equal: Sequence[Any], tied: Sequence[Any], primes: Sequence[int], traced: Sequence[int]
) -> dict[Any, int]:
    """Sizes for which the equations hold, as many different ones as may be: primes or, where none do, also
    what they were traced with; then sizes that were traced alike have the same prime.
    """
    of_traced = dict(zip(dict.fromkeys(traced), cycle(primes), strict=False))
    ways = [[primes[: max(2, len(tied) // 2)]] * len(tied)] if len(tied) <= MOST_TIED else []
    if len(tied) <= 2 * MOST_TIED:
        ways.append([(size, of_traced[size]) for size in traced])
    for way in ways:
        fitting = [dict(zip(tied, each, strict=True)) for each in product(*way)]
        fitting = [each for each in fitting if all(equation.subs(each) for equation in equal)]
        merits = [(len(set(each.values())), sum(n in primes for n in each.values())) for each in fitting]
        best = [each for each, merit in zip(fitting, merits, strict=True) if merit == max(merits)]
        if best:
            return best[len(best) // 2]  # the first has the two products alike
    return dict(zip(tied, traced, strict=True))


def _concrete(value: Any, sizes: dict[Any, int], primes: Sequence[int]) -> Any:
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        sizes.setdefault(symbol, primes[len(sizes) % len(primes)])
    return int(expression.subs(sizes))


def run(
    region: Sequence[Node], values: Mapping[Node, Any], fewer: Fewer, without: LeftOut | None = None
) -> Values:
    """The region's values in float64 on a CPU; writes go to those given. One operator may be left out."""
    known = dict(values)
    for node in region:
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        args, kwargs = map_aggregate((tuple(map(fewer.shape, args)), kwargs), _exact)
        call: Any = without.call if without is not None and without.node is node else node.target
        try:
            known[node] = call(*args, **kwargs)
        except _FAILURES as error:
            why = (
                "is too large to run it and compare" if fewer.batch is not None else f"cannot be run: {error}"
            )
            raise Refused(node, f"{node.name} {why}") from error
        if not node.all_input_nodes and isinstance(known[node], Tensor) and known[node].is_floating_point():
            known[node] = known[node].double()  # torch.ones(n), say, has the default dtype
        fewer.check(node, known[node])
    return known


def _exact(value: Any) -> Any:
    if isinstance(value, torch.dtype) and (value.is_floating_point or value.is_complex):
        return torch.complex128 if value.is_complex else torch.float64
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _structure(region: Sequence[Node], outputs: Sequence[Node], states: Sequence[Node]) -> str:
    names: dict[Node, str] = {}
    lines = []
    for node in read_by(region):
        names[node] = f"%{len(names)}"
        value = node.meta.get("val")
        own = node.target if node.op == "get_attr" else ""
        lines.append(f"{names[node]} {own} {tuple(value.shape) if isinstance(value, Tensor) else value}")
    for node in region:
        names[node] = f"%{len(names)}"
        args = map_arg((node.args, tuple(sorted(node.kwargs.items()))), lambda n: names[n])
        lines.append(f"{names[node]} {node.target} {args}")
    lines.append(f"{[names[n] for n in (*outputs, *states)]}")
    return "\n".join(lines)
