"""The parameters of SGLang's Qwen3.5 model.

Read by: SGLang, `models/qwen3_5.py` since the packed loader for split checkpoints (sglang#21313, #23062),
which accepts these names as single shards.

    linear_attn.in_proj_qkvz = [q | k | v | z]        linear_attn.in_proj_ba = [b | a]
    qkv_proj = [q_proj | k_proj | v_proj], q_proj with query and gate of each head in turn
    gate_up_proj = [gate_proj | up_proj] of the MLP and the shared expert
    `self_attn.` is no part of a name; experts stay as they are, one by one or stacked
"""

from types import MappingProxyType

from fxfuse.errors import PlanError
from fxfuse.passes.weights import Transform
from fxfuse.runtime.layouts.decoder import Decoder, renamed, stacked
from fxfuse.runtime.layouts.scales import SCALES

# shards in order of their ids
_STACKS = {
    "linear_attn.in_proj_qkvz": ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "linear_attn.in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_expert.gate_up_proj": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
}
_ATTENTION = "self_attn."

# modules that are several logical shards each
LOGICAL = MappingProxyType({"in_proj_qkv": 3})


def to_sglang(decoder: Decoder) -> list[Transform]:
    """Split projections stacked and attention renamed; what is stacked already stays.

    Raises PlanError when some shards of a stack are missing.
    """
    transforms = []
    for layer, tensors in decoder.of_layers():
        used = set()
        for stack, shards in _STACKS.items():
            for leaf in ("weight", "bias"):
                names = [f"{shard}.{leaf}" for shard in shards]
                found = [tensors[name] for name in names if name in tensors]
                if found and len(found) < len(names):
                    absent = ", ".join(layer + name for name in names if name not in tensors)
                    raise PlanError(f"{absent}: missing, while other shards of {layer}{stack} are there")
                if found:
                    transforms.append(stacked(f"{layer}{stack}.{leaf}", found))
                    used.update(names)
        transforms += [
            renamed(spec, layer + name.removeprefix(_ATTENTION))
            for name, spec in tensors.items()
            if name.startswith(_ATTENTION) and name not in used and not _is_scale_of(name, used)
        ]
    return transforms


def _is_scale_of(name: str, weights: set[str]) -> bool:
    """Whether a tensor is the scale of one of the weights, and goes with it."""
    module, _, leaf = name.rpartition(".")
    return leaf in SCALES and f"{module}.weight" in weights
