"""The random checkpoint has the published form, loads without complaint, and is the same every time."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration

from fxfuse.errors import CheckpointError, OptionError
from fxfuse.runtime import random_checkpoint as module
from fxfuse.runtime.random_checkpoint import cache_folder, random_checkpoint, tensor_layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("small", cache=tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, torch.Tensor]:
    # Cloned: loading maps the file, and a test below damages one.
    loaded = [load_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.clone() for part in loaded for name, tensor in part.items()}


@pytest.mark.parametrize(("size", "published"), [("0.8b", 873_438_784), ("2b", 2_274_069_824)])
def test_true_sizes_have_the_published_number_of_parameters(size: str, published: int) -> None:
    layout = tensor_layout(size)
    assert sum(torch.Size(shape).numel() for shape, _ in layout.values()) == published
    assert [dtype for _, dtype in layout.values()].count(torch.float32) == 2 * 18


def test_the_index_places_every_tensor_in_one_of_several_shards(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert sorted(file.name for file in folder.glob("*.safetensors")) == shards
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as opened:
            assert sorted(opened.keys()) == sorted(n for n, s in index["weight_map"].items() if s == shard)
            assert opened.metadata() == {"format": "pt"}
    stored = sum((folder / shard).stat().st_size for shard in shards)
    assert 0 < stored - index["metadata"]["total_size"] < 100_000


def test_names_and_dtypes_are_the_published_ones(tensors: dict[str, torch.Tensor]) -> None:
    text = {name for name in tensors if name.startswith("model.language_model.")}
    assert "lm_head.weight" not in tensors
    assert any(name.startswith("mtp.layers.0.self_attn.") for name in tensors)
    assert tensors["mtp.fc.weight"].shape == (1024, 2048)
    assert any(name.startswith("model.visual.blocks.0.") for name in tensors)
    assert {name.split(".")[0] for name in set(tensors) - text} == {"mtp", "model"}
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert wide == {
        f"model.language_model.layers.{i}.linear_attn.{leaf}"
        for i in range(3)
        for leaf in ("A_log", "norm.weight")
    }
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in tensors.items() if name not in wide)


def test_the_config_is_that_of_the_vision_language_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert config["tie_word_embeddings"] is True
    text = config["text_config"]
    special = [value for key, value in [*config.items(), *text.items()] if key.endswith("_token_id")]
    assert len(special) == 5
    assert all(0 <= token < text["vocab_size"] for token in special)


def test_values_have_a_sensible_scale(tensors: dict[str, torch.Tensor]) -> None:
    layer = "model.language_model.layers.0."
    for name in ("linear_attn.in_proj_qkv.weight", "mlp.down_proj.weight"):
        assert abs(tensors[layer + name].float().std() - 0.02) < 0.001
    assert tensors[layer + "linear_attn.A_log"].max() < 2.78
    assert abs(tensors[layer + "linear_attn.norm.weight"].mean() - 1) < 0.01
    assert abs(tensors[layer + "input_layernorm.weight"].float().mean()) < 0.01
    assert all(tensor.isfinite().all() and tensor.unique().numel() > 1 for tensor in tensors.values())


@pytest.mark.parametrize(
    "model_class", [Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration, AutoModelForCausalLM]
)
def test_transformers_loads_it_with_nothing_missing_and_nothing_left_over(
    folder: Path, tensors: dict[str, torch.Tensor], model_class: type
) -> None:
    model, info = model_class.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    text = model.get_decoder().state_dict()
    for name, parameter in text.items():
        assert torch.equal(parameter, tensors["model.language_model." + name].to(torch.bfloat16)), name
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_it_generates(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.arange(8)[None]
    output = model.generate(prompt, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    # Were the model to repeat one token, equal tokens would be no evidence of equal computation.
    assert len(set(output[0, 8:].tolist())) > 4


def test_a_complete_folder_is_reused(folder: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert random_checkpoint("small", cache=folder.parent, progress=False) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_a_damaged_folder_is_written_again_with_the_same_bits(
    folder: Path, tensors: dict[str, torch.Tensor]
) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, 1000)
    assert random_checkpoint("small", cache=folder.parent, progress=False) == folder
    again = load_file(shard)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in again.items())


def test_values_follow_from_the_seed_and_the_name() -> None:
    def draw(name: str, seed: int) -> torch.Tensor:
        return module._draw(name, (64,), torch.bfloat16, seed)

    assert torch.equal(draw("a.weight", 0), draw("a.weight", 0))
    assert not torch.equal(draw("a.weight", 0), draw("a.weight", 1))
    assert not torch.equal(draw("a.weight", 0), draw("b.weight", 0))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> torch.Tensor:
        raise OSError("no space left")

    monkeypatch.setattr(module, "_draw", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        random_checkpoint("small", cache=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: _Usage(free=10**6))
    with pytest.raises(CheckpointError, match=r"0\.0 GB free and small needs 0\.2 GB"):
        random_checkpoint("small", cache=tmp_path, progress=False)


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_an_unknown_size_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"small, 0\.8b, 2b"):
        random_checkpoint("7b", cache=tmp_path)


def test_the_cache_folder_is_the_argument_then_the_variable_then_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("FXFUSE_CACHE", raising=False)
    assert cache_folder() == tmp_path / "user" / "fxfuse"
    monkeypatch.setenv("FXFUSE_CACHE", str(tmp_path / "variable"))
    assert cache_folder() == tmp_path / "variable"
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
