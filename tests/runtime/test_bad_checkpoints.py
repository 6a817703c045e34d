"""Every kind of bad input, converted, loaded and inspected: the file and the tensor are named, and neither a
destination nor a changed model is left."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fxfuse import cli
from fxfuse.errors import CheckpointError
from fxfuse.runtime.convert import convert
from fxfuse.runtime.load import load_state_dict
from fxfuse.runtime.plan import plan

SHARD = "model-1.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(narrow: Any, tmp_path: Path) -> Path:
    folder: Path = narrow.write(tmp_path / "source", narrow.model("dense").state_dict(), shards=3)
    return folder


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def with_header(file: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def names_of(folder: Path) -> list[str]:
    """The tensors of the shard in order of their bytes."""
    header = {n: f for n, f in header_of(folder / SHARD)[0].items() if n != "__metadata__"}
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def by_index(folder: Path) -> str:
    """The first tensor that the index places in the shard."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return next(name for name, file in weight_map.items() if file == SHARD)


# Each breaks a checkpoint and returns what the error must name: the file, and the tensor if one can be known.


def truncated(folder: Path) -> tuple[str, str]:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)
    return SHARD, names_of(folder)[-1]


def truncated_in_its_header(folder: Path) -> tuple[str, str]:
    os.truncate(folder / SHARD, 40)
    return SHARD, by_index(folder)


def empty(folder: Path) -> tuple[str, str]:
    os.truncate(folder / SHARD, 0)
    return SHARD, by_index(folder)


def a_lie_about_offsets(folder: Path) -> tuple[str, str]:
    header, data = header_of(folder / SHARD)
    last = names_of(folder)[-1]
    header[last]["data_offsets"] = [at + 2 for at in header[last]["data_offsets"]]
    with_header(folder / SHARD, header, data + b"xx")
    return SHARD, last


def a_lie_about_a_length(folder: Path) -> tuple[str, str]:
    header, data = header_of(folder / SHARD)
    last = names_of(folder)[-1]
    header[last]["data_offsets"][1] -= 2
    with_header(folder / SHARD, header, data[:-2])
    return SHARD, last


def tensors_that_overlap(folder: Path) -> tuple[str, str]:
    header, data = header_of(folder / SHARD)
    first, second, *_ = names_of(folder)
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    start = header[first]["data_offsets"][0] + 2
    header[second]["data_offsets"] = [start, start + size]
    with_header(folder / SHARD, header, data)
    return SHARD, f"{second}|{first}"


def a_missing_shard(folder: Path) -> tuple[str, str]:
    (folder / SHARD).unlink()
    return SHARD, by_index(folder)


def an_index_without_its_files(folder: Path) -> tuple[str, str]:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return "model-0.safetensors", "model.embed_tokens.weight"


def _elsewhere(folder: Path) -> Path:
    outside = folder.parent / "outside"
    outside.mkdir()
    return Path(shutil.move(folder / SHARD, outside / SHARD))


def a_shard_above_the_directory(folder: Path) -> tuple[str, str]:
    return _placed(folder, f"../outside/{_elsewhere(folder).name}")


def a_shard_by_an_absolute_path(folder: Path) -> tuple[str, str]:
    return _placed(folder, str(_elsewhere(folder)))


def _placed(folder: Path, where: str) -> tuple[str, str]:
    index = json.loads((folder / INDEX).read_text())
    name = by_index(folder)
    index["weight_map"] = {n: where if f == SHARD else f for n, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return INDEX, name


def a_link_out(folder: Path) -> tuple[str, str]:
    (folder / SHARD).symlink_to(_elsewhere(folder))
    return SHARD, by_index(folder)


def a_tensor_in_two_shards(folder: Path) -> tuple[str, str]:
    again = dict(list(load_file(folder / "model-0.safetensors").items())[:1])
    save_file(load_file(folder / SHARD) | again, folder / SHARD)
    return SHARD, next(iter(again))


def another_dtype(folder: Path) -> tuple[str, str]:
    return _replaced(folder, lambda t: t.to(torch.int32))


def another_shape(folder: Path) -> tuple[str, str]:
    return _replaced(folder, lambda t: t[1:].clone())


def _replaced(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, str]:
    tensors = load_file(folder / SHARD)
    name = next(n for n in tensors if n.endswith("mlp.up_proj.weight"))
    save_file(tensors | {name: change(tensors[name])}, folder / SHARD)
    return SHARD, name


FAULTS = [
    truncated,
    truncated_in_its_header,
    empty,
    a_lie_about_offsets,
    a_lie_about_a_length,
    tensors_that_overlap,
    a_missing_shard,
    an_index_without_its_files,
    a_shard_above_the_directory,
    a_shard_by_an_absolute_path,
    a_link_out,
    a_tensor_in_two_shards,
    another_dtype,
    another_shape,
]
EVERY_FAULT = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


@EVERY_FAULT
def test_nothing_is_written_from_bad_input(
    fault: Callable[[Path], tuple[str, str]], source: Path, tmp_path: Path
) -> None:
    file, tensor = fault(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "there", "sglang")
    message = str(caught.value)
    assert str(source / file) in message
    assert any(name in message for name in tensor.split("|"))
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "outside"}


