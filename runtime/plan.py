"""Plans by the name of a layout, for a model, a config or a checkpoint directory; no weight is read."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from fxfuse.runtime.layouts.scales import Step, check_every_scale, with_scales
from fxfuse.runtime.layouts.sglang import LOGICAL, to_sglang
from fxfuse.runtime.layouts.tensor_parallel import shards
from fxfuse.runtime.quantization import check_formats, scheme_of
from fxfuse.runtime.recognise import way_back
from fxfuse.runtime.template import load_config, template

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
    completes. A directory may be in any layout: `fxfuse.convert` leaves its plan in it, names that other
    programs use are recognised. Tensors outside the decoder's layers (embeddings, head, vision, `mtp.`) are
    never changed.

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
    check_layout(layout)
    if tp is not None and (not isinstance(tp, tuple | list) or len(tp) != 2):
        raise PlanError(f"tp={tp!r}: give (rank, world) with 0 <= rank < world")
    subject = _inspect(source)
    layers = Decoder(subject.family, Geometry(), subject.tensors).of_layers()
    scheme, specs = scheme_of(subject.config), [spec for _, layer in layers for spec in layer.values()]
    check_formats(specs, scheme)
    if scheme is not None:
        check_every_scale((spec.name for spec in specs), subject.tensors)
    draft, origin = Draft(subject.tensors), None
    if isinstance(source, str | os.PathLike):
        for back in _ways_back(Path(source), subject):
            draft.then(back.transforms, back.usages)
            origin = Draft(draft.tensors)
    for transforms, usages in _steps(replace(subject, tensors=draft.tensors), layout, tp):
        draft.then(transforms, usages)
        if origin is not None:
            origin.then(transforms, usages)
    planned = draft.plan()
    return planned, planned if origin is None else origin.plan()


def check_layout(layout: object) -> None:
    """Raises PlanError for what is no name of a layout."""
    if not isinstance(layout, str) or layout not in _STEPS:
        raise PlanError(f"layout {layout!r} is not known; known are: {', '.join(LAYOUTS)}")


def plan_of_tensors(config: Any, tensors: Mapping[str, TensorSpec], layout: str) -> WeightPlan:
    """`plan` for tensors in transformers' layout, of a model with this config; raises what it raises."""
    return _planned(_Subject(family_of(config.model_type), config, tensors), layout)


@dataclass(frozen=True)
class _Subject:
    """What is planned: its family, its config and its tensors."""

    family: Family
    config: Any
    tensors: Mapping[str, TensorSpec]


def _planned(subject: _Subject, layout: str) -> WeightPlan:
    draft = Draft(subject.tensors)
    for transforms, usages in _steps(subject, layout):
        draft.then(transforms, usages)
    return draft.plan()


def _steps(subject: _Subject, layout: str, tp: tuple[int, int] | None = None) -> list[Step]:
    """The rank's shards, if any, and then the layout, from transformers' layout on."""
    family, tensors = subject.family, subject.tensors
    if not family.groups and (layout not in _OF_EXPERTS or tp is not None):
        raise PlanError(
            f"{family.name}: only its experts are planned, so not layout {layout!r}"
            f"{'' if tp is None else f' for tp={tp}'}; ask for layout 'hf' (a layer's experts as one stack) "
            "or 'per_expert' (one by one), without tp"
        )
    by_heads = tp is not None or layout in _BY_HEADS
    geometry = geometry_of(subject.config) if by_heads else Geometry()
    geometry = with_experts(geometry, subject.config, family.experts)
    scheme = scheme_of(subject.config)
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


def _inspect(source: Any) -> _Subject:
    """Family, config and tensors of a model, config or checkpoint directory."""
    if isinstance(source, str | os.PathLike):
        config: Any = SimpleNamespace(**read_config(Path(source)))
        return _Subject(family_of(getattr(config, "model_type", None)), config, read_headers(Path(source)))
    if isinstance(source, torch.nn.Module):
        from transformers import PreTrainedModel

        model = source if isinstance(source, PreTrainedModel) else find_decoder(source).model
        config = getattr(model, "config", None)
        tensors = plain_tensors(model).items()
        specs = {name: TensorSpec(name, tuple(t.shape), str(t.dtype)) for name, t in tensors}
        return _Subject(family_of(getattr(config, "model_type", None)), config, specs)
    if hasattr(source, "get_text_config"):
        family, scheme = family_of(source.model_type), scheme_of(source)
        if scheme is not None and scheme.plain is None:
            raise PlanError(
                f"weights quantised with {scheme.name}: only the files say which have scales; "
                "give the checkpoint directory"
            )
        return _Subject(family, source, template(source, family, scheme))
    raise UnsupportedModelError(
        f"no plan for a {type(source).__name__}: give a transformers model, its config or a directory"
    )


def _ways_back(directory: Path, subject: _Subject) -> Iterator[WeightPlan]:
    """Plans that lead, one after another, from a directory's tensors to transformers' layout."""
    tensors = subject.tensors
    earlier = read_plan(directory)
    if earlier is not None:
        for target in earlier.targets:
            if tensors.get(target.name) != target:
                raise CheckpointError(
                    f"{directory}: its plan made {target}, the files have {tensors.get(target.name)}; "
                    "convert again"
                )
        back = earlier.inverse()
        tensors = Draft(tensors).then(back.transforms, back.usages).tensors
        yield back
    if _lacks_a_group(subject.family, tensors):
        scheme = scheme_of(subject.config)
        if scheme is not None and scheme.plain is None:
            return
        config = load_config(vars(subject.config))
        own = _Subject(subject.family, config, template(config, subject.family, scheme))

        found = way_back(lambda layout: _planned(own, layout), LAYOUTS, own.tensors, tensors)
        if found is not None and len(found):
            yield found


def _lacks_a_group(family: Family, tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether no layer has the linears of some group: another program may have merged them."""
    layers = Decoder(family, Geometry(), tensors).of_layers()
    members = {name.removesuffix(".weight") for _, layer in layers for name in layer}
    return any(members.isdisjoint(group.members) for group in family.groups)
