"""Converted checkpoints against loaded state dicts, killed and refused conversions, and bounded memory."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fxfuse.errors import CheckpointError, OptionError, PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform, WeightPlan, all_ranks
from fxfuse.runtime.convert import _first_difference, convert, differences
from fxfuse.runtime.headers import read_tensors
from fxfuse.runtime.plan import plan
from fxfuse.runtime.safetensors_file import read_entries
from fxfuse.runtime.streaming import Files, PlannedTensors


@pytest.fixture
def dense(narrow: Any, tmp_path: Path) -> Path:
    return narrow.write(tmp_path / "dense", narrow.state("dense"), shards=3)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """As any other program reads it; a tensor in two files would show."""
    result: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in result
            result[name] = tensor
    return result


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    def bits(t: torch.Tensor) -> tuple[object, ...]:
        return t.dtype, t.shape, t.contiguous().flatten().view(torch.uint8).tolist()

    return {n: bits(t) for n, t in left.items()} == {n: bits(t) for n, t in right.items()}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}


KINDS = [
    ("dense", "fused"),
    ("dense", "qwen3_next"),
    ("dense", "sglang"),
    ("dense", "fastdeploy"),
    ("moe", "per_expert"),
    ("moe", "sglang"),
    ("next", "qwen3_5"),
    ("next", "fused"),
]


@pytest.mark.parametrize(("kind", "layout"), KINDS)
def test_there_and_back_is_byte_equal_and_there_is_the_plan_applied(
    narrow: Any, kind: str, layout: str, tmp_path: Path
) -> None:
    weights = narrow.state(kind)
    source = narrow.write(tmp_path / "source", weights, kind, shards=3)
    before = contents(source)
    result = convert(source, tmp_path / "there", layout, shard_bytes=6_000)
    assert contents(source) == before
    there = load(tmp_path / "there")
    assert same(there, plan(source, layout).apply(weights))
    for file in (tmp_path / "there").glob("*.safetensors"):
        assert sum(e.size for e in read_entries(file)) <= 6_000
    index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == there.keys()
    assert len(result.files) == len(set(index["weight_map"].values())) > 2
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "there" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "there" / "pytorch_model.bin").exists()
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert [f.name for f in (tmp_path / "back").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "back" / "fxfuse_plan.json").exists()
    assert same(load(tmp_path / "back"), weights)
    for left, right in (("source", "there"), ("there", "back")):
        assert list(differences(tmp_path / left, tmp_path / right)) == []


def test_a_tied_head_is_not_in_the_files_and_not_missed(narrow: Any, tmp_path: Path) -> None:
    weights = narrow.state("dense")
    del weights["lm_head.weight"]
    fields = narrow.configs["dense"].to_dict() | {"tie_word_embeddings": True}
    source = narrow.write(tmp_path / "source", weights, fields, shards=3)
    convert(source, tmp_path / "there", "fused")
    convert(tmp_path / "there", tmp_path / "back", "hf")
    assert same(load(tmp_path / "back"), weights)


def test_files_that_another_program_fused_are_converted_and_compared(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "foreign", "sglang")
    (tmp_path / "foreign" / "fxfuse_plan.json").unlink()
    assert list(differences(dense, tmp_path / "foreign")) == []
    convert(tmp_path / "foreign", tmp_path / "fused")
    convert(dense, tmp_path / "expected")
    assert same(load(tmp_path / "fused"), load(tmp_path / "expected"))
    # the plan that is left leads to transformers' layout, not to the one that was found
    convert(tmp_path / "fused", tmp_path / "back", "hf")
    assert same(load(tmp_path / "back"), load(dense))


def test_one_layout_becomes_another_without_a_way_over_the_first(
    narrow: Any, dense: Path, tmp_path: Path
) -> None:
    convert(dense, tmp_path / "fused")
    for layout in ("sglang", "fastdeploy"):
        convert(tmp_path / "fused", tmp_path / layout, layout)
        assert same(load(tmp_path / layout), plan(dense, layout).apply(narrow.state("dense")))
        convert(tmp_path / layout, tmp_path / f"{layout} back", "fused")
        assert same(load(tmp_path / f"{layout} back"), load(tmp_path / "fused"))
        assert list(differences(tmp_path / layout, tmp_path / "fused")) == []


def test_single_experts_become_the_stack_that_transformers_holds(narrow: Any, tmp_path: Path) -> None:
    weights = narrow.state("moe")
    single = plan(narrow.configs["moe"], "per_expert").apply(weights)
    source = narrow.write(tmp_path / "single", single, "moe", shards=3)
    convert(source, tmp_path / "stacked", "hf")
    assert same(load(tmp_path / "stacked"), weights)


def test_ranks_are_written_apart_and_hold_the_whole_together(
    narrow: Any, dense: Path, tmp_path: Path
) -> None:
    weights = narrow.state("dense")
    for rank in range(2):
        convert(dense, tmp_path / str(rank), "sglang", tp=(rank, 2))
    plans = [plan(dense, "sglang", tp=(rank, 2)) for rank in range(2)]
    held = [load(tmp_path / str(rank)) for rank in range(2)]
    named = {f"rank{r}.{n}": t for r in range(2) for n, t in held[r].items()}
    back = all_ranks(plans).inverse().apply(named)
    assert all(torch.equal(back[s.name], weights[s.name]) for p in plans for s in p.sources)
    with pytest.raises(PlanError, match="only a part of it is here"):
        convert(tmp_path / "0", tmp_path / "whole", "hf")


def test_a_plan_of_ones_own_can_be_given(narrow: Any, dense: Path, tmp_path: Path) -> None:
    weights = narrow.state("dense")
    name = "model.embed_tokens.weight"
    own = WeightPlan(
        (TensorSpec(name, (32, 16)),),
        (
            Transform(TensorSpec("top", (30, 16)), RowMap((Rows(name, 0, 30),))),
            Transform(TensorSpec("rest", (2, 16)), RowMap((Rows(name, 30, 32),))),
        ),
    )
    convert(dense, tmp_path / "fused")
    convert(tmp_path / "fused", tmp_path / "own", plan=own)
    assert torch.equal(load(tmp_path / "own")["rest"], weights[name][30:])
    convert(tmp_path / "own", tmp_path / "back", "hf")
    assert same(load(tmp_path / "back"), weights)
    with pytest.raises(OptionError, match="tp belongs to a layout"):
        convert(dense, tmp_path / "no", plan=own, tp=(0, 2))


@pytest.mark.parametrize(("kind", "layout"), KINDS)
@pytest.mark.parametrize("chunk", [8, 24, 100, 1000])
@pytest.mark.parametrize("tp", [None, (1, 2)])
def test_pieces_of_any_size_make_the_same_bytes(
    narrow: Any, kind: str, layout: str, chunk: int, tp: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Far below the length of a row, too: then a tile is a part of one row."""
    if tp and kind == "next":
        tp = (0, 1)
    weights = narrow.state(kind)
    source = narrow.write(tmp_path / "source", weights, kind, shards=3)
    planned = plan(source, layout, tp=tp)
    tensors = PlannedTensors(read_tensors(source), planned, chunk)
    expected = planned.apply(weights)
    assert set(tensors.names) == expected.keys()
    with Files() as files:
        for name in tensors.names:
            pieces = [bytes(piece) for piece in tensors.pieces(name, files)]
            assert all(len(piece) <= chunk for piece in pieces)
            flat = expected[name].contiguous().flatten().view(torch.uint8)
            assert b"".join(pieces) == bytes(flat.tolist()), name


