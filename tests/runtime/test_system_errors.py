"""What the system refuses, before and midway: no room, no permission, a disk that fails."""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fxfuse.errors import CheckpointError
from fxfuse.runtime import checkpoint_writer, safetensors_file, streaming
from fxfuse.runtime.convert import convert
from fxfuse.runtime.load import load_state_dict

SHARD = "model-1.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(narrow: Any, tmp_path: Path) -> Path:
    folder: Path = narrow.write(tmp_path / "source", narrow.model("dense").state_dict(), shards=3)
    return folder


def test_a_full_disk_names_the_tensor_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write_some(descriptor: int, data: memoryview) -> int:
        written.append(len(data))
        if sum(written) > 10_000:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(checkpoint_writer.os, "write", write_some)
    message = r"there: model\.[\w.]+ in model\.safetensors: cannot be written \(the disk is full\)"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_limit_of_the_system_on_files_is_met_like_a_full_disk(source: Path, tmp_path: Path) -> None:
    """Not pretended: no file of this process may be longer than 20,000 bytes."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    command = [sys.executable, "-m", "fxfuse", "convert", str(source), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert "in model.safetensors: cannot be written (File too large)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("back_too", [False, True])
def test_a_destination_that_cannot_be_replaced_is_not_lost(
    back_too: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, old = tmp_path / "there", tmp_path / ".there.old"
    there.mkdir()
    (there / "precious").write_text("x")
    rename = os.rename

    def failing(new: Path, name: Path) -> None:
        if name == there and (back_too or new != old):
            raise OSError(5, "Input/output error", str(new))
        rename(new, name)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.os, "rename", failing)
        where = r"what was there is in .*\.there\.old; move it back" if back_too else r"what was there stays"
        with pytest.raises(CheckpointError, match=rf"there: .*Input/output error.*{where}"):
            convert(source, there, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", ".there.old" if back_too else "there"}
    # and the next run takes nothing that it did not put there
    convert(source, there, overwrite=True)
    assert (there / "config.json").exists()
    assert old.exists() is back_too


def test_a_folder_that_is_named_like_a_replaced_one_is_not_removed(source: Path, tmp_path: Path) -> None:
    there, old = tmp_path / "there", tmp_path / ".there.old"
    old.mkdir()
    (old / "precious").write_text("x")
    convert(source, there)
    with pytest.raises(CheckpointError, match=r"\.there\.old: is in the way"):
        convert(source, there, overwrite=True)
    assert [path.name for path in old.iterdir()] == ["precious"]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there", ".there.old"}


def test_a_folder_that_cannot_be_flushed_holds_a_complete_destination(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, fsync = tmp_path / "there", os.fsync

    def failing(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), tmp_path.stat()):
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint_writer.os, "fsync", failing)
    with pytest.raises(CheckpointError, match=r"there: complete, but .*Input/output error"):
        convert(source, there)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "there"}
    monkeypatch.undo()
    convert(source, tmp_path / "expected")
    for file in (tmp_path / "expected").iterdir():
        assert (there / file.name).read_bytes() == file.read_bytes()


DENIED = {
    "shard": rf"{SHARD}: .*Permission denied.*by the index it holds model\.",
    "config": r"config\.json: .*Permission denied",
    "tokenizer": r"tokenizer\.json: cannot be read .*Permission denied",
    "index": r"index\.json: .*Permission denied",
    "source": r"source: not a directory|config\.json: .*Permission denied",
    "destination": r"\.there\.partial: cannot be written .*Permission denied",
}


def test_what_may_not_be_read_or_written_is_named(narrow: Any, tmp_path: Path) -> None:
    """By a user who may not: root may everything, so that one becomes nobody when all is prepared."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        home.chmod(0o755)
        for what in DENIED:
            source = narrow.write(home / what / "source", narrow.state("dense"), shards=3)
            (home / what / "new").mkdir()
            for path in (*source.iterdir(), source, home / what, home / what / "new"):
                path.chmod(0o777)
            files = {"shard": SHARD, "config": "config.json", "tokenizer": "tokenizer.json", "index": INDEX}
            denied = source / files[what] if what in files else source
            (home / what / "new" if what == "destination" else denied).chmod(
                0o555 if what == "destination" else 0
            )
        program = (
            "import json, os, sys, torch\n"
            "from fxfuse.errors import CheckpointError\n"
            "from fxfuse.runtime.convert import convert\n"
            "from transformers.models.qwen3_5 import modeling_qwen3_5\n"
            "os.getuid() or os.setuid(65534)\n"
            "said = {}\n"
            "for folder in sys.argv[1:]:\n"
            "    try: convert(folder + '/source', folder + '/new/there')\n"
            "    except CheckpointError as error: said[os.path.basename(folder)] = str(error)\n"
            "print(json.dumps(said))"
        )
        arguments = [sys.executable, "-c", program, *(str(home / what) for what in DENIED)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said.keys() == DENIED.keys()
        for what, message in DENIED.items():
            assert re.search(message, said[what])
            assert list((home / what / "new").iterdir()) == []


@pytest.mark.parametrize("on_meta", [False, True])
def test_a_disk_that_fails_midway_is_named_with_what_became_of_the_model(
    on_meta: bool, narrow: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta" if on_meta else "cpu"):
        model = narrow.model("dense")
    reads, preadv = [], os.preadv

    def failing(*arguments: Any) -> int:
        reads.append(1)
        if len(reads) == 30:
            raise OSError(5, "Input/output error")
        return preadv(*arguments)

    monkeypatch.setattr(streaming.os, "preadv", failing)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(model, source)
    message = str(caught.value)
    assert ".safetensors: " in message and "Input/output error" in message
    assert ("the model is partly written (29 of " in message) is not on_meta
    if on_meta:
        assert all(t.is_meta for t in model.parameters())
    # and as the message says
    load_state_dict(model, source)
    for file in source.glob("*.safetensors"):
        assert all(torch.equal(model.state_dict()[n], t) for n, t in load_file(file).items())


def test_a_file_that_shrank_since_its_header_was_read_is_found_before_the_first_write(
    narrow: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = narrow.model("dense")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    last = safetensors_file.read_entries(source / SHARD)[-1].spec.name
    read = safetensors_file.read_entries

    def then_cut(file: Path) -> Any:
        entries = read(file)
        if file.name == "model-2.safetensors":
            os.truncate(source / SHARD, (source / SHARD).stat().st_size - 1)
        return entries

    monkeypatch.setattr("fxfuse.runtime.headers.read_entries", then_cut)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: ends inside of {last}"):
        load_state_dict(model, source)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
