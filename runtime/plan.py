"""Plans by the name of a layout, for a model, a config or a checkpoint directory; no weight is read."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from fxfuse.errors import CheckpointError, PlanError, UnsupportedModelError
from fxfuse.passes.weights import Draft, TensorSpec, Transform, Usage, WeightPlan
from fxfuse.runtime.decoder_stack import find_decoder, plain_tensors
from fxfuse.runtime.families import Family, family_of
from fxfuse.runtime.headers import read_config, read_headers, read_plan
from fxfuse.runtime.layouts.decoder import Decoder
from fxfuse.runtime.layouts.experts import to_single, to_stack
from fxfuse.runtime.layouts.fastdeploy import to_fastdeploy
from fxfuse.runtime.layouts.geometry import Geometry, geometry_of, with_experts
from fxfuse.runtime.layouts.grouped_heads import to_flat, to_groups
from fxfuse.runtime.layouts.merging import to_fused
from fxfuse.runtime.layouts.scales import Step, with_scales
from fxfuse.runtime.layouts.sglang import LOGICAL, to_sglang
from fxfuse.runtime.layouts.tensor_parallel import shards
from fxfuse.runtime.quantization import Scheme, scheme_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# each says in its module which program reads it; "hf" is what transformers holds in memory
_STEPS: Mapping[str, Callable[[Decoder], list[Transform]]] = MappingProxyType(
    {
        "hf": to_stack,
        "fused": to_fused,
        "per_expert": to_single,
        "qwen3_next": to_groups,
        "qwen3_5": to_flat,
        "sglang": to_sglang,
        "fastdeploy": to_fastdeploy,
    }
)
_BY_HEADS = ("qwen3_next", "qwen3_5", "fastdeploy")
_OF_EXPERTS = ("hf", "per_expert")
LAYOUTS = tuple(_STEPS)


def plan(
    source: "torch.nn.Module | PretrainedConfig | str | os.PathLike[str]",
    layout: str = "fused",
    *,
    tp: tuple[int, int] | None = None,
) -> WeightPlan:
    """The plan from the layout that `source` is in to another one.

    A model gives the names and dtypes that it has inside of wrappers (PEFT, a value head, DDP,
    torch.compile), a checkpoint directory those of its headers, a config a template that `WeightPlan.bind`
    completes. A directory that `fxfuse.convert` wrote may be in any layout, any other is in that of
    transformers, its experts stacked or one by one. Tensors outside the decoder's layers (embeddings, head,
    vision, `mtp.`) are never changed.

    Args:
        source: what the plan is for.
        layout: "hf" (as transformers holds it), "fused" (same-input linears merged), "per_expert" (experts
            one by one), "qwen3_next" and "qwen3_5" (Gated DeltaNet by key head, and not), "sglang",
            "fastdeploy".
        tp: (rank, world): the part of each tensor that this rank holds.

    Raises:
        PlanError: an unknown layout, an incomplete group, sizes that do not divide, quantised weights that
            cannot be merged without loss, or a layout that the model has nothing for.
        UnsupportedModelError: an unknown family, or a module in which no decoder stack is found.
        CheckpointError: a faulty checkpoint.
    """
    return plan_and_origin(source, layout, tp)[0]


def plan_and_origin(
    source: Any, layout: str, tp: tuple[int, int] | None = None
) -> tuple[WeightPlan, WeightPlan]:
    """`plan`, and the plan to the same tensors from transformers' layout; raises what it raises."""
    if layout not in _STEPS:
        raise PlanError(f"layout {layout!r} is not known; known are: {', '.join(LAYOUTS)}")
    family, config, tensors, earlier = _inspect(source)
    if not family.groups and (layout not in _OF_EXPERTS or tp is not None):
        raise PlanError(
            f"{family.name}: only its experts are planned, as {' or '.join(_OF_EXPERTS)} and for one rank; "
            f"not layout {layout!r}{'' if tp is None else f' for tp={tp}'}"
        )
    draft, origin = Draft(tensors), None
    if earlier is not None:
        back = earlier.inverse()
        draft.then(back.transforms, back.usages)
        origin = Draft(draft.tensors)
    geometry = geometry_of(config) if tp is not None or layout in _BY_HEADS else Geometry()
    geometry = with_experts(geometry, config, family.experts)
    scheme = scheme_of(config)
    steps = _steps(layout, tp, family, geometry, draft.tensors, scheme)
    for transforms, usages in steps:
        draft.then(transforms, usages)
        if origin is not None:
            origin.then(transforms, usages)
    planned = draft.plan()
    return planned, planned if origin is None else origin.plan()


