"""The header of a safetensors file, read and checked without trusting it: https://github.com/safetensors/safetensors.

Reads, never maps: a file of any size costs the memory of its header, which may not exceed 100 MB.
"""

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fxfuse.errors import CheckpointError
from fxfuse.passes.weights import TensorSpec

MAX_HEADER = 100_000_000

# width of an element in bits, by the format's own names
BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: `size` bytes from `offset` on; `dtype` is the format's name of its dtype."""

    spec: TensorSpec
    dtype: str
    file: Path
    offset: int
    size: int


def read_entries(file: Path) -> list[Entry]:
    """Every tensor of a file in order of their bytes; raises CheckpointError for whatever is not as it
    should be.

    The tensors tile the rest of the file: none overlaps another, none ends outside, no byte is left over.
    """
    try:
        # a pipe put in the place of a file would never answer
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{file}: missing, or no file; fetch it again")
            length = int.from_bytes(opened.read(8), "little")
            if status.st_size < 8 or not 2 <= length <= min(MAX_HEADER, status.st_size - 8):
                raise _unreadable(file, f"{status.st_size} bytes cannot hold a header of {length}")
            text = opened.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing, or a link to nothing; fetch it again") from error
    except OSError as error:
        raise _unreadable(file, str(error)) from error
    return _entries(file, text, 8 + length, status.st_size - 8 - length)


def header_of(entries: Iterable[tuple[TensorSpec, str, int]]) -> bytes:
    """The start of a file that holds tensors of (spec, dtype, size) in this order, up to their first byte."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec, dtype, size in entries:
        header[spec.name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _entries(file: Path, text: bytes, start: int, room: int) -> list[Entry]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _unreadable(file, "its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _unreadable(file, "its metadata is no object of strings")
    found = sorted((_entry(file, name, fields, start) for name, fields in header.items()), key=_by_offset)
    reached, last = start, "the header"
    for entry in found:
        if entry.offset != reached:
            how = "overlaps" if entry.offset < reached else "leaves a gap after"
            raise _unreadable(file, f"{entry.spec.name} {how} {last}")
        reached, last = entry.offset + entry.size, entry.spec.name
    if reached != start + room:
        cut = next((e.spec.name for e in found if e.offset + e.size > start + room), last)
        raise _unreadable(file, f"{cut} ends at byte {reached}, the file at byte {start + room}")
    return found


def _entry(file: Path, name: str, fields: Any, start: int) -> Entry:
    if not name or not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise _unreadable(file, f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _unreadable(file, f"{name} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _unreadable(file, f"{name}: {shape!r} and {offsets!r} are no shape and offsets")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _unreadable(file, f"{name}: {dtype} {shape} takes {bits / 8:g} bytes, it has {offsets}")
    return Entry(
        TensorSpec(name, tuple(shape), dtype), dtype, file, start + offsets[0], offsets[1] - offsets[0]
    )


def _are_sizes(value: Any) -> bool:
    # bool is an int to Python; 63 bits are what any program that reads the file can count to
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """JSON's objects, refused where a name comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is described twice")
    return found


def _by_offset(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.size


def _unreadable(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file}: not a readable safetensors file ({why}); fetch it again")
