"""The scales of FP8 weights, moved as their weights are: nothing is quantised anew.

Read by: the programs that read the layout; SGLang's packed loader (sglang#23062) takes block tables by rows
of blocks and one scale for each logical shard.

    block tables  X.weight_scale_inv [rows/128, columns/128]: the weight's row map, divided by the block
    per channel   X.weight_scale [rows, 1]: the weight's row map
    per tensor    X.weight_scale, X.input_scale, one number: one for each logical shard, given to all of them
    of a stack    X_scale_inv, X_scale [E, ...] beside X = experts.gate_up_proj: each expert's part of them;
                  one number for an expert's gate and up is given to both

What a scale is for follows from the config and its name, never from its number of elements: A_log, a bias
and a 1x1 block table have one element, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform, Usage

if TYPE_CHECKING:
    from fxfuse.runtime.quantization import Scheme

# one number for the inputs of a linear, whatever the scheme of its weight
_INPUTS = ("input_scale", "activation_scale")
_OF_WEIGHTS = ("weight_scale_inv", "weight_scale")
SCALES = (*_OF_WEIGHTS, *_INPUTS)
_OTHER = ("weight_zero_point", "weight_offset")

# experts as one tensor: a parameter without a leaf of its own
_STACK = re.compile(r"(.*\.)?experts\.(gate_up|down)_proj")

Step = tuple[list[Transform], list[Usage]]


def is_stack(weight: str) -> bool:
    """Whether a name is that of all experts of a layer in one tensor."""
    return _STACK.fullmatch(weight) is not None


def scale_name(weight: str, kind: str) -> str:
    """What one kind of scale of a weight is called: `X.weight_scale`, or `X_scale` where X is a stack."""
    if is_stack(weight):
        return f"{weight}_{kind.removeprefix('weight_')}"
    return weight.removesuffix("weight") + kind


def scale_kind(name: str) -> str | None:
    """Which of SCALES a tensor is by its name, beside a weight or beside a stack; None where it is none."""
    leaf = name.rpartition(".")[2]
    if leaf in SCALES:
        return leaf
    stack = _STACK.match(name)
    return next((kind for kind in SCALES if stack and name == scale_name(stack[0], kind)), None)


def scales_of(weight: str, tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """The kinds of scales that a weight has, by the names of the tensors beside it."""
    if not is_stack(weight) and weight.rpartition(".")[2] != "weight":
        return ()
    return tuple(kind for kind in (*SCALES, *_OTHER) if scale_name(weight, kind) in tensors)


def proportional(start: int, stop: int, rows: int, count: int) -> tuple[int, int] | None:
    """Which of `count` values for `rows` rows are those of rows start..stop-1; None where none are.

    One value is for all rows. Several belong to equal runs of rows, and must be cut where a run ends.
    """
    if count == 1:
        return (0, 1)
    if rows % count or (start * count) % rows or (stop * count) % rows:
        return None
    return start * count // rows, stop * count // rows


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
    of_stacks = {scale_name(name, kind) for name in moved if is_stack(name) for kind in SCALES}
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
        if count > spec.rows and name in of_stacks:
            usages.append(Usage(name, "repeated", "expert_scale"))
        elif count > spec.rows and spec.rows * spec.width == 1 and _is_per_tensor(name, scheme):
            usages.append(Usage(name, "repeated", "per_tensor_scale"))
    return [*transforms, *added], usages


def check_every_scale(names: Iterable[str], tensors: Mapping[str, TensorSpec]) -> None:
    """Raises PlanError for an FP8 weight without a scale: its values mean nothing, moved or not."""
    for name in names:
        quantised = (tensors[name].dtype or "").startswith("float8")
        is_weight = is_stack(name) or name.endswith(".weight")
        if quantised and is_weight and not set(scales_of(name, tensors)) & set(_OF_WEIGHTS):
            raise PlanError(
                f"{name}: {tensors[name].dtype} without a scale beside it; fetch the checkpoint again"
            )


def _checked(name: str, tensors: Mapping[str, TensorSpec], scheme: Scheme) -> tuple[str, ...]:
    """The kinds of scales of one source, which must be those of its dtype."""
    kinds = scales_of(name, tensors)
    quantised = (tensors[name].dtype or "").startswith("float8")
    other = [kind for kind in kinds if kind in _OTHER]
    if other:
        raise PlanError(
            f"{name}: quantised with {scheme.name}, and its {other[0]} is not known to belong to it"
        )
    check_every_scale([name], tensors)
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
    names = {name: scale_name(name, kind) for name in transform.sources}
    target = scale_name(transform.target.name, kind)
    if _is_per_tensor(target, scheme):
        if any(map(is_stack, names)):
            return _of_experts(transform, target, names, tensors)
        return _per_tensor(transform, target, names, tensors, logical)
    dtype = tensors[next(iter(names.values()))].dtype
    if scheme.strategy == "channel":
        return _per_channel(transform, target, names, tensors, dtype)
    block = _block_of(transform, names, tensors, scheme)
    sizes = {name: (tensors[name].rows, tensors[name].width) for name in names}
    panels = [panel.divided(block, sizes).renamed(names) for panel in transform.panels]
    widths = {scale: tensors[scale].width for scale in names.values()}
    width = sum(panel.segments[0].width(widths[panel.segments[0].source]) for panel in panels)
    shape = _shape(transform.target, panels[0].rows, width)
    return Transform(TensorSpec(target, shape, dtype), panels[0], tuple(panels[1:]))


def _shape(weight: TensorSpec, rows: int, width: int) -> tuple[int, ...]:
    """The shape of a table for a weight: of a stack, a table for each expert."""
    if not is_stack(weight.name):
        return (rows, width)
    experts = weight.shape[0]
    return (experts, rows // experts, width)


def _is_per_tensor(name: str, scheme: Scheme) -> bool:
    return name.endswith(_INPUTS) or scheme.strategy == "tensor"


def _of_experts(
    transform: Transform, target: str, names: Mapping[str, str], tensors: Mapping[str, TensorSpec]
) -> Transform | None:
    """The numbers of one expert, or of every expert where the stack stays one."""
    (name, *others) = names
    weight, scale = tensors[name], tensors[names[name]]
    experts, high, wide = weight.shape
    count, rest = divmod(scale.rows, experts)
    if others or transform.beside or scale.width != 1 or (rest and scale.rows != 1):
        raise PlanError(f"{scale}: no number of values for each of the {experts} experts of {weight}")
    if is_stack(transform.target.name) or scale.rows == 1 != experts:
        # one number for the inputs of all experts, or every expert's own, which rows and columns leave alone
        same = target == scale.name
        whole = Transform(replace(scale, name=target), RowMap.identity(scale.name, scale.rows))
        return None if same else whole
    (block,) = transform.rows.segments
    expert = block.start // high
    part = (block.start - expert * high, block.stop - expert * high)
    rows = (*block.columns, wide) if block.transposed and block.columns else (*part, high)
    found = proportional(*rows, count)
    if found is None:
        raise PlanError(f"{scale}: {count} values for an expert do not divide with {weight}; scale it anew")
    first, last = expert * count + found[0], expert * count + found[1]
    return Transform(
        TensorSpec(target, (last - first,), scale.dtype), RowMap((Rows(scale.name, first, last),))
    )


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
    """The weight's rows, wherever its blocks have them; a rank's columns keep all of them."""
    for block in (block for panel in transform.panels for block in panel.segments if block.transposed):
        if is_stack(block.source):
            raise PlanError(
                f"{tensors[block.source]}: stored turned, so that its output channels are no rows, and how "
                f"{tensors[names[block.source]]} belongs to them is not known; take the checkpoint with "
                "single experts"
            )
    for name, scale in names.items():
        if tensors[scale].rows * tensors[scale].width != tensors[name].rows:
            raise PlanError(f"{tensors[scale]}: {tensors[name]} needs one scale for each of its rows")
    # output channels run along a turned weight's columns, from panel to panel
    panels = [panel.segments for panel in transform.panels]
    turned = [block.transposed for panel in panels for block in panel]
    in_rows = len(panels) == 1 and not any(turned)
    in_columns = all(turned) and all(len(panel) == 1 for panel in panels)
    if not in_rows and not in_columns:
        raise PlanError(f"{transform.target.name}: its output channels are no rows of scales any more")
    rows = RowMap(
        tuple(replace(block, columns=None, transposed=False) for panel in panels for block in panel)
    ).renamed(names)
    first = tensors[next(iter(names.values()))]
    if target == first.name and rows == RowMap.identity(first.name, first.rows):
        return None
    shape = (rows.rows, *first.shape[1:])
    if any(map(is_stack, names)):
        shape = _shape(transform.target, rows.rows, 1)
    return Transform(TensorSpec(target, shape, dtype), rows)


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
        # blocks end with their expert
        high = tensors[name].shape[1] if is_stack(name) else rows
        blocks_of_rows = -(-high // scheme.block[0]) * (rows // high)
        ue8m0 = scheme.powers_of_two or table.dtype == "float8_e8m0fnu"
        by_row = ue8m0 and table.shape == _shape(tensors[name], rows, columns)
        if is_stack(name) and not by_row and high % scheme.block[0]:
            raise PlanError(
                f"{table}: blocks of {scheme.block[0]} rows do not end with an expert's {high}; its last one "
                "would lie in two; take the checkpoint with single experts"
            )
        if not by_row and table.shape != _shape(tensors[name], blocks_of_rows, columns):
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
