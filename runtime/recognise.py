"""Which layout tensors are in, told by their names alone."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from fxfuse.errors import PlanError
from fxfuse.passes.weights import TensorSpec, WeightPlan
from fxfuse.passes.weights.plan import DECODER_PREFIXES
from fxfuse.runtime.layouts.scales import SCALES


def way_back(
    there: Callable[[str], WeightPlan],
    layouts: Iterable[str],
    own: Iterable[str],
    given: Mapping[str, TensorSpec],
) -> WeightPlan | None:
    """The plan from the given tensors to a model's own, through the first of `layouts` that they are in.

    `there` gives the plan from the model's `own` tensors to a layout; PlanError where there is none. A layout
    fits when it accounts for all tensors of the decoder's layers, so that a name that means something else in
    another layout cannot mislead. None where no layout fits.
    """
    names = {bare(name) for name in given}
    layers = {name for name in map(bare, own) if name.startswith("layers.")}
    for layout in layouts:
        try:
            planned = there(layout)
        except PlanError:  # a layout that this model cannot be in
            continue
        read, made = ({bare(spec.name) for spec in specs} for specs in (planned.sources, planned.targets))
        needed = (layers - read) | made
        # scales of inputs are optional, and binding finds the scales that are not
        if {name for name in needed if not name.endswith(SCALES)} <= names:
            return back_through(planned, given)
    return None


def back_through(planned: WeightPlan, given: Mapping[str, TensorSpec]) -> WeightPlan:
    """The inverse of a plan, for tensors of any dtype, bound to those given; raises what `bind` raises."""
    if not len(planned):
        return planned
    any_dtype = WeightPlan(
        tuple(replace(source, dtype=None) for source in planned.sources),
        tuple(replace(t, target=replace(t.target, dtype=None)) for t in planned.transforms),
        planned.usages,
    )
    return any_dtype.inverse().bind(given)


def bare(name: str) -> str:
    """A name without the prefix under which it has the decoder."""
    return next(name.removeprefix(p) for p in DECODER_PREFIXES if name.startswith(p))
