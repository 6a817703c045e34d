"""One target tensor of a plan: what fills it, and the filling."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxfuse.errors import PlanError
from fxfuse.passes.weights.row_map import RowMap, Rows
from fxfuse.passes.weights.tensor_spec import TensorSpec


@dataclass(frozen=True)
class Transform:
    """One target tensor and the source rows that fill it; a target dtype of None takes the sources' dtype.

    `beside` holds the row maps of what stands to the right of `rows`, as when row-parallel shards are joined.
    """

    target: TensorSpec
    rows: RowMap
    beside: tuple[RowMap, ...] = ()

    @property
    def panels(self) -> tuple[RowMap, ...]:
        """The row maps that stand side by side, from the left."""
        return (self.rows, *self.beside)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in order of first use."""
        if not self.beside:
            return self.rows.sources
        return tuple(dict.fromkeys(name for panel in self.panels for name in panel.sources))

    def blocks(self, widths: Mapping[str, int]) -> Iterator[tuple[int, int, Rows]]:
        """(target row, target column, block) for each block, the sources being `widths` wide."""
        left = 0
        for panel in self.panels:
            yield from ((at, left, rows) for at, rows in zip(panel.starts, panel.segments, strict=False))
            left += panel.segments[0].width(widths[panel.segments[0].source])

    def renamed(self, names: Mapping[str, str]) -> "Transform":
        """This transform with target and sources renamed; names that are left out stay."""
        target = replace(self.target, name=names.get(self.target.name, self.target.name))
        return Transform(target, self.rows.renamed(names), tuple(p.renamed(names) for p in self.beside))

    def to_data(self) -> dict[str, Any]:
        """The transform as JSON values."""
        data = {"target": self.target.to_data(), "rows": self.rows.to_data()}
        # only where there are any: what has none is written, and digested, as ever
        return data | ({"beside": [panel.to_data() for panel in self.beside]} if self.beside else {})

    @classmethod
    def from_data(cls, data: object) -> "Transform":
        """The transform that `to_data` wrote; raises PlanError for anything else."""
        if not isinstance(data, dict) or data.keys() - {"beside"} != {"target", "rows"}:
            raise PlanError("a transform is written as an object of target, rows and what stands beside them")
        beside = data.get("beside", [])
        if not isinstance(beside, list):
            raise PlanError("what stands beside the rows of a transform is a list")
        return cls(
            TensorSpec.from_data(data["target"]),
            RowMap.from_data(data["rows"]),
            tuple(map(RowMap.from_data, beside)),
        )


def filled_target(transform: Transform, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The target of `transform`, copied together block by block.

    Raises PlanError when its sources are on several devices.
    """
    target, members = transform.target, {name: tensors[name] for name in transform.sources}
    if len({tensor.device for tensor in members.values()}) > 1:
        where = ", ".join(f"{name} on {tensor.device}" for name, tensor in members.items())
        raise PlanError(f"{target.name}: its sources are on several devices ({where}); move them to one")
    first = next(iter(members.values()))
    # ordinary tensors even under inference_mode: they may become parameters later
    with torch.inference_mode(False), torch.no_grad():
        widths = {name: tensor.shape[-1] if tensor.dim() > 1 else 1 for name, tensor in members.items()}
        flat = {name: tensor.reshape(-1, widths[name]) for name, tensor in members.items()}
        out = torch.empty(target.shape, dtype=first.dtype, device=first.device)
        matrix = out.view(-1, target.width)
        for at, left, rows in transform.blocks(widths):
            block = flat[rows.source][rows.start : rows.stop]
            block = block[:, slice(*rows.columns)] if rows.columns else block
            block = block.t() if rows.transposed else block
            matrix[at : at + block.shape[0], left : left + block.shape[1]].copy_(block)
    return out
