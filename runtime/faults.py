"""What is wrong with a checkpoint's tensors, found before anything is written; headers are checked by
`runtime.headers`."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fxfuse.errors import CheckpointError
from fxfuse.passes.weights import WeightPlan
from fxfuse.runtime.families import family_of
from fxfuse.runtime.headers import read_config, read_plan, read_tensors
from fxfuse.runtime.layouts.scales import scale_kind
from fxfuse.runtime.quantization import fields_of, scheme_of
from fxfuse.runtime.safetensors_file import Entry
from fxfuse.runtime.streaming import Files, PlannedTensors
from fxfuse.runtime.template import decoder_on_meta, load_config


def read_checked(directory: Path) -> tuple[dict[str, Entry], WeightPlan | None]:
    """A checkpoint's tensors, which fit its config, and the plan that it was made with, if any.

    Raises UnsupportedModelError for a family that is not known, PlanError for packed weights in a format
    that the config names and for damaged fields of its quantization_config, and CheckpointError.
    """
    config, entries = read_config(directory), read_tensors(directory)
    family_of(config.get("model_type"))
    earlier = read_plan(directory)
    _check_tensors(config, entries, earlier)
    return entries, earlier


def _check_tensors(
    config: Mapping[str, Any], entries: Mapping[str, Entry], earlier: WeightPlan | None
) -> None:
    """Raises CheckpointError for a decoder's weight that holds no floats or has not the config's shape.

    Raises PlanError where it holds none because of a format that the config names, and for damaged fields of
    its quantization_config.
    """
    given = SimpleNamespace(**config)
    fields_of(given)
    shapes = _expected_shapes(config)
    # what an earlier conversion made has shapes of its own
    for target in earlier.targets if earlier is not None else ():
        shapes.pop(target.name, None)
    for name, entry in entries.items():
        shape = shapes.get(name)
        if shape is None:
            continue
        if not entry.dtype.startswith(("F", "BF")):
            # packed values are no fault of the file: the format that the config names says more
            scheme_of(given)
            raise CheckpointError(f"{entry.file}: {name} has dtype {entry.dtype}; a weight holds floats")
        if shape != entry.spec.shape:
            raise CheckpointError(
                f"{entry.file}: {name} has shape {list(entry.spec.shape)}, "
                f"by config.json it has {list(shape)}"
            )


def check_scales(entries: Mapping[str, Entry]) -> None:
    """Raises CheckpointError for a scale that is no number: every weight under it would be lost.

    Raises it as well for a scale of a dtype that torch lacks, which cannot be looked at.
    """
    with Files() as files:
        unchanged = PlannedTensors(entries, WeightPlan())
        for name, entry in entries.items():
            if not is_scale(name):
                continue
            dtype = getattr(torch, entry.spec.dtype or "", None)
            if dtype is None:
                raise CheckpointError(
                    f"{entry.file}: {name} has dtype {entry.dtype}, which torch has not; take a checkpoint "
                    "whose scales are float32, bfloat16 or float8"
                )
            for piece in unchanged.pieces(name, files):
                if len(piece) and torch.frombuffer(piece, dtype=dtype).float().isnan().any():
                    raise CheckpointError(f"{entry.file}: {name} holds NaN; fetch the file again")


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales of FP8 weights, by its name."""
    return scale_kind(name) is not None


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the decoder's tensors by the names of a two-part and of a text model, experts left out."""
    decoder = decoder_on_meta(load_config(config))
    shapes = {
        name: tuple(tensor.shape) for name, tensor in decoder.named_parameters() if ".experts." not in name
    }
    return {
        prefix + name: shape
        for prefix in ("model.", "model.language_model.")
        for name, shape in shapes.items()
    }
