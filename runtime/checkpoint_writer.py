"""A checkpoint directory that appears under its name whole, or not at all."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fxfuse.errors import CheckpointError
from fxfuse.runtime.headers import INDEX, OTHER_WEIGHTS, PLAN, check_inside
from fxfuse.runtime.safetensors_file import Entry, header_of
from fxfuse.runtime.streaming import Files, PlannedTensors

# files of weights, in formats that are not read here, would contradict the ones written
_WEIGHTS = (".safetensors", ".index.json", *OTHER_WEIGHTS)

Progress = Callable[[int, int], None]


@contextmanager
def new_directory(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `destination` that takes its name at the end, and is gone after a failure.

    What a killed run left in it is removed first. A destination that is replaced is `.NAME.old` until the new
    one is on the disk; a folder of that name is never removed unless this run put it there. Raises
    CheckpointError when the destination exists and may not be overwritten, when another run is writing to it,
    and when the system refuses.
    """
    partial = destination.parent / f".{destination.name}.partial"
    old = destination.parent / f".{destination.name}.old"
    try:
        there = os.path.lexists(destination)
        if there and not overwrite:
            raise CheckpointError(
                f"{destination}: exists; choose another folder, or replace it by --overwrite (overwrite=True)"
            )
        if there and (destination.is_symlink() or not destination.is_dir()):
            raise CheckpointError(f"{destination}: is no folder of its own; remove it first")
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(
            f"{partial}: cannot be written ({error}); choose another destination"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise CheckpointError(f"{partial}: another run is writing to it; wait for it to end") from error
    try:
        if there and os.path.lexists(old):
            raise CheckpointError(
                f"{old}: is in the way, and may be what a killed run was to replace; move or remove it"
            )
        _empty(partial)
        yield partial
        os.fsync(lock)
        if there:
            _replace(partial, destination, old)
        else:
            os.rename(partial, destination)
    except OSError as error:
        _remove(partial)
        what = f"{error.filename}: " if error.filename else ""
        why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        left = "what was there stays" if there else "nothing is left there"
        raise CheckpointError(f"{destination}: {what}cannot be written ({why}); {left}") from error
    except BaseException:
        _remove(partial)
        raise
    finally:
        os.close(lock)
    _flush(destination, old if there else None)


def write_tensors(
    folder: Path, tensors: PlannedTensors, shard_bytes: int, progress: Progress | None = None
) -> list[str]:
    """Write every tensor to shards of at most `shard_bytes`, with an index if there are several; their names.

    A tensor larger than a shard has one to itself.
    """
    shards = _shards([tensors.describe(name) for name in tensors.names], shard_bytes)
    total = sum(entry.size for shard in shards for entry in shard)
    count = len(shards)
    files = [
        f"model-{i:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        for i in range(1, count + 1)
    ]
    done = 0
    with Files() as opened:
        for file, shard in zip(files, shards, strict=True):
            with open(folder / file, "xb", buffering=0) as out:
                _write(out.fileno(), memoryview(header_of((e.spec, e.dtype, e.size) for e in shard)))
                for entry in shard:
                    for piece in tensors.pieces(entry.spec.name, opened):
                        with _naming(entry.spec.name, file):
                            _write(out.fileno(), piece)
                        done += len(piece)
                        if progress is not None:
                            progress(done, total)
                with _naming(shard[-1].spec.name, file):
                    os.fsync(out.fileno())
    if count > 1:
        weight_map = {e.spec.name: file for file, shard in zip(files, shards, strict=True) for e in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return files


def files_beside(source: Path, weights: Collection[Path]) -> tuple[list[Path], list[str]]:
    """What goes along with `weights`, and the names of what stays behind.

    Config, tokenizer, chat templates, generation settings and licence go along, those in folders as well.
    Weights that were not read, for want of a place in the index say, folders that hold weights of their own
    and links that lead to no file stay behind; hidden files are not looked at.

    Raises CheckpointError for a folder that cannot be listed and for a link out of the source.
    """
    files: list[Path] = []
    left_out: list[str] = []
    try:
        for item in _visible(source):
            inside = list(_within(item))
            if inside != [item] and any(file.name.endswith(_WEIGHTS) for file in inside):
                left_out.append(f"{item.name}/")
                continue
            for file in inside:
                if file in weights or file in (source / PLAN, source / INDEX):
                    continue
                if file.is_file() and not file.name.endswith(_WEIGHTS):
                    files.append(file)
                else:
                    left_out.append(str(file.relative_to(source)))
    except OSError as error:
        raise CheckpointError(
            f"{source}: cannot be listed ({error}); allow it, or copy the folder"
        ) from error
    for file in files:
        check_inside(source, file)
    return files, left_out


def _visible(folder: Path) -> list[Path]:
    return sorted(item for item in folder.iterdir() if not item.name.startswith("."))


def _within(item: Path) -> Iterator[Path]:
    """The files of a folder and of the folders in it; a link to a folder is not followed."""
    if item.is_symlink() or not item.is_dir():
        yield item
        return
    for inner in _visible(item):
        yield from _within(inner)


def carry_files(source: Path, files: Sequence[Path], folder: Path) -> list[str]:
    """Copy files of the source to the same place in a folder; the places."""
    places = [file.relative_to(source) for file in files]
    for file, place in zip(files, places, strict=True):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = open(file, "rb")  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read ({error}); allow it, or remove it") from error
        with opened, open(folder / place, "xb") as out:
            shutil.copyfileobj(opened, out)
            out.flush()
            os.fsync(out.fileno())
    return [place.as_posix() for place in places]


def write_text(file: Path, text: str) -> None:
    """Write a new file and flush it to the disk."""
    with open(file, "x", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """The tensors in order, in shards; within one, wide elements first, so that all are aligned."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.size
    return [sorted(shard, key=_by_alignment) for shard in shards]


def _by_alignment(entry: Entry) -> int:
    elements = entry.spec.rows * entry.spec.width
    return -(entry.size // elements) if elements else 0


@contextmanager
def _naming(tensor: str, file: str) -> Iterator[None]:
    """What the system refuses says which tensor of which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = f"{tensor} in {file}"
        raise


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _replace(partial: Path, destination: Path, old: Path) -> None:
    """Put the finished folder in the place of another, which becomes `old`, or stays where that fails."""
    os.rename(destination, old)
    try:
        os.rename(partial, destination)
    except OSError as error:
        try:
            os.rename(old, destination)
        except OSError:
            raise CheckpointError(
                f"{destination}: cannot be written ({error}); what was there is in {old}; move it back"
            ) from error
        raise


def _flush(destination: Path, old: Path | None) -> None:
    """Make a rename last; the folder that was replaced goes only then."""
    try:
        parent = os.open(destination.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        before = f"; what was there before is in {old}" if old is not None else ""
        raise CheckpointError(
            f"{destination}: complete, but its name may not outlast a power failure: {destination.parent} "
            f"cannot be flushed ({error}){before}; run sync, and look after the disk"
        ) from error
    if old is not None:
        _remove(old)


def _empty(folder: Path) -> None:
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
