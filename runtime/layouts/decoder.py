"""What every layout step looks at: the present tensors, layer by layer."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform
from fxfuse.runtime.families import Family
from fxfuse.runtime.layouts.geometry import Geometry


@dataclass(frozen=True)
class Decoder:
    """A decoder's family, sizes and tensors; a layer's path ends in a dot."""

    family: Family
    geometry: Geometry
    tensors: Mapping[str, TensorSpec]

    @property
    def layers(self) -> list[str]:
        """Paths of the layers under the first prefix that has any."""
        for prefix in self.family.prefixes:
            path = prefix + self.family.layer
            pattern = re.compile(re.escape(path).replace(re.escape("{index}"), r"(\d+)"))
            indices = {int(found[1]) for name in self.tensors if (found := pattern.match(name))}
            if indices:
                return [path.format(index=index) for index in sorted(indices)]
        return []

    def of_layers(self) -> Iterator[tuple[str, dict[str, TensorSpec]]]:
        """Each layer's path, and its tensors by their names within it."""
        layers: dict[str, dict[str, TensorSpec]] = {layer: {} for layer in self.layers}
        for name, spec in self.tensors.items():
            for path in _prefixes(name):
                if path in layers:
                    layers[path][name.removeprefix(path)] = spec
                    break
        yield from layers.items()


def _prefixes(name: str) -> Iterator[str]:
    """Every start of `name` that ends in ".3.", say."""
    for found in re.finditer(r"\.\d+\.", name):
        yield name[: found.end()]


def check_rows(spec: TensorSpec, rows: int, what: str) -> None:
    """Raises PlanError unless the tensor has the rows that the config gives it."""
    if spec.rows != rows:
        raise PlanError(
            f"{spec.name}: shape {list(spec.shape)} has {spec.rows} rows, the config gives {rows} ({what})"
        )


def renamed(spec: TensorSpec, name: str) -> Transform:
    """The same tensor under another name."""
    return Transform(TensorSpec(name, spec.shape, spec.dtype), RowMap.identity(spec.name, spec.rows))


def stacked(name: str, members: list[TensorSpec]) -> Transform:
    """The rows of all members, one after another."""
    shape = (sum(member.rows for member in members), *members[0].shape[1:])
    return Transform(
        TensorSpec(name, shape, members[0].dtype), RowMap.concat([(m.name, m.rows) for m in members])
    )


def cut(spec: TensorSpec, start: int, stop: int, name: str) -> Transform:
    """Rows start..stop-1 as a tensor of their own."""
    return Transform(
        TensorSpec(name, (stop - start, *spec.shape[1:]), spec.dtype), RowMap((Rows(spec.name, start, stop),))
    )
