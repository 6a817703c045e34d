"""The attention projection of FastDeploy's Qwen3.5 model.

Read by: FastDeploy, `QKVGateParallelLinear` with FastDeploy#7057 (shard `split_q_gate`). The name of the
parameter is ours, since the layer does not fix one.

    rank t of w:  [q of its heads | k | v of its key-value heads | gate of its heads], stored [H, out]

FastDeploy keeps "still to be transposed" as a flag on the parameter, which the first shard clears for those
after it (FastDeploy#7410). Here the way round belongs to each shard, and the parameter is one expression
over all of them: no order of loading can turn one twice.
"""

from collections.abc import Mapping, Sequence

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform
from fxfuse.runtime.layouts.decoder import Decoder
from fxfuse.runtime.layouts.geometry import Geometry
from fxfuse.runtime.layouts.tensor_parallel import check_rank

SHARDS = ("qkv", "gate", "q", "k", "v", "split_q_gate")
PARAMETER = "self_attn.qkv_gate_proj.weight"
BIAS = "self_attn.qkv_gate_proj.bias"

_PARTS = ("q", "k", "v", "gate")


def to_fastdeploy(decoder: Decoder) -> list[Transform]:
    """q_proj, k_proj and v_proj of each attention layer as one parameter; PlanError if one is missing.

    Biases are merged in the same order.
    """
    transforms = []
    for layer, tensors in decoder.of_layers():
        for parameter in (PARAMETER, BIAS):
            leaf = parameter.rpartition(".")[2]
            found = {
                shard: tensors[name]
                for shard, name in (
                    ("split_q_gate", f"self_attn.q_proj.{leaf}"),
                    ("k", f"self_attn.k_proj.{leaf}"),
                    ("v", f"self_attn.v_proj.{leaf}"),
                )
                if name in tensors
            }
            if found:
                transforms.append(merged(layer + parameter, found, decoder.geometry))
    return transforms


def merged(
    name: str,
    shards: Mapping[str, TensorSpec],
    geometry: Geometry,
    *,
    tp: tuple[int, int] = (0, 1),
    stored_transposed: bool = True,
    shards_transposed: Sequence[str] = (),
) -> Transform:
    """The parameter of one rank, from whole shards by id in any order.

    Args:
        name: of the parameter, which has shape [H, out] or, unless `stored_transposed`, [out, H]; that of a
            bias has [out].
        shards: of shape [out, H], or [H, out] for the ids in `shards_transposed`.
        geometry: of the whole model.

    Raises:
        PlanError: an unknown id, rows that the geometry does not give, parts that are missing or come twice.
    """
    rank, world = tp
    check_rank(rank, world)
    local = geometry.per_rank(world)
    if not geometry.gated_queries:
        raise PlanError(f"{name}: the model's queries have no gate, so it has no [q | k | v | gate]")
    parts: dict[str, list[Rows]] = {}
    for shard, spec in shards.items():
        for part, ranges in _contents(shard, geometry, rank, world).items():
            if part in parts:
                raise PlanError(f"{name}: {part} comes twice, the second time with shard {shard!r}")
            blocks = [_block(spec, start, stop, shard in shards_transposed) for start, stop in ranges]
            parts[part] = blocks
    absent = [part for part in _PARTS if part not in parts]
    if absent:
        raise PlanError(f"{name}: no shard gives {', '.join(absent)}; known shards are {', '.join(SHARDS)}")
    rows = RowMap(tuple(block for part in _PARTS for block in parts[part]))
    hidden = {_hidden(spec, shard in shards_transposed) for shard, spec in shards.items()}
    if len(hidden) > 1:
        raise PlanError(f"{name}: its shards read inputs of different sizes, {sorted(hidden)}")
    width, out = hidden.pop(), 2 * (local.query_heads + local.kv_heads) * local.head_dim
    for shard, spec in shards.items():
        expected = _rows_of(shard, geometry)
        found = spec.rows * spec.width // width
        if found != expected:
            raise PlanError(f"{spec}: shard {shard!r} has {expected} rows by the config, not {found}")
    dtype = next(iter(shards.values())).dtype
    if all(len(spec.shape) == 1 for spec in shards.values()):
        return Transform(TensorSpec(name, (out,), dtype), rows)
    if not stored_transposed:
        return Transform(TensorSpec(name, (out, width), dtype), rows)
    turned = [RowMap((_turned(block, width),)) for block in rows.segments]
    return Transform(TensorSpec(name, (width, out), dtype), turned[0], tuple(turned[1:]))


def _contents(shard: str, geometry: Geometry, rank: int, world: int) -> dict[str, list[tuple[int, int]]]:
    """Which rows of a whole shard are which part of the rank's parameter."""
    dim, heads, kv_heads = geometry.head_dim, geometry.query_heads, geometry.kv_heads
    local = geometry.per_rank(world)
    queries = (rank * local.query_heads * dim, (rank + 1) * local.query_heads * dim)
    # ranks that share a key-value head stand next to one another
    first = rank * kv_heads // world
    keys = (first * dim, (first + local.kv_heads) * dim)
    after_queries, after_keys = heads * dim, (heads + kv_heads) * dim
    own = range(rank * local.query_heads, (rank + 1) * local.query_heads)
    known = {
        "q": {"q": [queries]},
        "gate": {"gate": [queries]},
        "k": {"k": [keys]},
        "v": {"v": [keys]},
        "qkv": {
            "q": [queries],
            "k": [(after_queries + keys[0], after_queries + keys[1])],
            "v": [(after_keys + keys[0], after_keys + keys[1])],
        },
        "split_q_gate": {
            "q": [(2 * head * dim, (2 * head + 1) * dim) for head in own],
            "gate": [((2 * head + 1) * dim, (2 * head + 2) * dim) for head in own],
        },
    }
    if shard not in known:
        raise PlanError(f"shard {shard!r} is not known; known are: {', '.join(SHARDS)}")
    return known[shard]


def _rows_of(shard: str, geometry: Geometry) -> int:
    """Rows of a whole shard."""
    queries, keys = geometry.query_heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    sizes = {"qkv": queries + 2 * keys, "split_q_gate": 2 * queries, "k": keys, "v": keys}
    return sizes.get(shard, queries)


def _hidden(spec: TensorSpec, transposed: bool) -> int:
    return spec.rows if transposed else spec.width


def _block(spec: TensorSpec, start: int, stop: int, transposed: bool) -> Rows:
    """Output features start..stop-1 of a shard, as rows."""
    if transposed:
        return Rows(spec.name, 0, spec.rows, (start, stop), transposed=True)
    return Rows(spec.name, start, stop)


def _turned(block: Rows, width: int) -> Rows:
    if block.transposed:
        return Rows(block.source, block.start, block.stop, block.columns)
    return Rows(block.source, block.start, block.stop, (0, width), transposed=True)
