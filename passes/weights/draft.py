"""Several steps over the tensors of a checkpoint, joined into one plan."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from fxfuse.errors import PlanError
from fxfuse.passes.weights.check import row_uses
from fxfuse.passes.weights.plan import WeightPlan
from fxfuse.passes.weights.row_map import RowMap, Rows
from fxfuse.passes.weights.tensor_spec import TensorSpec
from fxfuse.passes.weights.transform import Transform
from fxfuse.passes.weights.usage import Usage


class Draft:
    """Named tensors that steps replace by others; `plan` gives the one plan that does all steps at once.

    Attributes:
        tensors: what is there after the steps taken so far, by name.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        self._given = dict(tensors)
        self.tensors = dict(tensors)
        self._made: dict[str, Transform] = {}
        self._roles: dict[tuple[str, str], str] = {}

    def then(self, transforms: Iterable[Transform], usages: Iterable[Usage] = ()) -> "Draft":
        """Take a step: the targets of `transforms` come in place of all tensors that they read.

        `usages` allow, for the tensors as they are now, what the step may do to their rows. Raises PlanError
        for a source that is not there, a name that is taken, and for blocks that cannot be looked up in
        tensors whose own blocks stand side by side.
        """
        transforms = list(transforms)
        for usage in usages:
            for name in self._origins(usage.source):
                self._roles[name, usage.how] = usage.role
        made = {transform.target.name: self._looked_up(transform) for transform in transforms}
        if len(made) < len(transforms):
            raise PlanError("a step fills one tensor twice: " + ", ".join(made))
        for name in {name for transform in transforms for name in transform.sources}:
            del self.tensors[name]
            self._made.pop(name, None)
        for name, transform in made.items():
            if name in self.tensors:
                raise PlanError(f"{name}: the name is taken by another tensor; rename or drop it")
            self.tensors[name] = transform.target
        self._made |= made
        return self

    def plan(self) -> WeightPlan:
        """The plan from the first tensors to the present ones, without those that did not change."""
        transforms = [made for made in self._made.values() if not self._is_unchanged(made)]
        blocks: dict[str, list[Rows]] = {}
        for transform in transforms:
            for panel in transform.panels:
                for block in panel.segments:
                    blocks.setdefault(block.source, []).append(block)
        usages = [
            Usage(name, how, self._roles[name, how])
            for name, used in blocks.items()
            if {(name, "repeated"), (name, "partial")} & self._roles.keys()
            for how, breaches in row_uses(self._given[name], used).items()
            if breaches and (name, how) in self._roles
        ]
        sources = (name for transform in transforms for name in transform.sources)
        return WeightPlan(
            tuple(self._given[name] for name in dict.fromkeys(sources)), tuple(transforms), tuple(usages)
        )

    def _origins(self, name: str) -> tuple[str, ...]:
        return self._made[name].sources if name in self._made else (name,)

    def _looked_up(self, transform: Transform) -> Transform:
        """`transform` with what it reads replaced by what that consists of."""
        absent = [name for name in transform.sources if name not in self.tensors]
        if absent:
            raise PlanError(f"{transform.target.name}: needs {', '.join(absent)}, which are not there")
        if transform.target.dtype is None and (dtype := self.tensors[transform.sources[0]].dtype):
            transform = replace(transform, target=replace(transform.target, dtype=dtype))
        inner = {name: self._made[name] for name in transform.sources if name in self._made}
        if not inner:
            return transform
        if any(step.beside for step in inner.values()):
            return self._whole(transform, inner)
        maps = {name: step.rows for name, step in inner.items()}
        panels: list[RowMap] = [panel.substitute(maps) for panel in transform.panels]
        return Transform(transform.target, panels[0], tuple(panels[1:]))

    def _whole(self, transform: Transform, inner: Mapping[str, Transform]) -> Transform:
        """Blocks side by side are only passed on whole: the tensor under another name or shape."""
        (name, *others) = transform.sources
        whole = RowMap.identity(name, self.tensors[name].rows)
        if others or transform.beside or transform.rows != whole:
            raise PlanError(
                f"{transform.target.name}: {name} stands side by side in its sources; plan it alone"
            )
        return Transform(transform.target, inner[name].rows, inner[name].beside)

    def _is_unchanged(self, made: Transform) -> bool:
        given = self._given.get(made.target.name)
        return given == made.target and made.panels == (RowMap.identity(given.name, given.rows),)
