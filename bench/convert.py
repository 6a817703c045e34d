"""Converting a checkpoint against copying its bytes on the same disk, both flushed.

The checkpoint holds random bf16 weights of one model's shape, a file for each layer. The copy is
`cp --reflink=never` of every file followed by `sync`, the conversion flushes as it always does. Each sample
removes what the one before wrote.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Case, Peer, arguments, run, timed
from safetensors.torch import save_file

from fxfuse.runtime.convert import convert, differences
from fxfuse.runtime.plan import LAYOUTS

HIDDEN, INNER = 4096, 12288
SHARD = 2 * 10**9


def config(layers: int) -> dict[str, Any]:
    """The widths of 9B, as many layers as the size asked for takes, without embeddings."""
    return {
        "model_type": "qwen3_5_text",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "layer_types": ["linear_attention"] * (layers - 1) + ["full_attention"],
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 16,
    }


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write about `gigabytes` of layers and return the bytes."""
    layers = max(2, round(gigabytes * 1e9 / 4.4e8))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(layers)))
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(layers):
        tensors = {f"model.layers.{i}.{name}.weight": _random(*shape) for name, shape in _shapes(i, layers)}
        file = f"model-{i:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def _random(rows: int, width: int) -> torch.Tensor:
    """Any bits: what a tensor means does not matter here, and normal numbers take minutes to draw."""
    return torch.randint(-(2**15), 2**15, (rows, width), dtype=torch.int16).view(torch.bfloat16)


def _shapes(layer: int, layers: int) -> list[tuple[str, tuple[int, int]]]:
    mlp = [("mlp.gate_proj", (INNER, HIDDEN)), ("mlp.up_proj", (INNER, HIDDEN))]
    mlp.append(("mlp.down_proj", (HIDDEN, INNER)))
    if layer == layers - 1:
        rows = {"q": 8192, "k": 1024, "v": 1024}
        return [*mlp, *((f"self_attn.{n}_proj", (r, HIDDEN)) for n, r in rows.items())]
    rows = {"qkv": 8192, "z": 4096, "b": 32, "a": 32}
    return [*mlp, *((f"linear_attn.in_proj_{n}", (r, HIDDEN)) for n, r in rows.items())]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        source, copied, converted = (Path(home) / name for name in ("source", "copied", "converted"))
        size = write_checkpoint(source, options.gigabytes)

        def copy() -> None:
            command = ["cp", "-r", "--reflink=never", str(source), str(copied)]
            subprocess.run(command, check=True)
            subprocess.run(["sync", *map(str, copied.iterdir()), str(copied)], check=True)

        calls = 0

        def rewrite(layout: str) -> None:
            nonlocal calls
            convert(source, converted, layout, shard_bytes=SHARD)
            calls += 1

        for layout in options.layout:

            def sample(layout: str = layout) -> float:
                shutil.rmtree(converted, ignore_errors=True)
                return timed(lambda: rewrite(layout))()

            def copy_sample() -> float:
                shutil.rmtree(copied, ignore_errors=True)
                return timed(copy)()

            peers = (
                Peer("cp", copy_sample, copied.is_dir),
                Peer(
                    "fxfuse convert",
                    sample,
                    lambda: not list(differences(source, converted)),
                    lambda: calls,
                ),
            )
            yield Case(f"{layout}, {size / 1e9:.1f} GB", peers, ("cp",), unit="checkpoint")


def parser() -> argparse.ArgumentParser:
    options = arguments(__doc__)
    options.set_defaults(rounds=3, warmup=1)
    options.add_argument("--gigabytes", type=float, default=8.6, help="size of the checkpoint (default 8.6)")
    options.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["fused"], help="default fused")
    options.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary one)")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time to convert a checkpoint", parser(), lambda options: [], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
