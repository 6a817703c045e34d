"""The bytes of tensors as a plan makes them, a piece at a time, in memory that no tensor's size moves."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from fxfuse.errors import CheckpointError, PlanError
from fxfuse.passes.weights import Rows, Transform, WeightPlan
from fxfuse.runtime.safetensors_file import BITS, Entry

CHUNK = 32 * 2**20
_OPEN_FILES = 32
# element size -> a dtype to move elements as, whatever they mean
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Buffer:
    """Memory that is used again: to clear a new piece for each tensor would cost more than to read one."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, size: int) -> memoryview:
        """`size` bytes, which the next call may hand out again."""
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]


class PlannedTensors:
    """What a plan makes of stored tensors, in order: targets where their first source stood, the rest as it
    is.

    Attributes:
        entries: the stored tensors. plan: bound to them.
        names: every tensor that comes out, in order.

    Raises PlanError as `WeightPlan.bind` does, and for sources whose elements are smaller than a byte.
    """

    def __init__(self, entries: Mapping[str, Entry], plan: WeightPlan, chunk: int = CHUNK) -> None:
        self.entries = entries
        self.plan = plan.bind({name: entry.spec for name, entry in entries.items()})
        self._chunk, self._piece, self._scratch = chunk, _Buffer(), _Buffer()
        self._made = {transform.target.name: transform for transform in self.plan.transforms}
        for source in self.plan.sources:
            if BITS[entries[source.name].dtype] < 8:
                dtype = entries[source.name].dtype
                raise PlanError(
                    f"{source.name}: {dtype} packs several elements in a byte; its rows stay together"
                )
        places = {name: place for place, name in enumerate(entries)}
        first: dict[str, list[str]] = {}
        for transform in self.plan.transforms:
            first.setdefault(min(transform.sources, key=places.__getitem__), []).append(transform.target.name)
        used = {source.name for source in self.plan.sources}
        self.names: list[str] = []
        for name in entries:
            self.names += first.get(name, ())
            if name not in used:
                self.names.append(name)

    def describe(self, name: str) -> Entry:
        """Spec, dtype and size of one tensor that comes out; file and offset are its first source's."""
        transform = self._made.get(name)
        if transform is None:
            return self.entries[name]
        first = self.entries[transform.sources[0]]
        size = transform.target.rows * transform.target.width * BITS[first.dtype] // 8
        return Entry(transform.target, first.dtype, first.file, first.offset, size)

    def pieces(self, name: str, files: "Files") -> Iterator[memoryview]:
        """The bytes of one tensor in order. A piece is valid until the next one of any tensor is taken."""
        transform = self._made.get(name)
        if transform is None:
            entry = self.entries[name]
            yield from self._copied([(entry, 0, entry.size)], entry.size, files)
        elif transform.beside or any(
            block.transposed or block.columns is not None for block in transform.rows.segments
        ):
            yield from self._tiled(transform, files)
        else:
            yield from self._copied(self._ranges(transform), self.describe(name).size, files)

    def _ranges(self, transform: Transform) -> Iterator[tuple[Entry, int, int]]:
        """(source, first byte, number of bytes) of each block of whole rows."""
        for block in transform.rows.segments:
            entry = self.entries[block.source]
            row = entry.spec.width * BITS[entry.dtype] // 8
            yield entry, block.start * row, len(block) * row

    def _copied(
        self, ranges: Iterable[tuple[Entry, int, int]], total: int, files: "Files"
    ) -> Iterator[memoryview]:
        """The byte ranges one after another, in as few pieces as fit."""
        buffer = self._piece.take(min(self._chunk, total))
        filled = 0
        for entry, start, size in ranges:
            while size:
                part = min(size, len(buffer) - filled)
                files.read_into(entry, start, buffer[filled : filled + part])
                start, size, filled = start + part, size - part, filled + part
                if filled == len(buffer):
                    yield buffer
                    filled = 0
        if filled:
            yield buffer[:filled]

    def _tiled(self, transform: Transform, files: "Files") -> Iterator[memoryview]:
        """Tiles of whole target rows or, where one row is too long for a piece, of a part of one."""
        rows, width = transform.target.rows, transform.target.width
        item = BITS[self.entries[transform.sources[0]].dtype] // 8
        widths = {name: self.entries[name].spec.width for name in transform.sources}
        blocks = [(at, left, block) for at, left, block in transform.blocks(widths)]
        high = max(self._chunk // (width * item), 1)
        wide = width if high > 1 else min(width, self._chunk // item)
        storage = self._piece.take(min(high, rows) * wide * item)
        for top in range(0, rows, high):
            bottom = min(top + high, rows)
            for left in range(0, width, wide):
                right = min(left + wide, width)
                view = storage[: (bottom - top) * (right - left) * item]
                tile = torch.frombuffer(view, dtype=_WORDS[item]).view(bottom - top, right - left)
                for at, across, block in blocks:
                    self._fill(tile, top, left, at, across, block, files)
                yield view

    def _fill(
        self, tile: torch.Tensor, top: int, left: int, at: int, across: int, block: Rows, files: "Files"
    ) -> None:
        """Copy the part of `block`, which stands at (at, across), that lies in the tile at (top, left)."""
        entry = self.entries[block.source]
        height, width = len(block), block.width(entry.spec.width)
        r0, r1 = max(top, at), min(top + tile.shape[0], at + height)
        c0, c1 = max(left, across), min(left + tile.shape[1], across + width)
        if r0 >= r1 or c0 >= c1:
            return
        part = block.take(r0 - at, r1 - at).across(c0 - across, c1 - across)
        first, last = part.columns or (0, entry.spec.width)
        into = tile[r0 - top : r1 - top, c0 - left : c1 - left]
        source = into.t() if part.transposed else into
        _read_window(entry, part.start, first, last, source, files, self._chunk, self._scratch)


class Files:
    """Open files by path, the least recently used closed when there are many; a context manager."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def check(self, entries: Iterable[Entry]) -> None:
        """Raises CheckpointError, naming file and tensor, for bytes that are no longer there to be read."""
        last = {entry.file: entry for entry in sorted(entries, key=_by_end)}
        for entry in last.values():
            try:
                size = os.fstat(self._descriptor(entry.file)).st_size
            except OSError as error:
                raise CheckpointError(f"{entry.file}: {entry.spec.name} cannot be read ({error})") from error
            if size < entry.offset + entry.size:
                raise CheckpointError(f"{entry.file}: ends inside of {entry.spec.name}; fetch it again")

    def read_into(self, entry: Entry, start: int, into: memoryview) -> None:
        """Fill `into` with a tensor's bytes from `start` on; raises CheckpointError if it cannot be."""
        try:
            descriptor = self._descriptor(entry.file)
            done = 0
            while done < len(into):
                got = os.preadv(descriptor, [into[done:]], entry.offset + start + done)
                if not got:
                    raise CheckpointError(f"{entry.file}: ends inside of {entry.spec.name}; fetch it again")
                done += got
        except OSError as error:
            raise CheckpointError(f"{entry.file}: {entry.spec.name} cannot be read ({error})") from error

    def _descriptor(self, file: Path) -> int:
        descriptor = self._open.get(file)
        if descriptor is None:
            descriptor = self._open[file] = os.open(file, os.O_RDONLY)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(file)
        return descriptor


def _by_end(entry: Entry) -> int:
    return entry.offset + entry.size


def _read_window(
    entry: Entry,
    row: int,
    first: int,
    last: int,
    into: torch.Tensor,
    files: Files,
    chunk: int,
    scratch: _Buffer,
) -> None:
    """Read columns first..last-1 of the rows from `row` on, as many as `into` has.

    Wide windows are read by whole rows and cut, narrow ones row by row.
    """
    item = into.element_size()
    width = entry.spec.width
    if 2 * (last - first) >= width and width * item <= chunk:
        high = min(chunk // (width * item), into.shape[0])
        buffer = scratch.take(high * width * item)
        for top in range(0, into.shape[0], high):
            count = min(high, into.shape[0] - top)
            view = buffer[: count * width * item]
            files.read_into(entry, (row + top) * width * item, view)
            read = torch.frombuffer(view, dtype=into.dtype).view(count, width)
            into[top : top + count].copy_(read[:, first:last])
        return
    line = scratch.take((last - first) * item)
    values = torch.frombuffer(line, dtype=into.dtype)
    for offset in range(into.shape[0]):
        files.read_into(entry, ((row + offset) * width + first) * item, line)
        into[offset].copy_(values)
