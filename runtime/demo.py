"""The main job on real input, and a verdict on it that admits a loss.

From the checkpoint's folder on there is only the ordinary path: `from_pretrained`, `model.optimize()` and
`generate()` with its defaults. What is judged: the same tokens in fp32, an error in bf16 beside eager's own,
time per token beside eager and torch.compile in the same run, and the same weights after `deoptimize()`.
"""

import functools
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from fxfuse.errors import CheckpointError
from fxfuse.runtime.random_checkpoint import random_checkpoint
from fxfuse.testing.oracles import default_slack

__all__ = ["Demonstration", "Timing", "run"]

EAGER, COMPILE, FXFUSE = "eager", "torch.compile", "fxfuse"

_PROMPT_TOKENS = 48
_ROUNDS = 2
_TEXT = (
    "A linear attention layer keeps a matrix for each head instead of a cache that grows. At every step it "
    "decays by a gate, forgets what it held for the current key, and stores the new value in its place. "
    "Explain why "
)


@dataclass
class Timing:
    """Times of one way to run the model: medians of steady calls, and what the first call took longer."""

    name: str
    seconds_per_token: float
    prompt_seconds: float
    compile_seconds: float
    pays_after_tokens: int | None = None


@dataclass
class Demonstration:
    """What one run found. `differences` is empty exactly when everything that must be equal is."""

    checkpoint: str
    model: str
    device: str
    prompt_tokens: int
    new_tokens: int
    equal_tokens: int = 0
    distinct_tokens: int = 0
    eager_error: float = math.nan
    fxfuse_error: float = math.nan
    error_limit: float = math.nan
    weights_changed: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    not_timed: dict[str, str] = field(default_factory=dict)
    load_before: float = 0.0
    report: Any = None

    @property
    def differences(self) -> list[str]:
        """Each thing that differs from what it must be, in words."""
        found = []
        if self.equal_tokens < self.new_tokens:
            found.append(f"fp32: {self.equal_tokens} of {self.new_tokens} tokens equal")
        if not self.fxfuse_error <= self.error_limit * self.eager_error:
            found.append(f"bf16: error above {self.error_limit} times eager's own")
        found += [f"{dtype}: the compiled callable never ran" for dtype, n in self.calls.items() if not n]
        if self.weights_changed:
            first = ", ".join(self.weights_changed[:3])
            found.append(f"{len(self.weights_changed)} tensors changed after deoptimize() ({first})")
        return found

    @property
    def speedup(self) -> tuple[float, str]:
        """fxfuse's speed per token over that of the fastest other way, and the name of that way."""
        others = [timing for name, timing in self.timings.items() if name != FXFUSE]
        best = min(others, key=lambda timing: timing.seconds_per_token)
        return best.seconds_per_token / self.timings[FXFUSE].seconds_per_token, best.name

    @property
    def verdict(self) -> str:
        """One line: what differs, or else whether it was faster, and than what."""
        if self.differences:
            return "DIFFERS: " + "; ".join(self.differences)
        ratio, other = self.speedup
        if ratio < 1:
            return f"EQUAL BUT SLOWER: {ratio:.2f} times the speed of {other}, so here fxfuse is a loss"
        return f"EQUAL AND FASTER: {ratio:.2f} times the speed of {other}, the fastest other way"

    def to_json(self) -> str:
        """Everything above as JSON, the report included."""
        data = asdict(replace(self, report=None)) | {"report": self.report.to_dict()}
        return json.dumps(data | {"differences": self.differences, "verdict": self.verdict}, indent=2)


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
        result = _demonstrate(str(checkpoint), tokens, say)
    show(result, out)
    return result


def _demonstrate(checkpoint: str, tokens: int, say: "_Progress") -> Demonstration:
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    say(f"checkpoint: {checkpoint}")
    say("fp32: what eager generates is the reference")
    model = load(checkpoint, torch.float32)
    prompt = prompt_for(checkpoint, model)
    expected = generate(model, prompt, tokens, logits=True)
    result = Demonstration(checkpoint, type(model).__name__, _device(model.device), prompt.shape[1], tokens)
    result.distinct_tokens = len(set(expected.tokens))
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


