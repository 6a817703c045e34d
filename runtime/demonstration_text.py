"""A demonstration, printed for people."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fxfuse.runtime.demonstration import COMPILE, EAGER, FXFUSE, Demonstration, Timing

__all__ = ["show"]


def show(result: Demonstration, out: Console) -> None:
    """Print a demonstration for people."""
    out.print(f"{result.model} from {Path(result.checkpoint).name}", markup=False)
    out.print(
        f"{result.device}; prompt of {result.prompt_tokens} tokens, {result.new_tokens} new ones, greedy\n"
    )

    out.print(str(result.report), markup=False)

    changed = len(result.weights_changed)
    lines = {
        "fp32 tokens equal to eager's": f"{result.equal_tokens} of {result.new_tokens}"
        f" ({result.distinct_tokens} distinct ones)",
        "bf16 RMS error of logits": f"{result.fxfuse_error:.5f}, eager's own {result.eager_error:.5f}"
        f" (against fp32; at most {result.error_limit} times eager's)",
        "weights after deoptimize()": f"{changed} tensors changed" if changed else "bit-equal to the files",
    }
    out.print()
    for name, value in lines.items():
        out.print(f"{name:<30}{value}", markup=False)

    times = Table(box=None, pad_edge=False)
    for heading in ("bf16", "ms per token", "ms for the prompt", "compile seconds", "pays after"):
        times.add_column(heading, justify="left" if heading == "bf16" else "right")
    for name in (EAGER, COMPILE, FXFUSE):
        if name in result.not_timed:
            times.add_row(name, "-", "-", "-", "-")
        else:
            times.add_row(*_time_row(result.timings[name]))
    out.print()
    out.print(times)
    if COMPILE in result.not_timed:
        out.print(f"{COMPILE}: not timed. {result.not_timed[COMPILE]}", markup=False)
        out.print(f'{FXFUSE}: runs with inner="eager" for the same reason')
    else:
        out.print(
            f"{COMPILE} compiles decode only, as transformers' generate() does; its prompt runs eagerly"
        )
    cores = os.cpu_count() or 1
    if result.load_before > cores / 2:
        out.print(
            f"the machine was busy before this began (load {result.load_before:.1f} on {cores} cores):"
            " these times may say little"
        )
    out.print(f"\n{result.verdict}", markup=False)


def _time_row(timing: Timing) -> tuple[str, ...]:
    times = [f"{timing.seconds_per_token * 1e3:.1f}", f"{timing.prompt_seconds * 1e3:.1f}"]
    if timing.name == EAGER:
        return (timing.name, *times, "-", "-")
    pays = "never" if timing.pays_after_tokens is None else f"{timing.pays_after_tokens:,} tokens"
    return (timing.name, *times, f"{timing.compile_seconds:.1f}", pays)