def _steps(
    layout: str,
    tp: tuple[int, int] | None,
    family: Family,
    geometry: Geometry,
    tensors: Mapping[str, TensorSpec],
    scheme: Scheme | None,
) -> list[Step]:
    """The rank's shards, if any, and then the layout, from transformers' layout on."""
    steps: list[Step] = []
    present = Draft(tensors)
    if tp is not None:
        parts, usages = shards(Decoder(family, geometry, tensors), *tp)
        if scheme is not None:
            parts, broadcast = with_scales(parts, tensors, scheme)
            usages = [*broadcast, *(Usage(t.sources[0], "partial", "tensor_parallel_shard") for t in parts)]
        steps.append((parts, usages))
        present.then(parts, usages)
        geometry = geometry.per_rank(tp[1])
    # quantised experts stay one by one: transformers stacks them, scales and all, when it loads them
    keep = scheme is not None and layout == "hf"
    transforms = [] if keep else _STEPS[layout](Decoder(family, geometry, present.tensors))
    if not transforms and layout in ("per_expert", "sglang", "fastdeploy"):
        raise PlanError(
            f"{family.name}: none of the {len(tensors)} tensors is one that layout {layout!r} changes; "
            "they are in it already, or the model has no such parts"
        )
    if scheme is not None:
        logical = LOGICAL if layout == "sglang" else {}
        return [*steps, with_scales(transforms, present.tensors, scheme, logical)]
    return [*steps, (transforms, [])]


def _inspect(source: Any) -> tuple[Family, Any, dict[str, TensorSpec], WeightPlan | None]:
    """Family, config and tensors of a model, config or checkpoint directory, and the plan that made them."""
    if isinstance(source, str | os.PathLike):
        config: Any = SimpleNamespace(**read_config(Path(source)))
        family, tensors = family_of(getattr(config, "model_type", None)), read_headers(Path(source))
        return family, config, tensors, _earlier(Path(source), tensors)
    if isinstance(source, torch.nn.Module):
        from transformers import PreTrainedModel

        model = source if isinstance(source, PreTrainedModel) else find_decoder(source).model
        config = getattr(model, "config", None)
        return _family(config), config, _specs(plain_tensors(model)), None
    if hasattr(source, "get_text_config"):
        family = _family(source)
        return family, source, _template(source, family), None
    raise UnsupportedModelError(
        f"no plan for a {type(source).__name__}: give a transformers model, its config or a directory"
    )


def _earlier(directory: Path, tensors: Mapping[str, TensorSpec]) -> WeightPlan | None:
    """The plan that a converted directory was made with; CheckpointError if it does not fit the files."""
    earlier = read_plan(directory)
    for target in earlier.targets if earlier else ():
        if tensors.get(target.name) != target:
            raise CheckpointError(
                f"{directory}: its plan made {target}, the files have {tensors.get(target.name)}; "
                "convert again"
            )
    return earlier


def _family(config: Any) -> Family:
    """The family of a config; raises PlanError when its weights are quantised, and scales are not at hand."""
    family = family_of(getattr(config, "model_type", None))
    scheme = scheme_of(config)
    if scheme is not None:
        raise PlanError(
            f"weights quantised with {scheme.name}: only the files say which have scales; "
            "give the checkpoint directory"
        )
    return family


def _specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(n, tuple(tensor.shape), str(tensor.dtype)) for n, tensor in tensors.items()}


def _template(config: Any, family: Family) -> dict[str, TensorSpec]:
    """Tensors of the decoder that a config describes, without dtypes, where the family's files have it."""
    from transformers import AutoModel

    with torch.device("meta"):
        decoder = AutoModel.from_config(config.get_text_config())
    composite = config.model_type in family.composite_model_types
    prefix = family.prefixes[0] if composite else "model."
    return {
        prefix + name: TensorSpec(prefix + name, tuple(parameter.shape))
        for name, parameter in decoder.named_parameters(remove_duplicate=False)
    }
