"""Whether a call computes what a part of a graph does: both are run in float64 on the same random values.

A formula or a shape says where to look; this says whether it is so, whatever the spelling. Values are drawn
at two magnitudes, so that epsilons count. Sizes that vary get primes.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from fxfuse.passes.numbered_features import TRIALS
from fxfuse.passes.regions import Refused, read_by

# Elements that a value may have to be computed in float64: half a gigabyte.
MOST_ELEMENTS = 2**26
MAGNITUDES = (1.0, 1e-3)
TOLERANCE = 1e-7

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
    ) -> bool:
        """Whether `candidate` gives the values of `outputs`, and leaves `states` as the region does.

        Args:
            candidate: called with the values of the region's inputs, which it may write to.
            name: tells candidates apart where the regions are equal.
            given: a value for an input that must not be drawn at random, such as indices.

        Raises Refused where an input is too large to be drawn.
        """
        key = name + "\n" + _structure(region, outputs, states)
        if key not in self._known:
            self._known[key] = self._run(region, outputs, candidate, states, given)
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
            for trial, magnitude in enumerate(MAGNITUDES):
                inputs = _drawn(region, TRIALS[trial], magnitude, trial, given)
                theirs, ours = _copied(inputs), _copied(inputs)
                values = run(region, theirs)
                expected = [values[node] for node in outputs] + [theirs[s] for s in states]
                got = [*candidate(ours), *(ours[s] for s in states)]
                if not all(_close(e, g) for e, g in zip(expected, got, strict=True)):
                    return False
        return True


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
    magnitude: float,
    seed: int,
    given: Callable[[Node, Sequence[int]], Tensor | None],
) -> Values:
    sizes: dict[Any, int] = {}
    generator = torch.Generator().manual_seed(seed)
    values: Values = {}
    for node in read_by(region):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            values[node] = _concrete(value, sizes, primes)
            continue
        shape = [_concrete(size, sizes, primes) for size in value.shape]
        drawn = given(node, shape)
        if drawn is None and prod(shape) > MOST_ELEMENTS:
            raise Refused(node, f"{node.name} has {prod(shape)} elements: too many to run it and compare")
        if drawn is None and value.is_floating_point():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude
        elif drawn is None:
            drawn = torch.zeros(shape, dtype=value.dtype)
        values[node] = drawn
    return values


def _concrete(value: Any, sizes: dict[Any, int], primes: Sequence[int]) -> Any:
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        sizes.setdefault(symbol, primes[len(sizes) % len(primes)])
    return int(expression.subs(sizes))


def run(region: Sequence[Node], values: Mapping[Node, Any]) -> Values:
    """The region's values in float64 on a CPU; writes go to the values given."""
    known = dict(values)
    for node in region:
        args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
        args, kwargs = map_aggregate((args, kwargs), _exact)
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known


def _exact(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _structure(region: Sequence[Node], outputs: Sequence[Node], states: Sequence[Node]) -> str:
    names: dict[Node, str] = {}
    lines = []
    for node in read_by(region):
        names[node] = f"%{len(names)}"
        value = node.meta.get("val")
        lines.append(f"{names[node]} {tuple(value.shape) if isinstance(value, Tensor) else value}")
    for node in region:
        names[node] = f"%{len(names)}"
        args = map_arg((node.args, tuple(sorted(node.kwargs.items()))), lambda n: names[n])
        lines.append(f"{names[node]} {node.target} {args}")
    lines.append(f"{[names[n] for n in (*outputs, *states)]}")
    return "\n".join(lines)
