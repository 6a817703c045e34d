"""Names, shapes and dtypes of a checkpoint's tensors, from the headers of its files: no weight is read."""

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from fxfuse.errors import CheckpointError, PlanError
from fxfuse.passes.weights import TensorSpec, WeightPlan
from fxfuse.runtime.safetensors_file import Entry, read_entries

CONFIG = "config.json"
QUANTIZATION = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
PLAN = "fxfuse_plan.json"

# pickles, which could run anything, and formats of other programs
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config.json, with what ModelOpt says of the weights in a file of its own.

    Raises CheckpointError when a file is missing or no JSON object.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory}: not a directory; give the directory that holds {CONFIG}")
    config = _read_object(directory / CONFIG)
    beside = directory / QUANTIZATION
    if "quantization_config" not in config and os.path.lexists(beside):
        fields = _read_object(beside).get("quantization")
        if not isinstance(fields, dict):
            raise CheckpointError(f'{beside}: says nothing under "quantization"; fetch it again')
        config["quantization_config"] = {"quant_method": "modelopt", **fields}
    return config


def read_plan(directory: Path) -> WeightPlan | None:
    """The plan that a converted checkpoint was made with, or None; raises CheckpointError if damaged."""
    file = directory / PLAN
    if not os.path.lexists(file):
        return None
    try:
        return WeightPlan.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, PlanError) as error:
        raise CheckpointError(f"{file}: not a readable weight plan ({error}); convert again") from error


def read_headers(directory: Path) -> dict[str, TensorSpec]:
    """Name, shape and dtype of every tensor of a checkpoint; raises what `read_tensors` raises."""
    return {name: entry.spec for name, entry in read_tensors(directory).items()}


def read_tensors(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint by name, file by file; one file without an index works like many.

    Raises CheckpointError, naming the file, when one is missing or damaged, lies elsewhere, or disagrees with
    the index.
    """
    if not os.path.isdir(directory):
        raise CheckpointError(f"{directory}: not a directory; give the directory that holds the weights")
    index = directory / INDEX
    # a link to nothing is an index that cannot be read, not one that is absent
    weight_map = _weight_map(index) if os.path.lexists(index) else None
    contents: dict[str, list[str]] = {}
    for tensor, name in (weight_map or {}).items():
        contents.setdefault(name, []).append(tensor)
    if weight_map is None:
        contents = {file.name: [] for file in directory.glob("*.safetensors")}
    if not contents:
        unread = sorted(file.name for file in directory.glob("*") if file.suffix in OTHER_WEIGHTS)
        raise CheckpointError(
            f"{directory}: no {INDEX} and no *.safetensors file; fetch the files with the weights"
            + (f" ({unread[0]} is in a format that is never read)" if unread else "")
        )
    found: dict[str, Entry] = {}
    for file, expected in sorted(contents.items()):
        for entry in _entries_of(directory, file, expected):
            if entry.spec.name in found:
                other = found[entry.spec.name].file.name
                raise CheckpointError(
                    f"{directory / file}: {entry.spec.name} is in {other} as well; keep one"
                )
            found[entry.spec.name] = entry
    for tensor, name in (weight_map or {}).items():
        if tensor not in found or found[tensor].file.name != name:
            where = f"it is in {found[tensor].file.name}" if tensor in found else "it is in no file"
            raise CheckpointError(f"{index}: places {tensor} in {name}, but {where}; rebuild the index")
    if not found:
        raise CheckpointError(f"{directory}: {sorted(contents)[0]} holds no tensors; fetch it again")
    return found


def check_inside(directory: Path, file: Path) -> None:
    """Raises CheckpointError for a link out of the checkpoint, other than into the blobs of a Hub cache."""
    try:
        home, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    # a link to nothing is reported as what is missing
    if os.path.exists(target) and not target.is_relative_to(home) and not target.is_relative_to(blobs):
        raise CheckpointError(f"{file}: a link out of the checkpoint, to {target}; copy the file there")


def _entries_of(directory: Path, name: str, expected: list[str]) -> list[Entry]:
    """The tensors of one file; what is raised names those that the index expects there."""
    try:
        check_inside(directory, directory / name)
        return read_entries(directory / name)
    except CheckpointError as error:
        if not expected:
            raise
        more = f" and {len(expected) - 1} more" if len(expected) > 1 else ""
        raise CheckpointError(f"{error}; by the index it holds {expected[0]}{more}") from error


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = _read_object(index).get("weight_map")
    if (
        not weight_map
        or not isinstance(weight_map, dict)
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; rebuild the index")
    for tensor, name in weight_map.items():
        if PurePath(name).name != name or name in {"", ".."}:
            raise CheckpointError(
                f"{index}: places {tensor} in {name!r}; the files of a checkpoint lie beside its index"
            )
    return weight_map


def _read_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file}: missing, or a link to nothing; give the directory of a checkpoint, or fetch it again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds no JSON object; fetch it again")
    return data
