"""The header reader against the safetensors library, on lies, and on thousands of mutations."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fxfuse.errors import CheckpointError
from fxfuse.runtime.safetensors_file import Entry, header_of, read_entries


def write(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_names_shapes_dtypes_and_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.randn(2, 3),
        "b": torch.randn(4).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "fp8": torch.randn(3, 3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    found = {e.spec.name: e for e in read_entries(file)}
    raw = file.read_bytes()
    with safe_open(file, framework="np") as opened:
        assert found.keys() == set(opened.keys())
        for name, e in found.items():
            assert list(e.spec.shape) == opened.get_slice(name).get_shape()
            assert e.dtype == opened.get_slice(name).get_dtype()
            expected = tensors[name].contiguous().flatten().view(torch.uint8)
            assert raw[e.offset : e.offset + e.size] == bytes(expected.tolist())


def test_a_header_that_we_write_is_read_by_the_library(tmp_path: Path) -> None:
    first, second = torch.randn(2, 3), torch.arange(5, dtype=torch.int16)
    save_file({"ä": first, "b": second}, tmp_path / "one.safetensors")
    entries = read_entries(tmp_path / "one.safetensors")
    raw = (tmp_path / "one.safetensors").read_bytes()
    file = tmp_path / "two.safetensors"
    data = b"".join(raw[e.offset : e.offset + e.size] for e in entries)
    file.write_bytes(header_of((e.spec, e.dtype, e.size) for e in entries) + data)
    with safe_open(file, framework="pt") as opened:
        assert torch.equal(opened.get_tensor("ä"), first)
        assert torch.equal(opened.get_tensor("b"), second)
        assert opened.metadata() == {"format": "pt"}


LIES: dict[str, tuple[Any, bytes]] = {
    "overlaps": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "b leaves a gap after a": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "a leaves a gap after the header": ({"a": entry(offsets=(4, 12))}, bytes(12)),
    "a ends at byte": ({"a": entry()}, bytes(7)),
    "the file at byte": ({"a": entry()}, bytes(9)),
    "takes 12 bytes": ({"a": entry(shape=(3,))}, bytes(8)),
    "a: F32 .* takes 8 bytes, it has": ({"a": entry(offsets=(8, 0))}, bytes(8)),
    "unknown dtype 'F33'": ({"a": entry("F33")}, bytes(8)),
    "unknown dtype None": ({"a": entry(None)}, bytes(8)),
    "are no shape and offsets": ({"a": entry(shape=(-2,))}, bytes(8)),
    "are no shape and offsets ": ({"a": entry(shape=(2.0,))}, bytes(8)),
    "are no shape and offsets  ": ({"a": entry(shape=(True, 2))}, bytes(8)),
    "are no shape and offsets   ": ({"a": entry(offsets=(0, 8, 9))}, bytes(8)),
    "are no shape and offsets    ": ({"a": entry(shape=[2**63], offsets=(0, 8))}, bytes(8)),
    "is not described by": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "'a' is not described by": ({"a": entry() | {"more": 1}}, bytes(8)),
    "'' is not described": ({"": entry()}, bytes(8)),
    "metadata is no object of strings": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "is no JSON object": ([1, 2], b""),
    "is no JSON: a is described twice": (b'{"a": 1, "a": 2}', b""),
    "its header is no JSON": (b'{"a" 1}', b""),
    "is no JSON: 'utf-8'": (b'{"\xff": 1}', b""),
    "header is no JSON: maximum recursion": (b"[" * 200_000, b""),
}


@pytest.mark.parametrize("message", LIES)
def test_a_header_that_lies_is_refused(message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", *LIES[message])
    with pytest.raises(
        CheckpointError, match=rf"a\.safetensors: not a readable safetensors file .*{message.strip()}"
    ):
        read_entries(file)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length_is_refused_without_reading_it(length: int, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", {"a": entry()}, bytes(8), length)
    with pytest.raises(CheckpointError, match="cannot hold a header of"):
        read_entries(file)


def test_a_huge_header_in_a_file_of_holes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", b"{}", length=2**33)
    os.truncate(file, 2**34)
    with pytest.raises(CheckpointError, match="cannot hold a header of 8589934592"):
        read_entries(file)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nowhere"):
        with pytest.raises(CheckpointError, match=name):
            read_entries(tmp_path / name)


def test_thousands_of_mutated_headers_are_read_or_refused(tmp_path: Path) -> None:
    """What is accepted tiles the file, and the library accepts it too; nothing else is raised."""
    good = tmp_path / "good.safetensors"
    save_file({"a.weight": torch.randn(4, 3), "b": torch.arange(6), "c": torch.zeros(0)}, good)
    whole = good.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    rng = random.Random(0)
    words = [
        b'"a.weight"',
        b"-1",
        b"1e9",
        b"[",
        b"]",
        b"null",
        b"18446744073709551616",
        b",",
        b'"F32"',
        b"true",
    ]
    file = tmp_path / "mutated.safetensors"
    accepted = 0
    for _ in range(4000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(start + 4)
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                data[at : at + rng.randrange(4)] = rng.choice(words)
            elif kind == 2:
                del data[at : at + rng.randrange(1, 9)]
            else:
                other = rng.randrange(8, start)
                data[at : at + 4] = data[other : other + 4]
        file.write_bytes(data)
        try:
            entries = read_entries(file)
        except CheckpointError as error:
            assert "mutated.safetensors" in str(error)
            continue
        accepted += 1
        assert _tile(entries, len(data))
        try:
            with safe_open(file, framework="np") as opened:
                assert set(opened.keys()) == {e.spec.name for e in entries}
        except SafetensorError as error:
            pytest.fail(f"accepted what the library refuses: {error}\n{bytes(data[:start])!r}")
    assert 0 < accepted < 4000


def _tile(entries: list[Entry], size: int) -> bool:
    ends = [entries[0].offset, *(e.offset + e.size for e in entries)]
    return all(e.offset == end for e, end in zip(entries, ends, strict=False)) and ends[-1] == size
