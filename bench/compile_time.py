"""Time from `optimize()` to the second token: a prompt and the first decoded token, cold and warm.

Each sample is a process of its own. Cold, its caches on disk are empty; warm, an earlier process has filled
them. Several depths show how it grows with layers. `pays after` is the number of tokens whose gain over
eager is what compiling cost. Dynamo's own capture is reported beside; what is imported is not counted.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._inductor.compile_fx  # an import of seconds, which no user of a compiler is spared
from generation import CACHES, Call, prompt
from harness import Case, Peer, run
from models import (
    PEERS,
    Contender,
    build,
    bytes_per_token,
    case_of,
    flops_of_prompt,
    flops_per_token,
    model_arguments,
    title,
)
from processes import in_process, main_or_child

import fxfuse
from fxfuse.runtime.demonstration import pays_after

MERGE_ONLY = "fxfuse, inner eager"


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One way, once: seconds to the first and the second token, of Dynamo, and of a token afterwards."""
    model = build(options)
    call = Call(prompt(model, options.batch, options.prompt), options.tokens, options.cache)
    contender = Contender(options.way, model, ours=options.way.startswith("fxfuse"))
    start = time.perf_counter()
    if contender.ours:
        inner = "eager" if options.way == MERGE_ONLY else options.inner
        fxfuse.optimize(model, inner=inner, mode=None if inner == "eager" else options.mode, report="off")
    elif options.way != "eager":
        model.compile(**PEERS[options.way])
    clock = call.run(contender, 2).clock
    seconds = time.perf_counter() - start
    spent = torch._dynamo.utils.calculate_time_spent()
    call.run(contender)  # a cache that grows may be compiled once more
    return {
        "seconds": seconds,
        "first": clock.start + clock.first_token_seconds - start,
        "capture": spent.get("entire_frame_compile", 0.0) - spent.get("backend_compile", 0.0),
        "token": call.run(contender).clock.seconds_per_token,
        "fused": contender.calls() if contender.ours else 0,
        # The same weights again: drawn from the same seed.
        "right": call.right(Contender("eager", build(options)), contender),
    }


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """For each depth a cold and a warm case."""
    for depth in options.depths or [None]:
        shapes = build(options, depth, device="meta")
        ways = ["eager", *options.peers, "fxfuse", MERGE_ONLY]
        compared = [Contender(way, shapes, ours=way.startswith("fxfuse")) for way in ways]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
            for state in sorted(options.state):  # what is cold first, whose caches the warm ones are
                rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
                layers = shapes.config.num_hidden_layers
                peers = [_peer(options, way, rows, state, Path(home), layers) for way in ways]
                yield case_of(
                    title(options, shapes, f"prompt {options.prompt}", options.cache, state),
                    compared,
                    peers,
                    unit="start",
                    bytes=2 * bytes_per_token(shapes, options.batch),
                    flops=flops_of_prompt(shapes, options.batch, options.prompt)
                    + flops_per_token(shapes, options.batch),
                )


def _peer(
    options: argparse.Namespace,
    way: str,
    rows: dict[str, list[dict[str, Any]]],
    state: str,
    home: Path,
    layers: int,
) -> Peer:
    def started(folder: Path) -> dict[str, Any]:
        caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        return in_process(__file__, options, caches, way=way, layers=layers)

    def sample() -> float:
        cold = state == "cold"
        folder = home / f"{list(rows).index(way)}-{len(rows[way]) if cold else 0}"
        if not (cold or rows[way] or folder.exists()):
            started(folder)
        rows[way].append(started(folder))
        return float(rows[way][-1]["seconds"])

    def median(name: str, key: str) -> float:
        return statistics.median(row[key] for row in rows[name])

    def figures() -> dict[str, float]:
        found = {
            "1st token s": median(way, "first"),
            "Dynamo s": median(way, "capture"),
            "ms/token": median(way, "token") * 1e3,
        }
        cost = median(way, "seconds") - median("eager", "seconds")
        tokens = pays_after(cost, median("eager", "token"), median(way, "token"))
        return found if way == "eager" or tokens is None else {**found, "pays after": tokens}

    calls = (lambda: sum(row["fused"] for row in rows[way])) if way.startswith("fxfuse") else None
    return Peer(way, sample, lambda: all(row["right"] for row in rows[way]), calls, figures)


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__, rounds=3, warmup=0)
    options.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    options.add_argument("--tokens", type=int, default=16, help="of the calls afterwards (default 16)")
    options.add_argument("--cache", choices=CACHES, default="StaticCache", help="default StaticCache")
    options.add_argument("--depths", type=int, nargs="+", help="layers (default: that of the size)")
    options.add_argument("--state", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time to the second token", parser(), lambda options: [], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main_or_child(main, child))
