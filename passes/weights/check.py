"""The proof that a plan loses nothing and uses nothing twice, by arithmetic on row ranges."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from fxfuse.errors import PlanError
from fxfuse.passes.weights.row_map import RowMap
from fxfuse.passes.weights.tensor_spec import TensorSpec


def check_plan(sources: Sequence[TensorSpec], transforms: Sequence[tuple[TensorSpec, RowMap]]) -> None:
    """Raises PlanError, listing every fault, unless the transforms are a bijection of rows of equal kind."""
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
    for target, rows in transforms:
        faults += _target_faults(target, rows, known)
    faults += _usage_faults(known, transforms)
    if faults:
        raise PlanError("not a valid weight plan:\n  " + "\n  ".join(faults))


def _target_faults(target: TensorSpec, rows: RowMap, known: Mapping[str, TensorSpec]) -> list[str]:
    faults = []
    if rows.rows != target.rows:
        faults.append(
            f"{target.name}: shape {list(target.shape)} has {target.rows} rows, {rows.rows} are given"
        )
    for name in rows.sources:
        source = known.get(name)
        if source is None:
            faults.append(
                f"{target.name}: takes rows of {name}, which is not among the sources; add its spec"
            )
        elif source.width != target.width:
            faults.append(
                f"{target.name}: rows of width {target.width} cannot hold those of {source} ({source.width})"
            )
        elif source.dtype != target.dtype:
            faults.append(
                f"{target.name}: dtype {target.dtype}, but {name} has {source.dtype}; leave one of them out"
            )
    return faults


def _usage_faults(
    known: Mapping[str, TensorSpec], transforms: Iterable[tuple[TensorSpec, RowMap]]
) -> list[str]:
    used: dict[str, list[tuple[int, int]]] = {name: [] for name in known}
    for _, rows in transforms:
        for segment in rows.segments:
            used.setdefault(segment.source, []).append((segment.start, segment.stop))
    faults = []
    for name, source in known.items():
        reached = 0
        for start, stop in sorted(used[name]):
            if start > reached:
                faults.append(f"{name}: rows {reached}:{start} are used by no transform")
            elif start < reached:
                faults.append(f"{name}: rows {start}:{min(stop, reached)} are used twice")
            reached = max(reached, stop)
        if reached < source.rows:
            faults.append(f"{name}: rows {reached}:{source.rows} are used by no transform")
        elif reached > source.rows:
            faults.append(
                f"{name}: rows up to {reached} are used, shape {list(source.shape)} has {source.rows}"
            )
    return faults


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
