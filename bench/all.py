"""Every benchmark, one after the other, each with its JSON, its plot and its text in one folder.

One command for a machine: `python bench/all.py --device cuda`, or `--size tiny` to try it in minutes. A
benchmark that fails does not stop the others; the exit code is that of the worst.
"""

import argparse
import datetime
import subprocess
import sys
import time
from pathlib import Path

from models import PEERS, SIZES

BENCH = Path(__file__).parent
# What decides a claim of speed is compared with everything a user has; the rest with torch.compile alone.
_ALL_PEERS = ("decode", "prefill", "generate")
# Steps so short that launching their kernels one by one takes longer than they do.
_ONE_TOKEN = ("decode", "generate", "moe", "ablation", "scaling")
_PEERS = {"cpu": ["torch.compile", "freezing", "max-autotune"], "cuda": [*PEERS]}
_MODELS = (*_ALL_PEERS, "compile_time", "memory", "train", "moe", "ablation", "scaling")
NAMES = (*_MODELS, "plan", "convert", "load", "kernels")
# Claims of a speed on a GPU that have shapes of their own: the benchmark, and what it is told.
ON_CUDA = {
    "decode-4b": ("decode", ["--size", "4b", "--cache", "StaticCache"]),
    "projections-32": ("ablation", ["--only", "same_input_linears", "--batch", "32"]),
    "projections-128": ("ablation", ["--only", "same_input_linears", "--batch", "128"]),
    "prefill-8192": ("prefill", ["--prompt", "8192"]),
}


def runs(options: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """What is run, by the name of its files: a benchmark of that name, or one of `ON_CUDA`."""
    chosen = {name: (name, []) for name in options.only}
    if options.device == "cuda" and options.size != "tiny":
        chosen |= {name: given for name, given in ON_CUDA.items() if given[0] in options.only}
    return chosen


def arguments_of(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of one benchmark; sizes, peers and what only a GPU can do are chosen here.

    What it measures is written to the folder; where kernels are only compiled, nothing is.
    """
    script, own = runs(options)[name]
    return [*_arguments(name, script, options, folder), *own]


def _arguments(file: str, name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    tiny, cuda = options.size == "tiny", options.device == "cuda"
    given = []
    if name in _MODELS:
        # the sparse model has one size, and a tiny one
        given += ["--size", "tiny" if tiny else "0.8b" if name == "moe" else options.size]
        given += ["--device", options.device, "--dtype", options.dtype]
        given += ["--mode", "reduce-overhead"] if cuda and name in _ONE_TOKEN else []
        if options.peers is not None:
            given += ["--peers", *options.peers]
        elif name in _ALL_PEERS and not tiny:
            given += ["--peers", *_PEERS[options.device]]
        given += ["--inner", options.inner]
    if name == "compile_time" and not tiny:
        given += ["--depths", "4", "24"]
    if name == "plan" and tiny:
        given += ["--size", "tiny"]
    if name == "convert" and tiny:
        given += ["--gigabytes", "0.9"]  # two layers
    if name == "load":
        given += ["--size", options.size if options.size in ("small", "0.8b", "2b") else "small"]
    if name == "kernels" and not cuda:
        return ["--compile-only", *(["--size", "0.8b"] if tiny else [])]
    given += ["--json", str(folder / f"{file}.json"), "--plot", str(folder / f"{file}.png")]
    rounds = options.rounds or (1 if tiny else None)
    return [*given, *(["--rounds", str(rounds), "--warmup", "1"] if rounds else [])]


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    folder = options.out / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{options.device}-{options.size}"
    folder.mkdir(parents=True, exist_ok=True)
    worst = 0
    for name, (script, _) in runs(options).items():
        command = [sys.executable, str(BENCH / f"{script}.py"), *arguments_of(name, options, folder)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        (folder / f"{name}.txt").write_text(done.stdout + (done.stderr if done.returncode else ""))
        verdict = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
        print(f"{name:<16}{time.perf_counter() - start:7.0f} s  {verdict}", flush=True)
        worst = max(worst, abs(done.returncode))
    print(f"results in {folder}")
    return min(worst, 1)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default cpu")
    options.add_argument("--size", choices=SIZES, default="0.8b", help="of the dense models (default 0.8b)")
    options.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    options.add_argument("--peers", nargs="*", choices=PEERS, help="(default: all where it counts)")
    options.add_argument("--inner", default="inductor", help="what compiles our graph (default inductor)")
    options.add_argument("--rounds", type=int, help="timed samples (default: that of each benchmark)")
    options.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="default all")
    options.add_argument("--out", type=Path, default=BENCH / "results", help="default bench/results")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
