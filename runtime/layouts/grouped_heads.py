"""Gated DeltaNet projections grouped by key head, as Qwen3-Next stores them, and back to Qwen3.5's order.

Read by: transformers 5.17 to 5.23, `Qwen3NextGatedDeltaNet` (`fix_query_key_value_ordering`).

    Qwen3.5:     in_proj_qkv = [all q | all k | all v],  in_proj_z,  in_proj_b,  in_proj_a
    Qwen3-Next:  in_proj_qkvz = for each key head g: [q_g | k_g | v of its r value heads | z of the same]
                 in_proj_ba   = for each key head g: [b of its r value heads | a of the same]

Heads are whole blocks of rows: value head j reads key head j // r in both. The convolution has the order
[all q | all k | all v] in both and does not change.
"""

from collections.abc import Iterator, Sequence

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform
from fxfuse.runtime.layouts.decoder import Decoder, check_rows

_FLAT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
_GROUPED = ("in_proj_qkvz", "in_proj_ba")
_MODULE = "linear_attn."


def to_groups(decoder: Decoder) -> list[Transform]:
    """Qwen3.5's four projections as Qwen3-Next's two; raises PlanError for a layer that has some of them."""
    geometry = decoder.geometry
    transforms = []
    for layer, members in _layers_with(decoder, _FLAT):
        qkv, z, b, a = members
        check_rows(qkv, 2 * geometry.keys + geometry.values, "queries, keys and values")
        check_rows(z, geometry.values, "value heads")
        check_rows(b, geometry.value_heads, "value heads")
        check_rows(a, geometry.value_heads, "value heads")
        parts = _flat_parts(decoder, qkv.name, z.name)
        transforms += [
            _filled(
                layer, "in_proj_qkvz", qkv, [part for group in zip(*parts, strict=True) for part in group]
            ),
            _filled(
                layer,
                "in_proj_ba",
                b,
                [
                    Rows(name, g * geometry.value_heads_per_key, (g + 1) * geometry.value_heads_per_key)
                    for g in range(geometry.key_heads)
                    for name in (b.name, a.name)
                ],
            ),
        ]
    return transforms


def to_flat(decoder: Decoder) -> list[Transform]:
    """Qwen3-Next's two projections as Qwen3.5's four; raises PlanError for a layer that has one of them."""
    geometry = decoder.geometry
    r = geometry.value_heads_per_key
    transforms = []
    for layer, (qkvz, ba) in _layers_with(decoder, _GROUPED):
        check_rows(qkvz, 2 * geometry.keys + 2 * geometry.values, "queries, keys, values and gates")
        check_rows(ba, 2 * geometry.value_heads, "value heads")
        q, k, v, z = _of_groups(decoder, qkvz.name, [geometry.key_dim] * 2 + [r * geometry.value_dim] * 2)
        b, a = _of_groups(decoder, ba.name, [r, r])
        transforms += [
            _filled(layer, "in_proj_qkv", qkvz, [*q, *k, *v]),
            _filled(layer, "in_proj_z", qkvz, z),
            _filled(layer, "in_proj_b", ba, b),
            _filled(layer, "in_proj_a", ba, a),
        ]
    return transforms


def _layers_with(decoder: Decoder, modules: Sequence[str]) -> Iterator[tuple[str, list[TensorSpec]]]:
    """Layers that have the weights of `modules`, with them."""
    for layer, tensors in decoder.of_layers():
        names = [f"{_MODULE}{module}.weight" for module in modules]
        found = [tensors[name] for name in names if name in tensors]
        if found and len(found) < len(names):
            absent = ", ".join(layer + name for name in names if name not in tensors)
            raise PlanError(f"{absent}: missing, while the other projections of the layer are there")
        if found:
            yield layer, found


def _flat_parts(decoder: Decoder, qkv: str, z: str) -> list[list[Rows]]:
    """q, k, v and z as blocks, one for each key head."""
    geometry = decoder.geometry
    value_rows = geometry.value_heads_per_key * geometry.value_dim

    def heads(name: str, first: int, rows: int) -> list[Rows]:
        return [Rows(name, first + g * rows, first + (g + 1) * rows) for g in range(geometry.key_heads)]

    return [
        heads(qkv, 0, geometry.key_dim),
        heads(qkv, geometry.keys, geometry.key_dim),
        heads(qkv, 2 * geometry.keys, value_rows),
        heads(z, 0, value_rows),
    ]


def _of_groups(decoder: Decoder, name: str, sizes: Sequence[int]) -> list[list[Rows]]:
    """For each part of a group, its blocks over all key heads."""
    parts: list[list[Rows]] = [[] for _ in sizes]
    at = 0
    for _ in range(decoder.geometry.key_heads):
        for part, size in zip(parts, sizes, strict=True):
            part.append(Rows(name, at, at + size))
            at += size
    return parts


def _filled(layer: str, module: str, like: TensorSpec, blocks: Sequence[Rows]) -> Transform:
    rows = RowMap(tuple(blocks))
    spec = TensorSpec(f"{layer}{_MODULE}{module}.weight", (rows.rows, *like.shape[1:]), like.dtype)
    return Transform(spec, rows)