@EVERY_FAULT
@pytest.mark.parametrize("on_meta", [False, True])
def test_no_model_is_changed_by_bad_input(
    fault: Callable[[Path], tuple[str, str]], on_meta: bool, source: Path, narrow: Any
) -> None:
    with torch.device("meta" if on_meta else "cpu"):
        model = narrow.model("dense")
    before = {name: (t, None if on_meta else t.detach().clone()) for name, t in model.named_parameters()}
    file, tensor = fault(source)
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(model, source)
    assert str(source / file) in str(caught.value)
    assert any(name in str(caught.value) for name in tensor.split("|"))
    for name, parameter in model.named_parameters():
        was, values = before[name]
        assert parameter is was
        assert values is None or torch.equal(parameter, values)


@EVERY_FAULT
def test_the_command_says_so_in_one_line_and_exits_with_2(
    fault: Callable[[Path], tuple[str, str]], source: Path, tmp_path: Path
) -> None:
    file, tensor = fault(source)
    calls: list[list[Any]] = [["inspect", source], ["convert", source, tmp_path / "there"]]
    if fault not in (another_dtype, another_shape):  # equal to itself
        calls.append(["verify", source, source])
    for arguments in calls:
        result = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert result.exit_code == 2, arguments
        (line,) = result.stderr.splitlines()
        assert line.startswith("fxfuse: ")
        assert file in line
        assert any(name in line for name in tensor.split("|"))
        assert result.stdout == ""
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "missing, or a link to nothing"),
        ("", "not readable as JSON"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "qwen3_5_text", "hidden_size": "x"}', "describes no model that transformers"),
    ],
)
def test_a_directory_without_a_config_that_can_be_used_is_refused(
    text: str | None, message: str, source: Path, tmp_path: Path
) -> None:
    (source / "config.json").unlink()
    if text is not None:
        (source / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json.* {message}"):
        convert(source, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_plan_beside_the_weights_that_is_none_or_anothers_is_refused(
    narrow: Any, source: Path, tmp_path: Path
) -> None:
    (source / "fxfuse_plan.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"fxfuse_plan\.json: not a readable weight plan"):
        convert(source, tmp_path / "there")
    (source / "fxfuse_plan.json").write_text(plan(narrow.configs["dense"]).to_json())
    with pytest.raises(CheckpointError, match=r"its plan made .* the files have None"):
        convert(source, tmp_path / "there")


def test_a_pickle_is_never_loaded(narrow: Any, tmp_path: Path) -> None:
    """A file that would say so if it were."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(narrow.configs["dense"].to_dict(), default=str))
    touch = f"cos\nsystem\n(S'touch {tmp_path / 'run'}'\ntR."
    (folder / "pytorch_model.bin").write_bytes(touch.encode())
    message = r"no \*\.safetensors file.*pytorch_model\.bin is in a format that is never read"
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "there")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(narrow.model("dense"), folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["block", "tensor"])
def test_nan_in_a_scale_is_found_before_a_byte_is_written(kind: str, narrow: Any, tmp_path: Path) -> None:
    quantization: dict[str, Any] = {"quant_method": "fp8"}
    if kind == "block":
        quantization["weight_block_size"] = [128, 128]
    weights, leaf = narrow.state("dense"), "weight_scale_inv" if kind == "block" else "weight_scale"
    module = "model.layers.0.mlp.down_proj"
    weights[f"{module}.weight"] = weights[f"{module}.weight"].to(torch.float8_e4m3fn)
    weights[f"{module}.{leaf}"] = torch.full((1, 1), float("nan"))
    fields = narrow.configs["dense"].to_dict() | {"quantization_config": quantization}
    source = narrow.write(tmp_path / "source", weights, fields)
    message = rf"model\.safetensors: {module}\.{leaf} holds NaN"
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "there", "hf")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(narrow.model("dense"), source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
