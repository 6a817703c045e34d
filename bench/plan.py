"""Planning the largest sparse model expert by expert, beside transformers making it without memory.

The plan is made from a config alone: a row range for each of three matrices of every expert. Each sample is a
process of its own, so that its peak of memory is its own, imports counted. What is imported is not timed.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from harness import Case, Peer, arguments, run
from processes import in_process, main_or_child, peak_bytes, reset_peak
from transformers import AutoModelForCausalLM, Qwen3_5MoeTextConfig

import fxfuse

OURS, BASELINE = "fxfuse.plan", "transformers, on meta"
# the published 397B-A17B
WIDTHS: dict[str, int] = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 64,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 1024,
    "shared_expert_intermediate_size": 1024,
}
SIZES = {"397b": (60, 512), "tiny": (4, 16)}


def config(size: str) -> Qwen3_5MoeTextConfig:
    layers, experts = SIZES[size]
    return Qwen3_5MoeTextConfig(**WIDTHS, num_hidden_layers=layers, num_experts=experts)


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One plan, or one model on the meta device, after a small plan that brings the imports."""
    small = config("tiny")
    fxfuse.plan(small, "per_expert")
    given = config(options.size)
    reset_peak()
    start = time.perf_counter()
    if options.peer == OURS:
        made = len(fxfuse.plan(given, "per_expert"))
    else:
        with torch.device("meta"):
            made = len(AutoModelForCausalLM.from_config(given).state_dict())
    return {"seconds": time.perf_counter() - start, "made": made, "peak_bytes": peak_bytes()}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    layers, experts = SIZES[options.size]
    ran: dict[str, list[dict[str, Any]]] = {OURS: [], BASELINE: []}

    def sample(name: str) -> float:
        ran[name].append(in_process(__file__, options, peer=name))
        return float(ran[name][-1]["seconds"])

    def figures(name: str) -> dict[str, float]:
        return {"peak GB": max(result["peak_bytes"] for result in ran[name]) / 1e9}

    peers = (
        Peer(BASELINE, lambda: sample(BASELINE), lambda: True, None, lambda: figures(BASELINE)),
        Peer(
            OURS,
            lambda: sample(OURS),
            lambda: {result["made"] for result in ran[OURS]} == {layers * experts * 3},
            lambda: len(ran[OURS]),
            lambda: figures(OURS),
        ),
    )
    yield Case(f"{options.size}, per_expert", peers, (BASELINE,), unit="plan")


def parser() -> argparse.ArgumentParser:
    options = arguments(__doc__)
    options.set_defaults(rounds=3, warmup=1)
    options.add_argument("--size", choices=SIZES, default="397b", help="of the sparse model (default 397b)")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time and memory to plan a checkpoint", parser(), lambda options: [], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main_or_child(main, child))
