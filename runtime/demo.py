"""The main job on real input, and a verdict on it that admits a loss.

From the checkpoint's folder on there is only the ordinary path: `from_pretrained`, `model.optimize()` and
`generate()` with its defaults. What is judged: the same tokens in fp32, an error in bf16 beside eager's own,
time per token beside eager and torch.compile in the same run, and the same weights after `deoptimize()`.
"""

import functools
import gc
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fxfuse.errors import CheckpointError, in_one_line
from fxfuse.runtime.demonstration import (
    COMPILE,
    EAGER,
    FXFUSE,
    Demonstration,
    Timing,
    differing_tensors,
    equal_prefix,
    pays_after,
    rms_error,
)
from fxfuse.runtime.demonstration_text import show
from fxfuse.runtime.generation import Generated, TokenClock, generate
from fxfuse.runtime.headers import read_config, read_tensors
from fxfuse.runtime.random_checkpoint import random_checkpoint
from fxfuse.testing.oracles import default_slack

__all__ = ["run"]

_PROMPT_TOKENS = 48
_ROUNDS = 2
_HUB_NAME = re.compile(r"[\w.-]*\w/[\w.-]+")  # what from_pretrained downloads
_TEXT = (
    "A linear attention layer keeps a matrix for each head instead of a cache that grows. At every step it "
    "decays by a gate, forgets what it held for the current key, and stores the new value in its place. "
    "Explain why "
)


def run(
    checkpoint: str | Path | None = None,
    *,
    size: str = "small",
    tokens: int = 64,
    cache: str | Path | None = None,
    out: Console | None = None,
) -> Demonstration:
    """Demonstrate fxfuse on a checkpoint, or on one with random weights of `size`, and print what was found.

    Raises:
        CheckpointError: the checkpoint cannot be loaded, or the random one cannot be written.
    """
    out = out or Console(highlight=False, soft_wrap=True)
    with _quiet(), _cold_cache():
        say = _Progress()
        if checkpoint is None:
            checkpoint = random_checkpoint(size, cache=cache, progress=sys.stderr.isatty())
        _check_files(str(checkpoint))
        result = _demonstrate(str(checkpoint), tokens, say)
    show(result, out)
    return result


def _check_files(checkpoint: str) -> None:
    """Raises CheckpointError for what is damaged or missing in a folder, before anything is loaded."""
    folder = Path(checkpoint)
    if folder.exists() or not _HUB_NAME.fullmatch(checkpoint):
        read_config(folder)
        read_tensors(folder)


def _demonstrate(checkpoint: str, tokens: int, say: "_Progress") -> Demonstration:
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    say(f"checkpoint: {checkpoint}")
    say("fp32: what eager generates is the reference")
    model = load(checkpoint, torch.float32)
    prompt = prompt_for(checkpoint, model)
    expected = generate(model, prompt, tokens, logits=True)
    result = Demonstration(checkpoint, type(model).__name__, _device(model.device), prompt.shape[1], tokens)
    result.distinct_tokens = len(set(expected.tokens[0].tolist()))
    result.load_before = load_before
    result.error_limit = default_slack(model.config.get_text_config().hidden_size)
    del model

    say("bf16: loading twice")
    # The model that torch.compile runs is the eager one: it keeps no weights of its own.
    plain = load(checkpoint, torch.bfloat16)
    fused = load(checkpoint, torch.bfloat16)
    modes: dict[str, Callable[..., Generated]] = {EAGER: functools.partial(generate, plain)}
    unavailable = _why_inductor_fails(plain.device)
    # Without Inductor the rewritten graph still runs, operation by operation.
    options = {} if unavailable is None else {"inner": "eager"}
    fused.optimize(**options)
    # fxfuse compiles first: what Inductor keeps from one compilation then helps the other, not us.
    modes[FXFUSE] = functools.partial(generate, fused)
    if unavailable is None:
        modes[COMPILE] = functools.partial(_generate_compiled, plain, _compiled_decode(plain))
    else:
        result.not_timed[COMPILE] = unavailable

    first: dict[str, Generated] = {}
    for name, mode in modes.items():
        say(f"bf16: {name}, first call" + ("" if name == EAGER else ", compiles"))
        first[name] = mode(prompt, tokens, label=name)
    say(f"bf16: time per token, {_ROUNDS} rounds, interleaved")
    steady = _interleaved(modes, prompt, tokens)
    result.timings = {name: _timing(name, first[name], steady[name]) for name in modes}
    for timing in result.timings.values():
        timing.pays_after_tokens = pays_after(
            timing.compile_seconds, result.timings[EAGER].seconds_per_token, timing.seconds_per_token
        )

    say("bf16: error against fp32, over the same tokens")
    result.eager_error, result.fxfuse_error = (
        rms_error(
            generate(model, prompt, tokens, logits=True, replay=expected.tokens).logits, expected.logits
        )
        for model in (plain, fused)
    )
    result.report = fused.optimization_report
    result.calls["bf16"] = result.report.calls
    say("bf16: undo, and compare with the files")
    fused.deoptimize()
    result.weights_changed = differing_tensors(
        fused.state_dict(), load(checkpoint, torch.bfloat16).state_dict()
    )
    del plain, fused, modes, first, steady
    gc.collect()

    say("fp32: fxfuse, compiles")
    model = load(checkpoint, torch.float32).optimize(**options)
    found = generate(model, prompt, tokens, label=FXFUSE)
    result.equal_tokens = equal_prefix(found.tokens, expected.tokens)
    result.calls["fp32"] = model.optimization_report.calls
    say("done")
    return result


