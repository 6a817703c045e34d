"""Checkpoints with random weights in the form in which Qwen3.5 is published.

The published repositories hold a vision-language model: `Qwen3_5ForConditionalGeneration` in config.json,
names that start with `model.language_model.`, a vision tower, tensors for multi-token prediction (`mtp.*`),
`A_log` and the gated norm in float32 and all else in bfloat16, a tied head that is not stored, shards with
an index. What loads these checkpoints meets what it meets in a real one.
"""

import copy
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfuse.errors import CheckpointError, OptionError
from fxfuse.runtime.shapes import SIZES

if TYPE_CHECKING:
    import torch

__all__ = ["RANDOM_SIZES", "cache_folder", "official_config", "random_checkpoint", "tensor_layout"]

_INDEX = "model.safetensors.index.json"
# Part of the folder's name, so that a cache written by an older version is not taken for this one.
_FORM = 1
_ELSEWHERE = "set FXFUSE_CACHE or --cache to another folder"

# True vision towers for the true sizes: their parameter counts are then those of the published files.
_VISION: dict[str, dict[str, int]] = {
    "small": {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "num_position_embeddings": 16,
    },
    "0.8b": {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12},
    "2b": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16},
}
_SHARD_BYTES = {"small": 64 * 10**6, "0.8b": 600 * 10**6, "2b": 10**9}

RANDOM_SIZES = tuple(_VISION)

TensorLayout = dict[str, tuple[tuple[int, ...], "torch.dtype"]]


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where checkpoints are kept: `folder`, else $FXFUSE_CACHE, else `fxfuse` in the user's cache folder."""
    if folder is None:
        folder = os.environ.get("FXFUSE_CACHE") or None
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxfuse"
    return Path(folder).expanduser()


def official_config(size: str) -> dict[str, Any]:
    """config.json as published repositories have it, the special tokens moved into the vocabulary."""
    _check_size(size)
    text = copy.deepcopy(SIZES[size])
    # A smaller vocabulary keeps the published distance of each special token from its end.
    shift = SIZES["0.8b"]["vocab_size"] - text["vocab_size"]
    text |= {
        "model_type": "qwen3_5_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044 - shift,
        "full_attention_interval": 4,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "layer_types": [
            "full_attention" if (i + 1) % 4 == 0 else "linear_attention"
            for i in range(text["num_hidden_layers"])
        ],
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "rms_norm_eps": 1e-06,
        "use_cache": True,
    }
    vision = {
        "model_type": "qwen3_5",
        "deepstack_visual_indexes": [],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "num_position_embeddings": 2304,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    } | _VISION[size]
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "image_token_id": 248056 - shift,
        "video_token_id": 248057 - shift,
        "vision_start_token_id": 248053 - shift,
        "vision_end_token_id": 248054 - shift,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": text,
        "vision_config": vision,
    }


