"""A plan's transforms for people: the layers that are treated alike, in one line."""

import re
from collections.abc import Iterable, Sequence

from fxfuse.passes.ranges import ranges
from fxfuse.passes.weights.row_map import RowMap
from fxfuse.passes.weights.tensor_spec import TensorSpec

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


def describe_transforms(transforms: Iterable[tuple[TensorSpec, Sequence[RowMap]]]) -> list[str]:
    """One line per kind of transform, such as `layers.{0..3}.mlp.gate_up_proj.weight [64, 8] <- ...`."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for target, panels in transforms:
        index = _INDEX.search(target.name)
        own = f".{index[0]}." if index else None
        line = [str(target), " <- ", " | ".join(map(str, panels))]
        kind = [part.replace(own, ".{}.") if own else part for part in line]
        kinds.setdefault((kind[0], "".join(kind[1:])), []).append(int(index[0]) if index else -1)
    return [
        target.replace("{}", ranges(layers))
        + rows.replace(".{}.", ".*." if len(layers) > 1 else f".{layers[0]}.")
        for (target, rows), layers in kinds.items()
    ]
