"""The scales of FP8 weights, moved as their weights are: nothing is quantised anew.

Read by: the programs that read the layout; SGLang's packed loader (sglang#23062) takes block tables by rows
of blocks and one scale for each logical shard.

    block tables  X.weight_scale_inv [rows/128, columns/128]: the weight's row map, divided by the block
    per channel   X.weight_scale [rows, 1]: the weight's row map
    per tensor    X.weight_scale, X.input_scale, one number: one for each logical shard, given to all of them

What a scale is for follows from the config and its name, never from its number of elements: A_log, a bias
and a 1x1 block table have one element, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform, Usage
from fxfuse.runtime.quantization import Scheme

# one number for the inputs of a linear, whatever the scheme of its weight
_INPUT = "input_scale"
_OF_WEIGHTS = ("weight_scale_inv", "weight_scale")
SCALES = (*_OF_WEIGHTS, _INPUT)
_OTHER = ("weight_scale_2", "weight_zero_point", "weight_offset", "weight_packed", "qweight", "g_idx")

Step = tuple[list[Transform], list[Usage]]


def scales_of(weight: str, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """The kinds of scales that a weight has, by the names of the tensors beside it."""
    module, _, leaf = weight.rpartition(".")
    if leaf != "weight":
        return ()
    return tuple(kind for kind in (*SCALES, *_OTHER) if f"{module}.{kind}" in tensors)


def with_scales(
    transforms: Iterable[Transform],
    tensors: Mapping[str, TensorSpec],
    scheme: Scheme,
    logical: Mapping[str, int] | None = None,
) -> Step:
    """The step with that of the scales added.

    `logical` says, for names of modules, of how many logical shards a tensor consists (default 1).

    Raises PlanError for FP8 weights without a scale, for scales of weights that are not FP8, for scales that
    have not the shape of their scheme, and where merging would need new ones.
    """
    transforms, added, usages = list(transforms), [], []
    uses: dict[str, int] = {}
    moved = {name for transform in transforms for name in transform.sources}
    for transform in transforms:
        kinds = {name: _checked(name, tensors, scheme) for name in transform.sources}
        if len(set(kinds.values())) > 1:
            listed = ", ".join(f"{name}: {'+'.join(kind) or 'none'}" for name, kind in kinds.items())
            raise PlanError(f"{transform.target.name}: its members have different scales ({listed})")
        for kind in next(iter(kinds.values())):
            scale = _scale(transform, kind, tensors, scheme, logical or {})
            # a scale that the step moves by itself, as under a new name, needs no second way
            if scale is None or not moved.isdisjoint(scale.sources):
                continue
            added.append(scale)
            for block in scale.rows.segments:
                uses[block.source] = uses.get(block.source, 0) + len(block)
    for name, count in uses.items():
        spec = tensors[name]
        if count > spec.rows and spec.rows * spec.width == 1 and _is_per_tensor(name, scheme):
            usages.append(Usage(name, "repeated", "per_tensor_scale"))
    return [*transforms, *added], usages


def _checked(name: str, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[str, ...]:
    """The kinds of scales of one source, which must be those of its dtype."""
    kinds = scales_of(name, tensors)
    quantised = (tensors[name].dtype or "").startswith("float8")
    other = [kind for kind in kinds if kind in _OTHER]
    if other:
        raise PlanError(
            f"{name}: quantised with {scheme.name}, and its {other[0]} is not known to belong to it"
        )
    if quantised and name.endswith(".weight") and not set(kinds) & set(_OF_WEIGHTS):
        raise PlanError(
            f"{name}: {tensors[name].dtype} without a scale beside it; fetch the checkpoint again"
        )
    if kinds and not quantised:
        raise PlanError(f"{name}: {tensors[name].dtype}, yet with {kinds[0]}; which of them is right?")
    return kinds


def _scale(
    transform: Transform,
    kind: str,
    tensors: Mapping[str, TensorSpec],
    scheme: Scheme,
    logical: Mapping[str, int],
) -> Transform | None:
    """One kind of scale of one target, or None where the same scale stays beside the same weight."""
    names = {name: f"{name.removesuffix('weight')}{kind}" for name in transform.sources}
    target = f"{transform.target.name.removesuffix('weight')}{kind}"
    if _is_per_tensor(target, scheme):
        return _per_tensor(transform, target, names, tensors, logical)
    dtype = tensors[next(iter(names.values()))].dtype
    if scheme.strategy == "channel":
        return _per_channel(transform, target, names, tensors, dtype)
    block = _block_of(transform, names, tensors, scheme)
    sizes = {name: (tensors[name].rows, tensors[name].width) for name in names}
    panels = [panel.divided(block, sizes).renamed(names) for panel in transform.panels]
    widths = {scale: tensors[scale].width for scale in names.values()}
    width = sum(panel.segments[0].width(widths[panel.segments[0].source]) for panel in panels)
    return Transform(TensorSpec(target, (panels[0].rows, width), dtype), panels[0], tuple(panels[1:]))


def _is_per_tensor(name: str, scheme: Scheme) -> bool:
    return name.endswith("." + _INPUT) or scheme.strategy == "tensor"


def _per_tensor(
    transform: Transform,
    target: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    logical: Mapping[str, int],
) -> Transform | None:
    """One number for each logical shard; whole tensors only may stand one after another."""
    for name, scale in names.items():
        if tensors[scale].rows * tensors[scale].width != 1:
            raise PlanError(f"{tensors[scale]}: {name} has one scale as a whole; this is not one number")
    if len(transform.sources) == 1:
        (scale,) = names.values()
        count = logical.get(_module(transform.sources[0]), 1)
        if count == 1:
            own = tensors[scale]
            return (
                None
                if scale == target
                else Transform(TensorSpec(target, own.shape, own.dtype), RowMap.identity(scale, 1))
            )
    whole = [(name, tensors[name].rows) for name in transform.sources]
    if transform.beside or transform.rows != RowMap.concat(whole):
        raise PlanError(
            f"{transform.target.name}: its members have one scale each as a whole, so their rows cannot be "
            "interleaved or turned without quantising anew"
        )
    rows = RowMap(
        tuple(
            Rows(names[name], 0, 1)
            for name in transform.sources
            for _ in range(logical.get(_module(name), 1))
        )
    )
    return Transform(TensorSpec(target, (rows.rows,), tensors[rows.sources[0]].dtype), rows)


def _per_channel(
    transform: Transform,
    target: str,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    dtype: str | None,
) -> Transform | None:
    """The weight's rows; a rank's columns keep all of them."""
    for name, scale in names.items():
        if tensors[scale].rows * tensors[scale].width != tensors[name].rows:
            raise PlanError(f"{tensors[scale]}: {tensors[name]} needs one scale for each of its rows")
    if transform.beside or any(block.transposed for block in transform.rows.segments):
        raise PlanError(f"{transform.target.name}: scales by output channel cannot be turned with the weight")
    rows = RowMap(tuple(replace(block, columns=None) for block in transform.rows.segments)).renamed(names)
    first = tensors[next(iter(names.values()))]
    if target == first.name and rows == RowMap.identity(first.name, first.rows):
        return None
    return Transform(TensorSpec(target, (rows.rows, *first.shape[1:]), dtype), rows)


def _block_of(
    transform: Transform,
    names: Mapping[str, str],
    tensors: Mapping[str, TensorSpec],
    scheme: Scheme,
) -> tuple[int, int]:
    """The block, after checking each table's shape; a ue8m0 table may have a row for each of the weight's."""
    blocks = set()
    for name, scale in names.items():
        rows, width, table = tensors[name].rows, tensors[name].width, tensors[scale]
        columns = -(-width // scheme.block[1])
        by_row = table.dtype == "float8_e8m0fnu" and table.shape == (rows, columns)
        if not by_row and table.shape != (-(-rows // scheme.block[0]), columns):
            raise PlanError(
                f"{table}: no table of {scheme.block[0]}x{scheme.block[1]} blocks of {tensors[name]}"
            )
        blocks.add((1 if by_row else scheme.block[0], scheme.block[1]))
    if len(blocks) > 1:
        raise PlanError(f"{transform.target.name}: its members have tables of different blocks")
    return blocks.pop()


def _module(weight: str) -> str:
    return weight.removesuffix(".weight").rpartition(".")[2]


def by_scales(members: Sequence[TensorSpec], tensors: Mapping[str, TensorSpec]) -> list[list[TensorSpec]]:
    """The members in runs that can be merged: of one dtype, with the same kinds of scales."""
    runs: dict[tuple[object, ...], list[TensorSpec]] = {}
    for member in members:
        runs.setdefault((member.dtype, scales_of(member.name, tensors)), []).append(member)
    return list(runs.values())