# --- nothing half-written


def test_a_killed_run_leaves_nothing_that_looks_complete_and_the_next_one_starts_anew(
    narrow: Any, dense: Path, tmp_path: Path
) -> None:
    program = (
        "import sys, time; from fxfuse.runtime.convert import convert\n"
        "def stop(done, total):\n"
        "    if done > total / 2: print('half', flush=True); time.sleep(600)\n"
        "convert(sys.argv[1], sys.argv[2], progress=stop, shard_bytes=3000)"
    )
    arguments = [sys.executable, "-c", program, str(dense), str(tmp_path / "there")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        with pytest.raises(CheckpointError, match="another run is writing to it"):
            convert(dense, tmp_path / "there")
        process.send_signal(signal.SIGKILL)
    left = tmp_path / ".there.partial"
    assert not (tmp_path / "there").exists()
    assert list(left.glob("*.safetensors"))
    assert not (left / "config.json").exists()
    (left / "stale").mkdir()
    convert(dense, tmp_path / "there")
    assert not left.exists()
    assert same(load(tmp_path / "there"), plan(dense).apply(narrow.state("dense")))
    assert not (tmp_path / "there" / "stale").exists()


def test_an_error_on_the_way_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "there", progress=stop)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_disk_without_room_is_refused_before_writing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(os, "statvfs", lambda folder: Full)
    with pytest.raises(CheckpointError, match=r"the disk has 0\.00 GB left"):
        convert(dense, tmp_path / "there")


