"""Experts as one stack or one by one.

Read by: transformers 5.17 to 5.23 reads both and holds the stack; SGLang, vLLM and ktransformers read both;
FP8 and other quantised checkpoints are stored one by one.

    stacked:    experts.gate_up_proj [E, 2I, H] (rows: gate, then up),  experts.down_proj [E, H, I]
    turned:     experts.gate_up_proj [E, H, 2I],  experts.down_proj [E, I, H]   (Qwen3-VL-MoE)
    one by one: experts.{e}.gate_proj.weight [I, H],  .up_proj.weight [I, H],  .down_proj.weight [H, I]
                block_sparse_moe.experts.{e}.w1.weight, .w3.weight, .w2.weight   (Mixtral)
"""

import re
from collections.abc import Mapping

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform
from fxfuse.runtime.families import ExpertNames
from fxfuse.runtime.layouts.decoder import Decoder, renamed
from fxfuse.runtime.layouts.geometry import Geometry

_STACK = "mlp.experts."
_PARTS = ("gate", "up", "down")


def to_single(decoder: Decoder) -> list[Transform]:
    """Every stack of experts taken apart.

    Raises PlanError when it cannot be told which way round it is, or has not the config's sizes.
    """
    names = decoder.family.experts
    transforms = []
    for layer, tensors in decoder.of_layers():
        gate_up, down = (tensors.get(f"{_STACK}{name}") for name in ("gate_up_proj", "down_proj"))
        if gate_up is None and down is None:
            continue
        if gate_up is None or down is None:
            absent = "gate_up_proj" if gate_up is None else "down_proj"
            raise PlanError(f"{layer}{_STACK}{absent}: missing, while the layer has the other half")
        turned = is_turned(gate_up, down)
        experts = gate_up.shape[0]
        _check_sizes(layer, experts, gate_up.shape[2 if turned else 1] // 2, decoder.geometry)
        for e in range(experts):
            parts = _parts(gate_up, down, e, turned)
            for part, (spec, block) in zip(names.single, parts, strict=True):
                target = TensorSpec(layer + part.format(e=e), spec, gate_up.dtype)
                transforms.append(Transform(target, RowMap((block,))))
        transforms += [
            renamed(tensors[stacked], layer + single)
            for stacked, single in names.renamed
            if stacked in tensors
        ]
    return transforms


def to_stack(decoder: Decoder) -> list[Transform]:
    """Single experts stacked, and turned stacks put straight.

    Raises PlanError for a missing expert, for experts of several shapes, and for other sizes than the
    config's.
    """
    transforms = []
    for layer, tensors in decoder.of_layers():
        transforms += _straightened(tensors)
        found = _singles(tensors, decoder.family.experts)
        if found:
            transforms += _stacked(layer, found, decoder)
            transforms += [
                renamed(tensors[single], layer + stacked)
                for stacked, single in decoder.family.experts.renamed
                if single in tensors
            ]
    return transforms


def _singles(tensors: Mapping[str, TensorSpec], names: ExpertNames) -> dict[tuple[int, str], TensorSpec]:
    """The tensors of single experts by number and part."""
    patterns = {
        part: re.compile(re.escape(name).replace(re.escape("{e}"), r"(\d+)"))
        for part, name in zip(_PARTS, names.single, strict=True)
    }
    return {
        (int(match[1]), part): spec
        for name, spec in tensors.items()
        for part, pattern in patterns.items()
        if (match := pattern.fullmatch(name))
    }


def _stacked(layer: str, found: Mapping[tuple[int, str], TensorSpec], decoder: Decoder) -> list[Transform]:
    """The two stacks of one layer's experts."""
    experts = max(1 + max(e for e, _ in found), decoder.geometry.experts)
    absent = [(e, part) for e in range(experts) for part in _PARTS if (e, part) not in found]
    if absent:
        e, part = absent[0]
        name = dict(zip(_PARTS, decoder.family.experts.single, strict=True))[part].format(e=e)
        raise PlanError(
            f"{layer}{name}: missing ({len(absent)} in all), while there are experts up to {experts - 1}"
        )
    for part in _PARTS:
        shapes = {found[e, part].shape: found[e, part] for e in range(experts)}
        if len(shapes) > 1:
            raise PlanError(f"experts of one layer differ: {', '.join(map(str, shapes.values()))}")
    _check_sizes(layer, experts, found[0, "gate"].rows, decoder.geometry)
    gates = [found[e, part] for e in range(experts) for part in ("gate", "up")]
    downs = [found[e, "down"] for e in range(experts)]
    transforms = []
    for name, members in (("gate_up_proj", gates), ("down_proj", downs)):
        rows = sum(member.rows for member in members) // experts
        target = TensorSpec(f"{layer}{_STACK}{name}", (experts, rows, members[0].width), members[0].dtype)
        transforms.append(Transform(target, RowMap.concat([(m.name, m.rows) for m in members])))
    return transforms


def _check_sizes(layer: str, experts: int, width: int, geometry: Geometry) -> None:
    """Raises PlanError unless number and inner size of the experts are the config's, where it has them."""
    for found, expected, what in (
        (experts, geometry.experts, "experts"),
        (width, geometry.expert_width, "rows in an expert's gate"),
    ):
        if expected and found != expected:
            raise PlanError(f"{layer}{_STACK[:-1]}: {found} {what}, the config gives {expected}")


def _straightened(tensors: Mapping[str, TensorSpec]) -> list[Transform]:
    """A layer's turned stack with each expert's matrices transposed, nothing for any other."""
    gate_up, down = (tensors.get(f"{_STACK}{name}") for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None or not is_turned(gate_up, down):
        return []
    return [
        Transform(
            TensorSpec(spec.name, _swapped(spec.shape), spec.dtype),
            RowMap(
                tuple(
                    Rows(spec.name, e * rows, (e + 1) * rows, (0, width), transposed=True)
                    for e in range(experts)
                )
            ),
        )
        for spec in (gate_up, down)
        for experts, rows, width in [spec.shape]
    ]


def is_turned(gate_up: TensorSpec, down: TensorSpec) -> bool:
    """Whether a stack holds [E, H, 2I] and [E, I, H] instead of [E, 2I, H] and [E, H, I], by its shapes.

    Both shapes together always tell, gate_up's alone does not where H = 2I. Raises PlanError when they fit
    neither.
    """
    turned = _fits(_swapped(gate_up.shape), _swapped(down.shape))
    if not turned and not _fits(gate_up.shape, down.shape):
        raise PlanError(
            f"{gate_up}, {down}: no stack of experts; expected [E, 2I, H] with [E, H, I], or both transposed"
        )
    return turned


def _fits(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool:
    return (
        len(gate_up) == len(down) == 3
        and gate_up[0] == down[0]
        and gate_up[2] == down[1]
        and gate_up[1] == 2 * down[2]
    )


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1], *shape[:0:-1])


def _parts(gate_up: TensorSpec, down: TensorSpec, e: int, turned: bool) -> list[tuple[tuple[int, int], Rows]]:
    """Shape and block of gate, up and down of expert `e`."""
    _, first, second = gate_up.shape
    if turned:
        half, hidden = second // 2, first
        top, low = e * hidden, e * half
        return [
            ((half, hidden), Rows(gate_up.name, top, top + hidden, (0, half), True)),
            ((half, hidden), Rows(gate_up.name, top, top + hidden, (half, 2 * half), True)),
            ((hidden, half), Rows(down.name, low, low + half, (0, hidden), True)),
        ]
    half, hidden = first // 2, second
    top, low = e * 2 * half, e * hidden
    return [
        ((half, hidden), Rows(gate_up.name, top, top + half)),
        ((half, hidden), Rows(gate_up.name, top + half, top + 2 * half)),
        ((hidden, half), Rows(down.name, low, low + hidden)),
    ]
