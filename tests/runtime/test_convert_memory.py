"""Memory that neither a checkpoint's size nor a tensor's moves, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig


def holes(folder: Path, config: Any, files: list[dict[str, torch.Size]]) -> int:
    """A checkpoint of bf16 zeros that take no room on the disk; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    weight_map, total = {}, 0
    for i, shapes in enumerate(files):
        header, at = {}, 0
        for name, shape in shapes.items():
            size = shape.numel() * 2
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        file = folder / f"model-{i:05}.safetensors"
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + at)
        weight_map |= dict.fromkeys(shapes, file.name)
        total += at
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def converted(source: Path, there: Path, layout: str) -> tuple[int, int]:
    """Bytes written by another process, and the most memory that it had, in KiB."""
    program = (
        "import sys, resource; from fxfuse.runtime.convert import convert\n"
        "print(convert(*sys.argv[1:4]).bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    try:
        arguments = [sys.executable, "-c", program, str(source), str(there), layout]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["rm", "-rf", str(there), str(source)], check=True)
    size, peak = map(int, done.stdout.split())
    return size, peak


def shapes_of(config: Any) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {n: t.shape for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "fused", "qwen3_next", "fastdeploy"])
def test_memory_is_bounded_for_one_tensor_of_4_gib(narrow: Any, layout: str, tmp_path: Path) -> None:
    """in_proj_qkv is 4 GiB of holes; the result is written in full and removed again."""
    fields = narrow.sizes | {"linear_num_key_heads": 64, "linear_num_value_heads": 128}
    fields |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_hidden_layers": 2}
    fields |= {"hidden_size": 2**16, "layer_types": ["linear_attention", "full_attention"]}
    config = Qwen3_5TextConfig(**fields, intermediate_size=8)
    layer = "model.layers.0.linear_attn."
    shapes = {
        n: s for n, s in shapes_of(config).items() if n.startswith(layer + "in_proj") or "self_attn" in n
    }
    shapes = {n: s for n, s in shapes.items() if not n.endswith("in_proj_z.weight") or layout != "hf"}
    assert max(s.numel() * 2 for s in shapes.values()) == 4 * 2**30
    size = holes(tmp_path / "source", config, [shapes])
    written, peak = converted(tmp_path / "source", tmp_path / "there", layout)
    assert written == size
    assert peak < 2**20


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_memory_is_bounded_for_many_files(narrow: Any, layout: str, tmp_path: Path) -> None:
    """5 GiB in 96 files, 6,144 experts: neither the bytes nor the number of files or tensors adds up."""
    config = Qwen3_5MoeTextConfig(
        **narrow.sizes
        | {"num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "head_dim": 128},
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=512,
    )
    shapes = {n: s for n, s in shapes_of(config).items() if ".layers." in n}
    files: list[dict[str, torch.Size]] = [{} for _ in range(96)]
    for i, (name, shape) in enumerate(shapes.items()):
        files[i % 96][name] = shape
    size = holes(tmp_path / "source", config, files)
    assert size > 4 * 2**30
    written, peak = converted(tmp_path / "source", tmp_path / "there", layout)
    assert written == size
    assert peak < 2**20
