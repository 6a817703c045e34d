"""What one rank of a tensor-parallel group holds of each tensor of a decoder.

Read by: the loaders of SGLang and vLLM, which slice whole checkpoints in this way.

By rows (the output features of a rank's heads): q, k, v, z and the convolution's channels each by itself, so
that a rank's rows are no contiguous part of in_proj_qkv; b, a, A_log and dt_bias by value head; gate and up
of every MLP and expert. By columns: o_proj, out_proj, down_proj. Whole on every rank: norms, routers, the
shared expert's gate, embeddings and the head. With more ranks than key-value heads, consecutive ranks hold
the same head.
"""

import re
from collections.abc import Sequence

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform, Usage
from fxfuse.runtime.layouts.decoder import Decoder, check_rows
from fxfuse.runtime.layouts.experts import is_turned

_ROLE = "tensor_parallel_shard"
_BY_COLUMNS = re.compile(
    r"(self_attn\.o_proj|linear_attn\.out_proj|mlp\.(shared_expert\.|experts\.\d+\.)?down_proj)\.weight"
)
_BY_ROWS = re.compile(r"mlp\.(shared_expert\.|experts\.\d+\.)?(gate|up)_proj\.(weight|bias)")


def shards(decoder: Decoder, rank: int, world: int) -> tuple[list[Transform], list[Usage]]:
    """The part of each tensor that `rank` of `world` holds, and that the rest is left to others.

    Raises PlanError when a size does not divide.
    """
    check_rank(rank, world)
    decoder.geometry.per_rank(world)
    if world == 1:
        return [], []
    transforms = []
    for _, tensors in decoder.of_layers():
        for name, spec in tensors.items():
            shard = _shard(decoder, tensors, name, spec, rank, world)
            if shard is not None:
                transforms.append(shard)
    return transforms, [Usage(t.sources[0], "partial", _ROLE) for t in transforms]


def check_rank(rank: int, world: int) -> None:
    """Raises PlanError unless `rank` is one of `world`."""
    if type(rank) is not int or type(world) is not int or not 0 <= rank < world:
        raise PlanError(f"tp=({rank!r}, {world!r}): give (rank, world) with 0 <= rank < world")


def _shard(
    decoder: Decoder, layer: dict[str, TensorSpec], name: str, spec: TensorSpec, rank: int, world: int
) -> Transform | None:
    """One tensor's part, or None for one that every rank holds whole."""
    if _BY_COLUMNS.fullmatch(name):
        return _columns(spec, rank, world)
    if _BY_ROWS.fullmatch(name):
        return _segments(spec, [spec.rows], rank, world)
    if name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
        return _stack(layer, spec, rank, world)
    return _of_heads(decoder, name, spec, rank, world)


def _of_heads(decoder: Decoder, name: str, spec: TensorSpec, rank: int, world: int) -> Transform | None:
    """The part of a tensor whose rows belong to heads."""
    geometry = decoder.geometry
    module, _, tensor = name.rpartition(".")
    if tensor not in ("weight", "bias", "A_log", "dt_bias"):
        return None
    if module == "self_attn.q_proj":
        check_rows(spec, geometry.query_heads * geometry.query_rows, "query heads")
        return _segments(spec, [spec.rows], rank, world)
    if module in ("self_attn.k_proj", "self_attn.v_proj"):
        check_rows(spec, geometry.kv_heads * geometry.head_dim, "key-value heads")
        if world > geometry.kv_heads:
            head = rank * geometry.kv_heads // world
            rows = (head * geometry.head_dim, (head + 1) * geometry.head_dim)
            return _rows(spec, [rows])
        return _segments(spec, [spec.rows], rank, world)
    if module in ("linear_attn.in_proj_qkv", "linear_attn.conv1d"):
        check_rows(spec, 2 * geometry.keys + geometry.values, "queries, keys and values")
        return _segments(spec, [geometry.keys, geometry.keys, geometry.values], rank, world)
    by_head = {
        "linear_attn.in_proj_z": geometry.values,
        "linear_attn.in_proj_b": geometry.value_heads,
        "linear_attn.in_proj_a": geometry.value_heads,
        # by whole groups of a key head, each with its own queries, values and gates
        "linear_attn.in_proj_qkvz": 2 * geometry.keys + 2 * geometry.values,
        "linear_attn.in_proj_ba": 2 * geometry.value_heads,
    }
    if name in ("linear_attn.A_log", "linear_attn.dt_bias"):
        check_rows(spec, geometry.value_heads, "value heads")
    elif module in by_head:
        check_rows(spec, by_head[module], "heads")
    else:
        return None
    return _segments(spec, [spec.rows], rank, world)


def _stack(layer: dict[str, TensorSpec], spec: TensorSpec, rank: int, world: int) -> Transform:
    """The part of stacked experts: of each expert gate and up by rows, down by columns."""
    gate_up, down = (layer.get(f"mlp.experts.{name}") for name in ("gate_up_proj", "down_proj"))
    if gate_up is None or down is None:
        raise PlanError(f"{spec.name}: the other half of the experts is missing")
    turned = is_turned(gate_up, down)
    experts, rows, width = spec.shape
    if spec is gate_up and not turned:
        halves = [rows // 2] * (2 * experts)
        return _segments(spec, halves, rank, world, (experts, rows // world, width))
    if spec is gate_up:
        panels = [_window(spec, half * width // 2, width // 2, rank, world) for half in (0, 1)]
        target = TensorSpec(spec.name, (experts, rows, width // world), spec.dtype)
        return Transform(target, panels[0], (panels[1],))
    if turned:
        return _segments(spec, [rows] * experts, rank, world, (experts, rows // world, width))
    return _columns(spec, rank, world)


def _columns(spec: TensorSpec, rank: int, world: int) -> Transform:
    shape = (*spec.shape[:-1], spec.width // world)
    return Transform(TensorSpec(spec.name, shape, spec.dtype), _window(spec, 0, spec.width, rank, world))


def _window(spec: TensorSpec, first: int, width: int, rank: int, world: int) -> RowMap:
    """A rank's part of `width` columns from `first` on."""
    part = _part(spec, width, "columns", world)
    start = first + rank * part
    return RowMap((Rows(spec.name, 0, spec.rows, (start, start + part)),))


def _segments(
    spec: TensorSpec, sizes: Sequence[int], rank: int, world: int, shape: tuple[int, ...] | None = None
) -> Transform:
    """A rank's part of each of the segments that the rows consist of, one after another."""
    ranges, at = [], 0
    for size in sizes:
        part = _part(spec, size, "rows", world)
        ranges.append((at + rank * part, at + (rank + 1) * part))
        at += size
    return _rows(spec, ranges, shape)


def _rows(
    spec: TensorSpec, ranges: Sequence[tuple[int, int]], shape: tuple[int, ...] | None = None
) -> Transform:
    rows = RowMap(tuple(Rows(spec.name, start, stop) for start, stop in ranges))
    return Transform(TensorSpec(spec.name, shape or (rows.rows, *spec.shape[1:]), spec.dtype), rows)


def _part(spec: TensorSpec, size: int, what: str, world: int) -> int:
    if size % world:
        raise PlanError(
            f"{spec}: {size} {what} do not divide over {world} ranks: choose a world that divides"
        )
    return size // world
