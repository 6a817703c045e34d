"""Every way of saving a model writes each tensor of an optimised one once, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_model, save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

import fxfuse
from fxfuse.runtime import live_weights

Make = Callable[..., Any]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def models(request: pytest.FixtureRequest, make_model: Make, prompt: Tensor) -> tuple[Any, Any]:
    """A plain model, and one with the same weights that has run optimised and is packed."""
    plain, packed = (make_model(tie_word_embeddings=request.param) for _ in range(2))
    fxfuse.optimize(packed, inner="eager")
    with torch.no_grad():
        packed(prompt)
    assert packed.optimization_report.calls == 1
    assert live_weights.packed_bytes(packed.parameters()) > 0
    return plain, packed


def written(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a folder; fails where one name stands in two files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found.update(tensors)
    return found


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _save_pretrained(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _save_pretrained_in_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="100KB")


def _safetensors_file(model: Any, folder: Path) -> None:
    tensors = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not tied(model)}
    save_file(tensors, folder / "model.safetensors")


def _safetensors_model(model: Any, folder: Path) -> None:
    save_model(model, str(folder / "model.safetensors"))


def _hub_state_dict(model: Any, folder: Path) -> None:
    save_torch_state_dict(model.state_dict(), folder, max_shard_size="100KB")


def _hub_model(model: Any, folder: Path) -> None:
    save_torch_model(model, folder)


def _accelerate(model: Any, folder: Path) -> None:
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(model, str(folder))


def tied(model: Any) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


WAYS = [
    _save_pretrained,
    _save_pretrained_in_shards,
    _safetensors_file,
    _safetensors_model,
    _hub_state_dict,
    _hub_model,
    _accelerate,
]


@pytest.mark.parametrize("save", WAYS)
def test_each_tensor_is_written_once_with_its_bits(
    models: tuple[Any, Any], tmp_path: Path, save: Callable[[Any, Path], None]
) -> None:
    folders = [tmp_path / "plain", tmp_path / "packed"]
    for model, folder in zip(models, folders, strict=True):
        folder.mkdir()
        save(model, folder)
    expected, got = map(written, folders)
    assert got.keys() == expected.keys() and len(got) >= 25
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert sum(t.nbytes for t in got.values()) == sum(p.nbytes for p in models[0].parameters())
    assert size(folders[1]) <= size(folders[0])


def test_saved_files_load_into_a_new_model(models: tuple[Any, Any], make_model: Make, tmp_path: Path) -> None:
    packed = models[1]
    packed.save_pretrained(tmp_path)
    again = type(packed).from_pretrained(tmp_path)
    assert all(torch.equal(p, packed.get_parameter(n)) for n, p in again.named_parameters())
    assert "fxfuse" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    save_model(packed, str(tmp_path / "whole.safetensors"))
    other = make_model(seed=9, tie_word_embeddings=tied(packed))
    load_model(other, tmp_path / "whole.safetensors")
    assert all(torch.equal(p, packed.get_parameter(n)) for n, p in other.named_parameters())


def test_torch_save_carries_no_hidden_memory(models: tuple[Any, Any], tmp_path: Path) -> None:
    sizes = []
    path = tmp_path / "weights.pt"
    for model in models:
        torch.save(model.state_dict(), path)
        sizes.append(path.stat().st_size)
        loaded = torch.load(path)
        assert loaded.keys() == model.state_dict().keys()
        assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert sizes[1] <= sizes[0]


def test_torch_save_of_one_parameter_writes_that_parameter_alone(
    models: tuple[Any, Any], tmp_path: Path
) -> None:
    for parameter in models[1].parameters():
        torch.save(parameter, tmp_path / "one.pt")
        assert (tmp_path / "one.pt").stat().st_size < parameter.nbytes + 4096
        loaded = torch.load(tmp_path / "one.pt")
        assert torch.equal(loaded, parameter) and loaded.untyped_storage().nbytes() == parameter.nbytes


def test_saving_does_not_unpack(models: tuple[Any, Any], tmp_path: Path) -> None:
    packed = models[1]
    before = [p.data_ptr() for p in packed.parameters()]
    packed.save_pretrained(tmp_path)
    torch.save(packed.state_dict(), tmp_path / "weights.pt")
    assert [p.data_ptr() for p in packed.parameters()] == before
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(list(packed.parameters()))