def tensor_layout(size: str) -> TensorLayout:
    """Name, shape and dtype of every tensor of the checkpoint, in the order of the files."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    config = Qwen3_5Config.from_dict(official_config(size))
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    shapes |= _mtp_shapes(shapes, config.text_config)
    return {
        name: (
            shape,
            torch.float32 if re.search(r"linear_attn\.(A_log|norm\.weight)$", name) else torch.bfloat16,
        )
        for name, shape in shapes.items()
    }


def random_checkpoint(
    size: str, *, cache: str | Path | None = None, seed: int = 0, progress: bool = True
) -> Path:
    """Write a random checkpoint of `size` once and return its folder; an earlier, complete one is reused.

    The weights follow from `seed` alone. Memory is bounded by one shard, and a folder under the final name is
    always complete: it is written under another name and renamed.

    Raises:
        OptionError: `size` is not one of `RANDOM_SIZES`.
        CheckpointError: the cache folder cannot be written, or has too little space.
    """
    _check_size(size)
    root = cache_folder(cache)
    folder = root / f"qwen3_5-random-{size}-seed{seed}-form{_FORM}"
    if _is_complete(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=root) as temporary:
            written = Path(temporary) / folder.name
            written.mkdir()
            _write(written, size, seed, progress)
            if folder.exists() and not _is_complete(folder):
                shutil.rmtree(folder)
            try:
                written.rename(folder)
            except OSError:
                # Another process may have finished first; its files are the same.
                if not _is_complete(folder):
                    raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write the random checkpoint to {root}: {error}; {_ELSEWHERE}"
        ) from error
    return folder


def _check_size(size: str) -> None:
    if size not in RANDOM_SIZES:
        raise OptionError(f"unknown size {size!r}: choose one of {', '.join(RANDOM_SIZES)}")


def _mtp_shapes(shapes: dict[str, tuple[int, ...]], text: Any) -> dict[str, tuple[int, ...]]:
    """The multi-token-prediction head: one full-attention decoder layer behind a projection of two inputs."""
    hidden = text.hidden_size
    layer = f"model.language_model.layers.{text.layer_types.index('full_attention')}."
    return {
        "mtp.fc.weight": (hidden, 2 * hidden),
        **{
            "mtp.layers.0." + name.removeprefix(layer): s
            for name, s in shapes.items()
            if name.startswith(layer)
        },
        "mtp.norm.weight": (hidden,),
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        "mtp.pre_fc_norm_hidden.weight": (hidden,),
    }


def _is_complete(folder: Path) -> bool:
    try:
        index = json.loads((folder / _INDEX).read_text())
        stored = sum((folder / shard).stat().st_size for shard in set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError):
        return False
    # Headers come on top of the tensors' own bytes: a truncated shard is shorter than the index promises.
    return (folder / "config.json").is_file() and stored > index["metadata"]["total_size"]


def _write(folder: Path, size: str, seed: int, progress: bool) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    layout = tensor_layout(size)
    config = official_config(size)
    split = split_state_dict_into_shards_factory(
        layout,  # type: ignore[arg-type]  # names and sizes are all that planning needs
        get_storage_size=_bytes,  # type: ignore[arg-type]
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_SHARD_BYTES[size],
    )
    total = sum(map(_bytes, layout.values()))
    free = shutil.disk_usage(folder).free
    if free < total * 1.05:
        raise CheckpointError(
            f"{folder.parent.parent} has {free / 1e9:.1f} GB free and {size} needs {total / 1e9:.1f} GB; "
            + _ELSEWHERE
        )

    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": config["text_config"]["eos_token_id"]})
    with tqdm(
        total=total, unit="B", unit_scale=True, desc=f"writing random {size} weights", disable=not progress
    ) as bar:
        for shard, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensors[name] = _draw(name, *layout[name], seed)
                bar.update(_bytes(layout[name]))
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            del tensors
    _write_json(
        folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(split.tensor_to_filename)}
    )


def _bytes(entry: "tuple[tuple[int, ...], torch.dtype]") -> int:
    shape, dtype = entry
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _draw(name: str, shape: tuple[int, ...], dtype: "torch.dtype", seed: int) -> "torch.Tensor":
    """One tensor, from `seed` and its own name: neither order nor shards change the values."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    initialise = next(function for pattern, function in _INITIALISERS if re.search(pattern, name))
    return initialise(torch.empty(shape, dtype=dtype), generator)


def _around(centre: float) -> "Callable[[torch.Tensor, torch.Generator], torch.Tensor]":
    return lambda tensor, generator: tensor.normal_(centre, 0.02, generator=generator)


def _log_of_uniform(tensor: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    return tensor.uniform_(0.01, 16, generator=generator).log_()


# The scales are those of transformers' own initialisation. Where that is a constant (norms, dt_bias) it is
# only the centre here: were all weights of a norm equal, a confusion of w with 1 + w or of two norms would
# not show.
_INITIALISERS: "tuple[tuple[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]], ...]" = (
    (r"\.A_log$", _log_of_uniform),
    (r"\.dt_bias$", _around(1.0)),
    (r"linear_attn\.norm\.weight$", _around(1.0)),
    (r"^model\.visual\..*norm\d?\.weight$", _around(1.0)),
    (r"", _around(0.0)),
)
