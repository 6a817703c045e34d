"""The proof that a plan loses nothing and uses nothing twice, by arithmetic on row ranges."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from fxfuse.errors import PlanError
from fxfuse.passes.weights.row_map import RowMap, Rows
from fxfuse.passes.weights.tensor_spec import TensorSpec
from fxfuse.passes.weights.usage import Usage

Panels = Sequence[RowMap]


def check_plan(
    sources: Sequence[TensorSpec],
    transforms: Sequence[tuple[TensorSpec, Panels]],
    usages: Sequence[Usage] = (),
) -> None:
    """Raises PlanError, listing every fault, unless the transforms are a bijection of rows of equal kind.

    `usages` are the exceptions that are allowed: rows used in several places, or nowhere. Each must be one.
    """
    faults = [f"{name}: named as a source twice" for name in _repeated(source.name for source in sources)]
    faults += [
        f"{name}: filled by two transforms" for name in _repeated(target.name for target, _ in transforms)
    ]
    faults += [
        f"{spec.name}: shape {list(spec.shape)} has no elements; leave it out of the plan"
        for spec in (*sources, *(target for target, _ in transforms))
        if not spec.rows * spec.width
    ]
    known = {source.name: source for source in sources}
    for target, panels in transforms:
        faults += _target_faults(target, panels, known)
    faults += _usage_faults(known, transforms, usages)
    if faults:
        raise PlanError("not a valid weight plan:\n  " + "\n  ".join(faults))


def _target_faults(target: TensorSpec, panels: Panels, known: Mapping[str, TensorSpec]) -> list[str]:
    faults = [
        f"{target.name}: shape {list(target.shape)} has {target.rows} rows, {panel.rows} are given"
        for panel in panels
        if panel.rows != target.rows
    ]
    for name in dict.fromkeys(name for panel in panels for name in panel.sources):
        source = known.get(name)
        if source is None:
            faults.append(
                f"{target.name}: takes rows of {name}, which is not among the sources; add its spec"
            )
        elif source.dtype != target.dtype:
            faults.append(
                f"{target.name}: dtype {target.dtype}, but {name} has {source.dtype}; leave one of them out"
            )
    return faults + _width_faults(target, panels, known)


def _width_faults(target: TensorSpec, panels: Panels, known: Mapping[str, TensorSpec]) -> list[str]:
    """Blocks that are wider or narrower than the panel that they stand in, panels that do not fill a row."""
    faults, room = [], target.width
    for number, panel in enumerate(panels, start=1):
        blocks = {
            (segment.source, segment.columns, segment.width(known[segment.source].width)): segment
            for segment in panel.segments
            if segment.source in known
        }
        width = room if number == len(panels) else next((width for *_, width in blocks), 0)
        for (name, columns, wrong), segment in blocks.items():
            if wrong != width:
                block = known[name] if columns is None else segment
                faults.append(f"{target.name}: rows of width {width} cannot hold those of {block} ({wrong})")
            if columns and columns[1] > known[name].width:
                faults.append(f"{target.name}: {segment} is outside of {known[name]}")
        room -= width
    return faults


def _usage_faults(
    known: Mapping[str, TensorSpec],
    transforms: Iterable[tuple[TensorSpec, Panels]],
    usages: Iterable[Usage],
) -> list[str]:
    used: dict[str, list[Rows]] = {name: [] for name in known}
    for _, panels in transforms:
        for panel in panels:
            for segment in panel.segments:
                used.setdefault(segment.source, []).append(segment)
    declared = {(usage.source, usage.how): usage.role for usage in usages}
    faults = [
        f"{name}: declared as {how}, and no source of this plan"
        for name, how in declared
        if name not in known
    ]
    for name, source in known.items():
        if declared.get((name, "repeated")) == "per_tensor_scale" and source.rows * source.width != 1:
            faults.append(f"{name}: the scale of a tensor is one number, not of shape {list(source.shape)}")
        for how, breaches in row_uses(source, used[name]).items():
            if (name, how) not in declared:
                faults += breaches
            elif not breaches:
                faults.append(f"{name}: declared as {how} ({declared[name, how]}), and is not")
    return faults


def row_uses(source: TensorSpec, blocks: Sequence[Rows]) -> dict[str, list[str]]:
    """In words, the rows of `source` that `blocks` use several times ("repeated"), not at all ("partial"),
    or that it has not ("beyond")."""
    found: dict[str, list[str]] = {"repeated": [], "partial": [], "beyond": []}
    for side, ranges in _bands(source, blocks):
        unused, reached = found["partial"], 0
        for start, stop in sorted(ranges):
            if start > reached:
                unused.append(f"{source.name}: rows {reached}:{start}{side} are used by no transform")
            elif start < reached:
                again = f"{source.name}: rows {start}:{min(stop, reached)}{side} are used twice"
                found["repeated"].append(again)
            reached = max(reached, stop)
        if reached < source.rows:
            unused.append(f"{source.name}: rows {reached}:{source.rows}{side} are used by no transform")
        elif reached > source.rows:
            found["beyond"].append(
                f"{source.name}: rows up to {reached} are used, shape {list(source.shape)} has {source.rows}"
            )
    return found


def _bands(source: TensorSpec, blocks: Sequence[Rows]) -> list[tuple[str, list[tuple[int, int]]]]:
    """The row ranges used of each run of columns that no block cuts, with words for the run."""
    if all(block.columns is None for block in blocks):
        return [("", [(block.start, block.stop) for block in blocks])]
    windows: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for block in blocks:
        windows.setdefault(block.columns or (0, source.width), []).append((block.start, block.stop))
    cuts = sorted({0, source.width, *(cut for window in windows for cut in window)})
    return [
        (
            f" of columns {first}:{last}",
            [rows for window, ranges in windows.items() if window[0] <= first < window[1] for rows in ranges],
        )
        for first, last in pairwise(cuts)
    ]


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
