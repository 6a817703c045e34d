"""Samples that need a process of their own: for what a process does once, and for the memory it takes."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxfuse.errors import OptionError

Child = Callable[[argparse.Namespace], dict[str, Any]]


def in_process(
    file: str, options: argparse.Namespace, environment: Mapping[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """What the `child` of a benchmark returns in a new process, given these options and those of `more`.

    Raises:
        OptionError: it failed; the text has the end of what it wrote to stderr.
    """
    given = json.dumps({**vars(options), **more}, default=str)
    done = subprocess.run(
        [sys.executable, file, "--child", given],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    if done.returncode:
        raise OptionError(f"{Path(file).name} {more} failed in its own process:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main_or_child(main: Callable[[], int], child: Child) -> int:
    """The exit code of `main()`, or of `child` with the options that `in_process` gave it."""
    if sys.argv[1:2] != ["--child"]:
        return main()
    options = argparse.Namespace(**json.loads(sys.argv[2]))
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(child(options)))
    return 0


def reset_peak(device: str = "cpu") -> int:
    """Forget the peak so far, which on a CPU includes the parent's before the fork; returns what is held."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return held_bytes(device)


def held_bytes(device: str = "cpu") -> int:
    """Memory of this process now: resident on a CPU, allocated on an accelerator."""
    return _status("VmRSS") if device == "cpu" else torch.cuda.memory_allocated()


def peak_bytes(device: str = "cpu") -> int:
    """The most memory since `reset_peak`."""
    return _status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
