"""Names, shapes and dtypes of a checkpoint's tensors, from the headers of its files: no weight is read."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open

from fxfuse.errors import CheckpointError, PlanError
from fxfuse.passes.weights import TensorSpec, WeightPlan

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
PLAN = "fxfuse_plan.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's config.json; raises CheckpointError when it is missing or no JSON object."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: not a directory; give the directory that holds {CONFIG}")
    return _read_object(directory / CONFIG)


def read_plan(directory: Path) -> WeightPlan | None:
    """The plan that a converted checkpoint was made with, or None; raises CheckpointError if damaged."""
    file = directory / PLAN
    if not file.exists() and not file.is_symlink():
        return None
    try:
        return WeightPlan.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, PlanError) as error:
        raise CheckpointError(f"{file}: not a readable weight plan ({error}); convert again") from error


def read_headers(directory: Path) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint by name, file by file; one file without an index works like many.

    Raises CheckpointError, naming the file, when one is missing or damaged or disagrees with the index.
    """
    index = directory / INDEX
    # is_symlink: a link to nothing is an index that cannot be read, not one that is absent
    weight_map = _weight_map(index) if index.exists() or index.is_symlink() else None
    names = (
        {file.name for file in directory.glob("*.safetensors")}
        if weight_map is None
        else {*weight_map.values()}
    )
    if not names:
        raise CheckpointError(
            f"{directory}: no {INDEX} and no *.safetensors file; fetch the files with the weights"
        )
    headers: dict[str, TensorSpec] = {}
    files: dict[str, str] = {}
    for name in sorted(names):
        for spec in _read_file(directory / name):
            if spec.name in headers:
                raise CheckpointError(
                    f"{directory / name}: {spec.name} is in {files[spec.name]} as well; keep one"
                )
            headers[spec.name], files[spec.name] = spec, name
    for tensor, name in (weight_map or {}).items():
        if files.get(tensor) != name:
            where = f"it is in {files[tensor]}" if tensor in files else "it is in no file"
            raise CheckpointError(f"{index}: places {tensor} in {name}, but {where}; rebuild the index")
    return headers


def _read_file(file: Path) -> list[TensorSpec]:
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, or a link to nothing; fetch it again")
        # framework="pt" maps the file writable, which a system short of memory refuses for a large one
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
            return [TensorSpec(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = _read_object(index).get("weight_map")
    if (
        not weight_map
        or not isinstance(weight_map, dict)
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise CheckpointError(f"{index}: has no weight_map from tensors to files; rebuild the index")
    outside = next(
        (name for name in weight_map.values() if PurePath(name).name != name or name in {"", ".."}), None
    )
    if outside is not None:
        raise CheckpointError(f"{index}: names {outside!r}; the files of a checkpoint lie beside its index")
    return weight_map


def _read_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing, or a link to nothing; fetch it again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds no JSON object; fetch it again")
    return data