def load(checkpoint: str | Path, dtype: "torch.dtype | str") -> Any:
    """The causal language model of a checkpoint, as anyone loads it, on the accelerator if there is one."""
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load {checkpoint}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def prompt_for(checkpoint: str, model: Any) -> Tensor:
    """The same prompt every time: a text if there is a tokenizer, else token ids drawn from a seed."""
    if (Path(checkpoint) / "tokenizer_config.json").is_file():
        ids = AutoTokenizer.from_pretrained(checkpoint)(_TEXT, return_tensors="pt").input_ids
    else:
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, (1, _PROMPT_TOKENS), generator=generator)
    return ids.to(model.device)


def _compiled_decode(model: Any) -> Callable[..., Any]:
    """A forward whose one-token steps go through a plain torch.compile, as in transformers' own `generate()`.

    The prompt stays eager there, and here: compiling it unrolls the delta rule's loop over the sequence, and
    takes minutes. So torch.compile is not charged for that.
    """
    eager = model.forward
    compiled = torch.compile(eager)

    @functools.wraps(eager)
    def forward(*args: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        return (compiled if input_ids.shape[1] == 1 else eager)(*args, input_ids=input_ids, **kwargs)

    return forward


def _generate_compiled(
    model: Any, forward: Callable[..., Any], prompt: Tensor, tokens: int, **options: Any
) -> Generated:
    model.forward = forward
    try:
        return generate(model, prompt, tokens, **options)
    finally:
        del model.forward


def _interleaved(
    modes: dict[str, Callable[..., Generated]], prompt: Tensor, tokens: int
) -> dict[str, list[TokenClock]]:
    """Clocks of `_ROUNDS` calls of each mode, in turn: a change of the machine's speed meets them all."""
    clocks: dict[str, list[TokenClock]] = {name: [] for name in modes}
    with tqdm(total=_ROUNDS * len(modes), desc="  timing", unit="call", leave=False, disable=None) as bar:
        for _ in range(_ROUNDS):
            for name, mode in modes.items():
                clocks[name].append(mode(prompt, tokens).clock)
                bar.update()
    return clocks


def _timing(name: str, first: Generated, steady: Sequence[TokenClock]) -> Timing:
    return Timing(
        name,
        statistics.median(seconds for clock in steady for seconds in clock.token_seconds),
        statistics.median(clock.prompt_seconds for clock in steady),
        # Eager compiles nothing: what its first call takes longer is allocation, which the others pay too.
        0.0
        if name == EAGER
        else max(0.0, first.clock.total_seconds - statistics.median(c.total_seconds for c in steady)),
    )


def _why_inductor_fails(device: torch.device) -> str | None:
    """Why Inductor cannot compile here, or None. It also loads Inductor before anything is timed."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing on this machine (often: a C++ compiler) is reported
        return f"Inductor cannot compile here: {in_one_line(error)}"
    return None


@contextmanager
def _cold_cache() -> Iterator[None]:
    """Compilers cache in a temporary folder: with a warm one, compile seconds would be another run's."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    saved = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(prefix="fxfuse-demo-", ignore_cleanup_errors=True) as folder:
        os.environ |= {name: str(Path(folder) / name.lower()) for name in names}
        try:
            yield
        finally:
            for name, value in saved.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """No hints from transformers on packages that could be installed; no bars where nobody watches."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class _Progress:
    """Prints to stderr what begins, with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, message: str) -> None:
        print(f"[{time.perf_counter() - self.start:4.0f} s] {message}", file=sys.stderr, flush=True)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"
