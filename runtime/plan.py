"""Plans by the name of a layout, for a model, a config or a checkpoint directory; no weight is read."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from fxfuse.errors import PlanError, UnsupportedModelError
from fxfuse.passes.weights import RowMap, TensorSpec, Transform, WeightPlan, fused_name
from fxfuse.runtime.families import Family, LinearGroup, family_of
from fxfuse.runtime.headers import read_config, read_headers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYOUTS = ("hf", "fused")


def plan(
    source: "torch.nn.Module | PretrainedConfig | str | os.PathLike[str]",
    layout: str = "fused",
    *,
    tp: tuple[int, int] | None = None,
) -> WeightPlan:
    """The plan from transformers' layout to "hf" (nothing changes) or "fused" (same-input linears merged).

    A model gives its own names and dtypes, a checkpoint directory those of its headers, a config a template
    that `WeightPlan.bind` completes. A group whose members differ in dtype or in having a bias stays as it
    is. Raises PlanError for an unknown layout, an incomplete group and for quantised weights,
    UnsupportedModelError for an unknown family and CheckpointError for a faulty checkpoint.
    """
    if layout not in LAYOUTS:
        raise PlanError(f"layout {layout!r} is not known; known are: {', '.join(LAYOUTS)}")
    if tp is not None:
        raise PlanError(f"layout {layout!r} has no tensor-parallel form; known is tp=None")
    family, headers = _inspect(source)
    return WeightPlan() if layout == "hf" else _fused(family, headers)


def _inspect(source: Any) -> tuple[Family, dict[str, TensorSpec]]:
    """Family and tensors of a model, config or checkpoint directory."""
    if isinstance(source, str | os.PathLike):
        config = SimpleNamespace(**read_config(Path(source)))
        return _family(config), read_headers(Path(source))
    if isinstance(source, torch.nn.Module):
        return _family(getattr(source, "config", None)), _specs(source)
    if hasattr(source, "get_text_config"):
        family = _family(source)
        return family, _template(source, family)
    raise UnsupportedModelError(
        f"no plan for a {type(source).__name__}: give a transformers model, its config or a directory"
    )


def _family(config: Any) -> Family:
    """The family of a config; raises PlanError when its weights are quantised."""
    family = family_of(getattr(config, "model_type", None))
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        fields = quantization if isinstance(quantization, dict) else vars(quantization)
        raise PlanError(
            f"weights quantised with {fields.get('quant_method')}: only plain weights can be merged"
        )
    return family


def _specs(module: torch.nn.Module, prefix: str = "") -> dict[str, TensorSpec]:
    """Every parameter of a module, tied ones under each of their names."""
    return {
        prefix + name: TensorSpec(prefix + name, tuple(parameter.shape), str(parameter.dtype))
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def _template(config: Any, family: Family) -> dict[str, TensorSpec]:
    """Tensors of the decoder that a config describes, without dtypes, where the family's files have it."""
    from transformers import AutoModel

    with torch.device("meta"):
        decoder = AutoModel.from_config(config.get_text_config())
    composite = config.model_type in family.composite_model_types
    prefix = family.prefixes[0] if composite else "model."
    return {name: TensorSpec(name, spec.shape) for name, spec in _specs(decoder, prefix).items()}


def _fused(family: Family, headers: Mapping[str, TensorSpec]) -> WeightPlan:
    transforms = [
        transform
        for layer in _layers(family, headers)
        for group in family.groups
        for transform in _merges(layer, group, headers)
    ]
    if not transforms:
        known = ", ".join(group.members[0] for group in family.groups)
        raise PlanError(
            f"none of the {len(headers)} tensors is one that {family.name} merges ({known}, ...): they are "
            "in another layout already, or belong to another part of the model"
        )
    used = (name for transform in transforms for name in transform.rows.sources)
    return WeightPlan(tuple(headers[name] for name in used), tuple(transforms))


def _layers(family: Family, headers: Mapping[str, TensorSpec]) -> list[str]:
    """Paths of the decoder's layers, in order, under the first prefix that has any."""
    for prefix in family.prefixes:
        path = prefix + family.layer
        pattern = re.compile(re.escape(path).replace(re.escape("{index}"), r"(\d+)"))
        indices = {int(found[1]) for name in headers if (found := pattern.match(name))}
        if indices:
            return [path.format(index=index) for index in sorted(indices)]
    return []


def _merges(layer: str, group: LinearGroup, headers: Mapping[str, TensorSpec]) -> list[Transform]:
    """One group of one layer: its weights stacked by rows, and its biases too if all members have one."""
    weights, biases = (
        {name: headers.get(name) for name in (f"{layer}{member}.{leaf}" for member in group.members)}
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
    if any(len({spec.dtype for spec in stack}) > 1 for stack in stacks):
        return []
    return [_stacked(stack) for stack in stacks]


def _stacked(members: list[TensorSpec]) -> Transform:
    rows = [(member.name, member.rows) for member in members]
    shape = (sum(count for _, count in rows), *members[0].shape[1:])
    return Transform(
        TensorSpec(fused_name([name for name, _ in rows]), shape, members[0].dtype), RowMap.concat(rows)
    )