def test_an_existing_destination_is_refused_unless_told(dense: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="there: exists"):
        convert(dense, there)
    assert [f.name for f in there.iterdir()] == ["precious"]
    convert(dense, there, overwrite=True)
    assert not (there / "precious").exists()
    assert (there / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "there"}


def test_destinations_that_touch_the_source_or_are_no_folder_are_refused(dense: Path, tmp_path: Path) -> None:
    for wrong in (dense, dense / "inside", tmp_path):
        with pytest.raises(CheckpointError, match="lies in the source or around it"):
            convert(dense, wrong, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "link", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is no folder of its own"):
            convert(dense, wrong, overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(dense, tmp_path / "file" / "below")
    with pytest.raises(OptionError, match="shard_bytes=0"):
        convert(dense, tmp_path / "x", shard_bytes=0)


def test_a_link_into_the_blobs_of_a_hub_cache_is_followed(narrow: Any, dense: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "repo" / "snapshots" / "abc"
    blobs = tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(dense.iterdir())):
        (blobs / str(i)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(i))
    convert(snapshot, tmp_path / "there", "hf")
    assert same(load(tmp_path / "there"), narrow.state("dense"))
    assert not any(path.is_symlink() for path in (tmp_path / "there").iterdir())


def test_a_source_that_shrinks_meanwhile_is_an_error(dense: Path, tmp_path: Path) -> None:
    def shrink(done: int, total: int) -> None:
        for file in dense.glob("*.safetensors"):
            os.truncate(file, 100)

    with pytest.raises(CheckpointError, match=r"model-\d\.safetensors: ends inside of "):
        convert(dense, tmp_path / "there", progress=shrink)
    assert not (tmp_path / "there").exists()


def test_a_checkpoint_without_tensors_is_refused(narrow: Any, tmp_path: Path) -> None:
    source = narrow.write(tmp_path / "source", {})
    save_file({}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"source: model\.safetensors holds no tensors"):
        convert(source, tmp_path / "there", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_link_out_of_the_folder_is_not_carried_along(narrow: Any, tmp_path: Path) -> None:
    source = narrow.write(tmp_path / "source", narrow.state("dense"))
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link out of the checkpoint"):
        convert(source, tmp_path / "there")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "secret"}
    # one that stays inside becomes a file
    (source / "notes.txt").unlink()
    (source / "notes.txt").symlink_to("tokenizer.json")
    convert(source, tmp_path / "there")
    assert (tmp_path / "there" / "notes.txt").read_text() == (source / "tokenizer.json").read_text()
    assert not (tmp_path / "there" / "notes.txt").is_symlink()


def test_files_in_folders_are_carried_along(narrow: Any, tmp_path: Path) -> None:
    """transformers keeps all chat templates but one in a folder."""
    source = narrow.write(tmp_path / "source", narrow.state("dense"))
    template = source / "additional_chat_templates" / "deeper" / "tool.jinja"
    template.parent.mkdir(parents=True)
    template.write_text("{{ messages }}")
    (source / ".cache").mkdir()
    result = convert(source, tmp_path / "there")
    place = template.relative_to(source)
    assert (tmp_path / "there" / place).read_text() == template.read_text()
    assert place.as_posix() in result.carried and result.left_out == ("pytorch_model.bin",)
    assert not (tmp_path / "there" / ".cache").exists()
    (template.parent / "link").symlink_to(tmp_path / "there" / "config.json")
    with pytest.raises(CheckpointError, match="link: a link out of the checkpoint"):
        convert(source, tmp_path / "again")


def test_what_is_left_behind_is_named(narrow: Any, tmp_path: Path) -> None:
    weights = narrow.state("dense")
    source = narrow.write(tmp_path / "source", weights, shards=3)
    save_file({"lost": torch.ones(1)}, source / "more.safetensors")  # which the index does not name
    (source / "pytorch_model.bin").write_bytes(b"")
    (source / "gone.json").symlink_to("nothing")
    (source / "loop").symlink_to(source)
    (source / "checkpoint-1").mkdir()
    (source / "checkpoint-1" / "config.json").write_text("{}")
    save_file({"old": torch.ones(1)}, source / "checkpoint-1" / "model.safetensors")
    result = convert(source, tmp_path / "there", "hf")
    left = ["checkpoint-1/", "gone.json", "loop", "more.safetensors", "pytorch_model.bin"]
    assert list(result.left_out) == left
    assert str(result).endswith(f"left out: {', '.join(left)}")
    assert not {name.strip("/") for name in left} & {path.name for path in (tmp_path / "there").iterdir()}
    assert same(load(tmp_path / "there"), weights)


# --- differences


def test_differences_name_each_tensor_and_where(narrow: Any, dense: Path, tmp_path: Path) -> None:
    weights = narrow.state("dense")
    name = "model.layers.1.mlp.up_proj.weight"
    changed = {n: t.clone() for n, t in weights.items() if n != "flag"}
    changed[name].view(torch.uint8)[3, 5] ^= 1
    changed["mtp.fc.weight"] = changed["mtp.fc.weight"].half()
    changed["new"] = torch.zeros(1)
    other = narrow.write(tmp_path / "other", changed, shards=3)
    convert(other, tmp_path / "fused")
    found = list(differences(dense, tmp_path / "fused"))
    assert sorted(line.split(":")[0] for line in found) == sorted([name, "flag", "mtp.fc.weight", "new"])
    assert f"{name}: differs from byte {3 * 32 + 5} of 768 on" in found
    assert f"flag: only in {dense}" in found
    assert "mtp.fc.weight: BF16 [16, 32], F16 [16, 32]" in found


def test_the_first_difference_takes_no_memory_beyond_a_step() -> None:
    """At the end of a piece, at the start of a later one, and nowhere; pieces are cut differently."""
    data = bytearray(os.urandom(6 * 2**20 + 3))

    def pieces(of: bytearray, size: int) -> Iterator[memoryview]:
        return (memoryview(of)[at : at + size] for at in range(0, len(of), size))

    assert _first_difference(pieces(data, 4 * 2**20), pieces(bytearray(data), 5 * 2**20)) is None
    for at in (0, 2**20, 4 * 2**20 - 1, 4 * 2**20, len(data) - 1):
        other = bytearray(data)
        other[at] ^= 1
        other[-1] ^= 2
        tracemalloc.start()
        try:
            assert _first_difference(pieces(data, 4 * 2**20), pieces(other, 5 * 2**20)) == at
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
    assert _first_difference(iter(()), iter(())) is None


# --- progress


def test_progress_counts_every_byte_once(narrow: Any, dense: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    start = time.perf_counter()
    result = convert(dense, tmp_path / "there", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (result.bytes, result.bytes)
    assert 0 < result.seconds <= time.perf_counter() - start
    assert result.bytes == sum(t.nbytes for t in narrow.state("dense").values())
    assert json.loads(result.to_json())["changed"] == len(plan(dense))
