"""This project's layout: the linears that read one input, stacked in the order of their calls.

Read by: fxfuse. The same rows in the same order come from rewriting the model's captured graph.
"""

from collections.abc import Mapping

from fxfuse.errors import PlanError
from fxfuse.passes.weights import TensorSpec, Transform, fused_name
from fxfuse.runtime.families import LinearGroup
from fxfuse.runtime.layouts.decoder import Decoder, stacked
from fxfuse.runtime.layouts.scales import by_scales, scales_of


def to_fused(decoder: Decoder) -> list[Transform]:
    """Every group of every layer merged; raises PlanError for an incomplete group, and when there is none.

    A group whose members differ in dtype or in having a bias stays as it is; where some are FP8 with scales,
    those are merged and the others are, each kind by itself.
    """
    family = decoder.family
    transforms = [
        transform
        for layer in decoder.layers
        for group in family.groups
        for transform in _merges(layer, group, decoder.tensors)
    ]
    if not transforms:
        known = ", ".join(group.members[0] for group in family.groups)
        raise PlanError(
            f"none of the {len(decoder.tensors)} tensors is one that {family.name} merges ({known}, ...): "
            "they are in another layout already, or belong to another part of the model"
        )
    return transforms


def _merges(layer: str, group: LinearGroup, tensors: Mapping[str, TensorSpec]) -> list[Transform]:
    """One group of one layer: its weights stacked by rows, and its biases too if all members have one."""
    weights, biases = (
        {name: tensors.get(name) for name in (f"{layer}{member}.{leaf}" for member in group.members)}
        for leaf in ("weight", "bias")
    )
    absent = [name for name, spec in weights.items() if spec is None]
    if len(absent) == len(weights):
        return []
    if absent:
        raise PlanError(f"{', '.join(absent)}: missing, while the rest of the group {group.name} is there")
    present = [spec for spec in biases.values() if spec is not None]
    if present and len(present) < len(biases):
        return []
    stacks = [[spec for spec in weights.values() if spec is not None], *([present] if present else [])]
    if any(scales_of(name, tensors) for name in weights):
        # beside FP8 members, plain ones are merged by themselves
        stacks = [run for stack in stacks for run in by_scales(stack, tensors) if len(run) > 1]
    if any(len({spec.dtype for spec in stack}) > 1 for stack in stacks):
        return []
    return [stacked(fused_name([member.name for member in stack]), stack) for stack in stacks]
