"""Checkpoint directories read by their headers alone: shards, an index, and files that do not agree."""

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3_5Config

from fxfuse.errors import CheckpointError
from fxfuse.runtime.plan import plan


@pytest.fixture
def sharded(narrow: Any, tmp_path: Path) -> Path:
    narrow.write(tmp_path, narrow.model("dense").state_dict(), narrow.configs["dense"], shards=3)
    return tmp_path


def test_shards_with_an_index_give_the_plan_of_one_file(
    narrow: Any, sharded: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = tmp_path_factory.mktemp("one")
    narrow.write(one, narrow.model("dense").state_dict(), narrow.configs["dense"])
    assert plan(sharded) == plan(one)
    assert len(plan(one)) == 8


def test_an_official_checkpoint_keeps_its_dtypes_and_other_parts(narrow: Any, tmp_path: Path) -> None:
    text = narrow.model("dense").to(torch.bfloat16).state_dict()
    weights = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in text.items()}
    weights |= {f"mtp.layers.0.mlp.{n}_proj.weight": torch.randn(24, 16) for n in ("gate", "up")}
    config = Qwen3_5Config(text_config=narrow.configs["dense"].to_dict())
    narrow.write(tmp_path, weights, config)
    planned = plan(tmp_path)
    assert len(planned) == 8
    assert {source.dtype for source in planned.sources} == {"bfloat16"}
    assert not any("mtp" in source.name for source in planned.sources)
    assert plan(config).bind(weights).digest == planned.digest


def test_no_weight_is_read(tmp_path: Path) -> None:
    """Two tensors of 32 GiB in a file of holes: their bytes would not fit in memory."""
    rows, width = 2**20, 2**14
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    size = rows * width * 2
    header = json.dumps(
        {
            name: {"dtype": "BF16", "shape": [rows, width], "data_offsets": [i * size, (i + 1) * size]}
            for i, name in enumerate(names)
        }
    ).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + 2 * size)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5_text"}')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (target,) = plan(tmp_path).targets
    assert (target.shape, target.dtype) == ((2 * rows, width), "bfloat16")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_missing_files_are_named(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: not a directory"):
        plan(sharded / "nowhere")
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: missing"):
        plan(sharded)
    (sharded / "model-1.safetensors").symlink_to(sharded / "nowhere")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors: missing, or a link to nothing"):
        plan(sharded)
    (sharded / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        plan(sharded)


def test_a_directory_without_weights_is_refused(sharded: Path) -> None:
    for file in (*sharded.glob("*.safetensors"), sharded / "model.safetensors.index.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"and no \*\.safetensors file"):
        plan(sharded)
    (sharded / "model.safetensors.index.json").symlink_to(sharded / "nowhere")
    with pytest.raises(CheckpointError, match=r"index\.json: missing, or a link to nothing"):
        plan(sharded)


def test_damaged_files_are_named(sharded: Path) -> None:
    file = sharded / "model-2.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40], b"\xff" * 8 + whole[8:], whole[:8] + b"}" + whole[9:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model-2\.safetensors: not a readable safetensors file"):
            plan(sharded)
    file.write_bytes(whole)
    plan(sharded)
    for text in ("", "[]", "{", "[" * 100_000):
        (sharded / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            plan(sharded)


def test_an_index_that_disagrees_with_the_files_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name = next(iter(weight_map))

    def refused(changed: object, match: str) -> None:
        index.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=match):
            plan(sharded)

    refused(
        weight_map | {"new.weight": "model-0.safetensors"}, "places new.weight in .* but it is in no file"
    )
    refused(weight_map | {name: "model-1.safetensors"}, r"but it is in model-0\.safetensors")
    refused({}, "has no weight_map")
    refused([name], "has no weight_map")
    refused({name: 3}, "has no weight_map")
    refused({name: "x" * 1000}, "not a readable safetensors file")
    for outside in (
        "../model-0.safetensors",
        str(sharded / "model-0.safetensors"),
        "a/b.safetensors",
        "",
        "..",
    ):
        refused(weight_map | {name: outside}, "the files of a checkpoint lie beside its index")


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.zeros(16)}, sharded / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more\.safetensors: model\.norm\.weight is in model-\d"):
        plan(sharded)
