"""Loading straight into packed memory against from_pretrained and packing at the first call.

Each sample is a process of its own, timed from before the model is made until every fused weight is packed.
The packing is that of an optimised model's first call, by itself: capture would cost both the same. What is
imported is not counted. The peak of memory is that of the process, less what it had before. Files lie in the
page cache.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import Case, Peer, arguments, run
from processes import peak_bytes, reset_peak
from transformers import AutoConfig, AutoModelForCausalLM

import fxfuse
from fxfuse.runtime.convert import convert
from fxfuse.runtime.live_weights import SharedSlot, is_packed
from fxfuse.runtime.random_checkpoint import random_checkpoint

BASELINE = "from_pretrained, hf"


def from_pretrained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).optimize()


def load_state_dict(folder: Path) -> Any:
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fxfuse.load_state_dict(model.optimize(), folder)
    return model.eval()


WAYS: dict[str, Callable[[Path], Any]] = {
    "from_pretrained": from_pretrained,
    "load_state_dict": load_state_dict,
}


def child(way: str, folder: Path) -> None:
    """Load and pack once, and print what came of it as JSON."""
    _import_everything(folder)
    before, start = reset_peak(), time.perf_counter()
    model = WAYS[way](folder)
    parameters = dict(model.named_parameters())
    groups = [[parameters[n] for n in t.sources] for t in fxfuse.plan(model).transforms]
    for group in groups:
        SharedSlot().fill(group)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    with torch.no_grad():
        logits = model.forward(torch.tensor([[1]]), use_cache=False).logits
    result = {
        "seconds": seconds,
        "peak_bytes": peak - before,
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "packed": sum(all(map(is_packed, group)) for group in groups),
        "logits": hashlib.sha256(logits.view(torch.uint8).numpy().tobytes()).hexdigest(),
    }
    print(json.dumps(result))


def _import_everything(folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    fxfuse.plan(model.optimize())


def cases(options: argparse.Namespace) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        source = random_checkpoint(options.size, cache=options.cache)
        folders = {"hf": Path(source)}
        for layout in options.layout:
            if layout != "hf":
                folders[layout] = Path(home) / layout
                convert(source, folders[layout], layout)
        ran: dict[str, list[dict[str, Any]]] = {}

        def peer(way: str, layout: str) -> Peer:
            name = f"{way}, {layout}"
            results = ran.setdefault(name, [])

            def sample() -> float:
                command = [sys.executable, __file__, "--child", way, str(folders[layout])]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
                return float(results[-1]["seconds"])

            return Peer(
                name,
                sample,
                lambda: {r["logits"] for r in results} == {r["logits"] for r in ran[BASELINE]},
                lambda: sum(r["packed"] for r in results),
            )

        peers = [
            peer("from_pretrained", "hf"),
            *(peer("load_state_dict", layout) for layout in options.layout),
        ]
        yield Case(f"{options.size}, bfloat16", tuple(peers), (BASELINE,), unit="load")
        # kept with the settings, and so in the JSON
        options.peak_bytes = {n: statistics.median(r["peak_bytes"] for r in rows) for n, rows in ran.items()}
        weights = ran[BASELINE][0]["weights_bytes"]
        for name, peak in options.peak_bytes.items():
            print(f"{name}: peak {peak / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights")


def parser() -> argparse.ArgumentParser:
    options = arguments(__doc__)
    options.set_defaults(rounds=3, warmup=1)
    options.add_argument("--size", choices=["small", "0.8b", "2b"], default="0.8b", help="default 0.8b")
    options.add_argument(
        "--layout", nargs="+", choices=["hf", "fused", "sglang"], default=["hf", "fused"], help="of the files"
    )
    options.add_argument("--folder", type=Path, help="for the converted files (default: the temporary one)")
    options.add_argument("--cache", type=Path, help="for the random checkpoint (default: the user's cache)")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time and memory to load a model", parser(), lambda options: [], cases, argv)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
        raise SystemExit(0)
    raise SystemExit(main())
