"""Checkpoints rewritten in another layout, file by file and piece by piece, and compared across layouts."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxfuse.errors import CheckpointError, OptionError
from fxfuse.passes.weights import Draft, WeightPlan
from fxfuse.runtime.checkpoint_writer import (
    Progress,
    carry_files,
    files_beside,
    new_directory,
    write_tensors,
    write_text,
)
from fxfuse.runtime.faults import check_scales, read_checked
from fxfuse.runtime.headers import PLAN, read_config, read_tensors
from fxfuse.runtime.plan import plan_and_origin
from fxfuse.runtime.safetensors_file import Entry
from fxfuse.runtime.streaming import Files, PlannedTensors

SHARD_BYTES = 5 * 10**9
_STEP = 2**20


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: where from and to, how much in which files, and how long it took.

    `carried` are the files that were copied as they are, `left_out` those of the source that were not:
    weights that its index does not name or in formats that are not read, and folders that hold weights.
    """

    source: str
    destination: str
    layout: str
    tensors: int
    changed: int
    files: tuple[str, ...]
    carried: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes: int
    seconds: float
    plan_digest: str

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    def to_json(self) -> str:
        """The record as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        rate = self.bytes / max(self.seconds, 1e-9) / 1e9
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return (
            f"{self.destination}: layout {self.layout}, {self.tensors} tensors ({self.changed} made anew) "
            f"in {files}, {self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s ({rate:.2f} GB/s)"
            + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")
        )


def convert(
    src_dir: "str | os.PathLike[str]",
    dst_dir: "str | os.PathLike[str]",
    layout: str = "fused",
    *,
    tp: tuple[int, int] | None = None,
    plan: WeightPlan | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Conversion:
    """Write the checkpoint in `src_dir` to `dst_dir` in another layout, every tensor in its own dtype.

    Memory does not grow with the model or with a tensor. Config, tokenizer and other files beside the
    weights are carried along byte for byte, those in folders as well; weights that were not read, and
    folders that hold some, stay behind, and the record names them. The plan is kept in `fxfuse_plan.json`:
    with it the directory can be converted again, also back to "hf". Files are rewritten, not models:
    config.json still names the model that the weights are of, also where a layout ("qwen3_next", "qwen3_5")
    is that of another family.
    The destination appears when everything is on the disk, or not at all.

    Args:
        layout: one of `fxfuse.plan`'s names.
        tp: (rank, world): write what this rank holds.
        plan: instead of a layout, any plan for these tensors.
        progress: called with the bytes written so far and the bytes in all.
        shard_bytes: largest size of a file; a larger tensor has one to itself.
        overwrite: whether an existing destination may be replaced.

    Raises:
        CheckpointError: source or destination is not as it should be; the file and the tensor are named.
        PlanError: the layout is impossible for these tensors.
    """
    start = time.perf_counter()
    source, destination = Path(src_dir), Path(dst_dir)
    if type(shard_bytes) is not int or shard_bytes < 1:
        raise OptionError(f"shard_bytes={shard_bytes!r}: give a positive number of bytes")
    _check_apart(source, destination)
    entries, earlier = read_checked(source)
    if plan is None:
        planned, origin = plan_and_origin(source, layout, tp)
    elif tp is not None:
        raise OptionError("tp belongs to a layout; a plan says by itself what a rank holds")
    else:
        layout, planned = "given by a plan", plan.bind({name: e.spec for name, e in entries.items()})
        origin = _after(earlier, planned, entries)
    tensors = PlannedTensors(entries, planned)
    check_scales(entries)
    beside, left_out = files_beside(source, {entry.file for entry in entries.values()})
    _check_room(destination, sum(tensors.describe(name).size for name in tensors.names))
    with new_directory(destination, overwrite) as folder:
        files = write_tensors(folder, tensors, shard_bytes, progress)
        carried = carry_files(source, beside, folder)
        if len(origin):
            write_text(folder / PLAN, origin.to_json() + "\n")
    return Conversion(
        source=str(source),
        destination=str(destination),
        layout=layout,
        tensors=len(tensors.names),
        changed=len(planned),
        files=tuple(files),
        carried=tuple(carried),
        left_out=tuple(left_out),
        bytes=sum(tensors.describe(name).size for name in tensors.names),
        seconds=time.perf_counter() - start,
        plan_digest=planned.digest,
    )


def differences(
    left: "str | os.PathLike[str]", right: "str | os.PathLike[str]", progress: Progress | None = None
) -> Iterator[str]:
    """In words, every tensor that two checkpoints do not share bit for bit, whatever layouts they are in.

    Both are read in transformers' layout, a piece at a time. Raises CheckpointError and PlanError for a
    checkpoint that cannot be brought to it.
    """
    sides = []
    for directory in (Path(left), Path(right)):
        read_config(directory)
        sides.append(PlannedTensors(read_tensors(directory), plan_and_origin(directory, "hf")[0]))
    a, b = sides
    names, known = dict.fromkeys((*a.names, *b.names)), (set(a.names), set(b.names))
    total, done = sum(a.describe(name).size for name in a.names), 0
    with Files() as files:
        for name in names:
            if name not in known[0] or name not in known[1]:
                yield f"{name}: only in {left if name in known[0] else right}"
                continue
            mine, other = a.describe(name), b.describe(name)
            done += mine.size
            if (mine.spec.shape, mine.dtype) != (other.spec.shape, other.dtype):
                yield f"{name}: {mine.dtype} {list(mine.spec.shape)}, {other.dtype} {list(other.spec.shape)}"
            elif (at := _first_difference(a.pieces(name, files), b.pieces(name, files))) is not None:
                yield f"{name}: differs from byte {at:,} of {mine.size:,} on"
            if progress is not None:
                progress(done, total)


def _first_difference(left: Iterator[memoryview], right: Iterator[memoryview]) -> int | None:
    """Index of the first byte that differs, or None; both sides have the same number of bytes."""
    at = 0
    mine, other = memoryview(b""), memoryview(b"")
    while True:
        mine = mine or next(left, memoryview(b""))
        other = other or next(right, memoryview(b""))
        size = min(len(mine), len(other))
        if not size:
            return None
        x, y = (torch.frombuffer(piece, dtype=torch.uint8, count=size) for piece in (mine, other))
        if not torch.equal(x, y):
            # a step at a time: to say of every byte whether it differs takes as much memory again
            for start in range(0, size, _STEP):
                found = (x[start : start + _STEP] != y[start : start + _STEP]).nonzero()
                if len(found):
                    return at + start + int(found[0])
        mine, other, at = mine[size:], other[size:], at + size


def _check_apart(source: Path, destination: Path) -> None:
    home, new = (Path(os.path.realpath(path)) for path in (source, destination))
    if new == home or new.is_relative_to(home) or home.is_relative_to(new):
        raise CheckpointError(f"{destination}: lies in the source or around it; choose one apart from it")


def _check_room(destination: Path, size: int) -> None:
    """Raises CheckpointError when the disk has no room for the result."""
    folder = next((parent for parent in destination.absolute().parents if os.path.isdir(parent)), None)
    if folder is None:
        return
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < size:
        raise CheckpointError(
            f"{destination}: needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left; choose another"
        )


def _after(earlier: WeightPlan | None, planned: WeightPlan, entries: Mapping[str, Entry]) -> WeightPlan:
    """The plan that leads to `planned`'s targets from transformers' layout."""
    if earlier is None:
        return planned
    made = {target.name for target in earlier.targets}
    first = {source.name: source for source in earlier.sources}
    rest = {name: entry.spec for name, entry in entries.items() if name not in made}
    draft = Draft(rest | first).then(earlier.transforms, earlier.usages)
    return draft.then(planned.transforms, planned.usages).plan()