class TokenClock(BaseStreamer):
    """Notes when `generate()` has each token: the prompt is handed over first, then one token at a time."""

    def __init__(self, label: str | None = None, total: int = 0) -> None:
        self.times: list[float] = []
        # A bar costs time between tokens; it is for calls that compile and are not measured per token.
        self.bar = (
            tqdm(total=total, desc=f"  {label}", unit="token", leave=False, disable=None) if label else None
        )

    def put(self, value: Tensor) -> None:
        """Note the time of a token."""
        self.times.append(time.perf_counter())
        if self.bar is not None and len(self.times) > 1:
            self.bar.update()

    def end(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    @property
    def prompt_seconds(self) -> float:
        """From the hand-over of the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def token_seconds(self) -> list[float]:
        """From each token to the next."""
        return [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]

    @property
    def total_seconds(self) -> float:
        """From the hand-over of the prompt to the last token."""
        return self.times[-1] - self.times[0]


class ReplayTokens(LogitsProcessor):
    """Makes `generate()` choose given tokens, so that two models see the same input at every step."""

    def __init__(self, tokens: Sequence[int], prompt_tokens: int) -> None:
        self.tokens = tokens
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave only the next token a finite score."""
        forced = torch.full_like(scores, -math.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_tokens]] = 0
        return forced


@dataclass
class Generated:
    """One call of `generate()`: the new tokens, the logits [steps, vocabulary] if asked for, the clock."""

    tokens: list[int]
    logits: Tensor
    clock: TokenClock


def generate(
    model: Any,
    prompt: Tensor,
    tokens: int,
    *,
    logits: bool = False,
    replay: Sequence[int] | None = None,
    label: str | None = None,
) -> Generated:
    """`model.generate()` with its defaults, greedy, exactly `tokens` new tokens; `replay` dictates them."""
    clock = TokenClock(label, tokens)
    processors = [] if replay is None else [ReplayTokens(replay, prompt.shape[1])]
    output: Any = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        logits_processor=processors,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=logits,
    )
    kept = torch.cat(output.logits).float().cpu() if logits else torch.empty(0)
    return Generated(output.sequences[0, prompt.shape[1] :].tolist(), kept, clock)


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


def pays_after(compile_seconds: float, before: float, after: float) -> int | None:
    """Tokens after which compiling has paid for itself; 0 if it cost nothing, None if it never pays."""
    if compile_seconds <= 0:
        return 0
    return math.ceil(compile_seconds / (before - after)) if after < before else None


def rms_error(logits: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference."""
    return (logits - reference).square().mean().sqrt().item()


def equal_prefix(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    return next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))


def differing_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ in presence, dtype, shape or any bit."""
    return [
        name
        for name in {**expected, **found}
        if name not in found or name not in expected or not _same_bits(found[name], expected[name])
    ]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Bytes, because NaN is not equal to itself and -0.0 is equal to 0.0.
    left, right = (t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b.to(a.device)))
    return torch.equal(left, right)


def _why_inductor_fails(device: torch.device) -> str | None:
    """Why Inductor cannot compile here, or None. It also loads Inductor before anything is timed."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever is missing on this machine (often: a C++ compiler) is reported
        return f"Inductor cannot compile here: {str(error).strip().splitlines()[0]}"
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


def show(result: Demonstration, out: Console) -> None:
    """Print a demonstration for people."""
    out.print(f"{result.model} from {Path(result.checkpoint).name}", markup=False)
    out.print(
        f"{result.device}; prompt of {result.prompt_tokens} tokens, {result.new_tokens} new ones, greedy\n"
    )

    out.print(str(result.report), markup=False)
    if result.report.graphs and not result.report.misses:
        out.print("left alone: nothing that any pass could have matched")

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
