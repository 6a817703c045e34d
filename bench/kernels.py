"""Every Triton kernel at the widths of the published models: registers and spills, or time against its bytes.

`--compile-only` needs no GPU: each launch that a model would make is compiled for cuda 80, 90 and 100 and hip
gfx942, and what the compiler allotted is printed; the exit code is 1 if anything spills to memory. Without it
the kernels are timed on a CUDA device, beside torch.compile of the same reference and, where it is installed,
flash-linear-attention; the share of the read bandwidth is of the bytes a kernel has to move.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import BenchReport, Case, Peer, Result, Skipped, arguments, run
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxfuse.errors import OptionError
from fxfuse.runtime.ops import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    gated_delta_rule,
    gated_rms_norm,
    gdn_decode,
    gdn_gates,
    qk_norm_rope_gate,
    qkvzba_split,
    recurrent_gated_delta_rule,
    rms_norm,
    sigmoid_gate_mul,
    silu_mul,
)
from fxfuse.runtime.ops.triton_kernel import Compiled, compile_only

TARGETS: tuple[tuple[str, int | str], ...] = (("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942"))
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KEY_HEADS, HEAD, TAPS, HEAD_DIM, ROTARY, EPS = 16, 128, 4, 256, 64, 1e-6
CACHE = 4096  # tokens that a static cache has room for
ROW_WIDTH = 110


@dataclass(frozen=True)
class Widths:
    """What the kernels see of a model.

    Attributes:
        hidden: features of a token. value_heads: of Gated DeltaNet, which has 16 key heads at every size.
        heads, kv_heads: of attention. intermediate: of an MLP, or of one expert.
    """

    hidden: int
    value_heads: int
    heads: int
    kv_heads: int
    intermediate: int


WIDTHS = {
    "0.8b": Widths(1024, 16, 8, 2, 3584),
    "2b": Widths(2048, 16, 8, 2, 6144),
    "4b": Widths(2560, 32, 16, 4, 9216),
    "9b": Widths(4096, 32, 16, 4, 12288),
    "27b": Widths(5120, 48, 24, 4, 17408),
    "35b-a3b": Widths(2048, 32, 16, 2, 512),
    "122b-a10b": Widths(3072, 64, 32, 2, 1024),
    "397b-a17b": Widths(4096, 64, 32, 2, 1024),
    "2.4t-a95b": Widths(8192, 128, 64, 4, 2048),
}


@dataclass(frozen=True)
class Work:
    """One kernel on one set of inputs.

    Attributes:
        name: of the operator. launch: runs the kernel. reference: the same in plain torch. given: what both
        take. bytes: that have to be read and written.
    """

    name: str
    launch: Callable[..., Any]
    reference: Callable[..., Any]
    given: tuple[Any, ...]
    bytes: int

    @property
    def device(self) -> torch.device:
        return next(x.device for x in self.given if isinstance(x, Tensor))


def works(widths: Widths, batch: int, length: int, dtype: torch.dtype, device: str) -> Iterator[Work]:
    """The kernels of one model on [batch, length] tokens; those of decoding where the length is 1."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype) if device != "meta" else _meta(shape, dtype)

    values, keys = widths.value_heads * HEAD, KEY_HEADS * HEAD
    qkvz, channels = 2 * keys + 2 * values, 2 * keys + values
    x, residual = new(batch, length, widths.hidden), new(batch, length, widths.hidden)
    weight = new(widths.hidden)
    yield _work("rms_norm", rms_norm.launch, rms_norm.reference, x, weight, EPS, True, written=[x])
    yield _work(
        "add_rms_norm",
        rms_norm.add_launch,
        rms_norm.add_reference,
        *(x, residual, weight, EPS, True),
        written=[x, x],
    )
    gate, up = new(batch, length, 2 * widths.intermediate).chunk(2, dim=-1)
    yield _work("silu_mul", silu_mul.launch, silu_mul.reference, gate, up, written=[gate])

    row = new(batch, length, qkvz + 2 * widths.value_heads)
    A_log, dt_bias = (new(widths.value_heads, dtype=torch.float32) for _ in range(2))
    norm, taps = new(HEAD), new(channels, TAPS)
    state = new(batch, widths.value_heads, HEAD, HEAD, dtype=torch.float32)
    conv_state = new(batch, channels, TAPS)
    sizes = (KEY_HEADS, widths.value_heads, HEAD, HEAD)
    whole = (row[..., :qkvz], row[..., qkvz:], *sizes)
    mixed = row[..., :channels].transpose(1, 2)
    z = row[..., channels:qkvz].unflatten(-1, (-1, HEAD))
    b, a = row[..., qkvz:].chunk(2, dim=-1)
    gates = new(batch, length, widths.value_heads, dtype=torch.float32)
    yield _work(
        "gated_rms_norm",
        gated_rms_norm.launch,
        gated_rms_norm.reference,
        *(z.contiguous(), z, norm, EPS),
        written=[z],
    )
    yield _work(
        "gdn_gates",
        gdn_gates.launch,
        gdn_gates.reference,
        *(a, b, A_log, dt_bias, False),
        written=[gates, gates],
    )
    for interleaved in (False, True):
        name = "qkvzba_split" + ", interleaved" * interleaved
        given = (*whole, interleaved)
        yield _work(name, qkvzba_split.launch, qkvzba_split.reference, *given, written=[row])
    heads = [x.unflatten(-1, (-1, HEAD)) for x in row[..., :channels].split([keys, keys, values], dim=-1)]
    if length == 1:
        for interleaved in (False, True):
            parts = gdn_decode.views_of_row(*(x[:, 0] for x in whole[:2]), *sizes, interleaved)
            yield _work(
                "gdn_decode" + ", interleaved" * interleaved,
                gdn_decode.launch,
                gdn_decode.reference,
                *(*parts, conv_state, taps, None, A_log, dt_bias, norm, state, EPS, False),
                written=[parts.z, conv_state, state],
            )
        yield _work(
            "recurrent_gated_delta_rule",
            recurrent_gated_delta_rule.launch,
            recurrent_gated_delta_rule.reference,
            *(*heads, -gates.abs(), gates.sigmoid(), state, True),
            written=[heads[2], state],
        )
        yield _work(
            "causal_conv1d_update",
            causal_conv1d_update.launch,
            causal_conv1d_update.reference,
            *(mixed, conv_state, taps, None, True),
            written=[mixed, conv_state],
        )
    else:
        yield _work(
            "chunk_gated_delta_rule",
            chunk_gated_delta_rule.launch,
            gated_delta_rule.reference,
            *(*heads, -gates.abs(), gates.sigmoid(), state, True),
            written=[heads[2], state],
        )
        bounds = torch.tensor([0, length // 4, length // 2, length], device=device)
        yield _work(
            "chunk_gated_delta_rule, packed",
            chunk_gated_delta_rule.launch,
            gated_delta_rule.reference,
            *(*(x[:1] for x in (*heads, -gates.abs(), gates.sigmoid())), None, True, bounds),
            written=[heads[2], state],
        )
        yield _work(
            "causal_conv1d",
            causal_conv1d.launch,
            causal_conv1d.reference,
            *(mixed, taps, None, None, None, True),
            written=[mixed],
        )
        few = mixed[..., : causal_conv1d_update.MAX_LENGTH]
        yield _work(
            "causal_conv1d_update, few tokens",
            causal_conv1d_update.launch,
            causal_conv1d_update.reference,
            *(few, conv_state, taps, None, True),
            written=[few, conv_state],
        )

    row = new(batch, length, (2 * widths.heads + 2 * widths.kv_heads) * HEAD_DIM)
    parts = row.split([2 * widths.heads * HEAD_DIM, *[widths.kv_heads * HEAD_DIM] * 2], dim=-1)
    query_gate, key, value = (
        part.unflatten(-1, (n, -1))
        for part, n in zip(parts, (widths.heads, widths.kv_heads, widths.kv_heads), strict=True)
    )
    q_weight, k_weight = new(HEAD_DIM), new(HEAD_DIM)
    cos, sin = new(1, length, ROTARY), new(1, length, ROTARY)
    caches = [new(batch, widths.kv_heads, max(CACHE, length), HEAD_DIM) for _ in range(2)]
    position = torch.zeros(1, dtype=torch.long, device=device)
    rest = (key, value, q_weight, k_weight, cos, sin, *caches, position, EPS)
    query, gate = query_gate.chunk(2, dim=-1)
    written = [query, key, value]
    # Of the caches only the new tokens' places are touched.
    untouched = sum(cache.nbytes for cache in caches)
    for name, launch, reference, first, more in (
        ("qk_norm_rope", qk_norm_rope_gate.launch, qk_norm_rope_gate.reference, query, []),
        (
            "qk_norm_rope_gate",
            qk_norm_rope_gate.gate_launch,
            qk_norm_rope_gate.gate_reference,
            query_gate,
            [gate],
        ),
    ):
        work = _work(name, launch, reference, first, *rest, written=[*written, *more])
        yield Work(work.name, work.launch, work.reference, work.given, work.bytes - untouched)
    attended = new(batch, widths.heads, length, HEAD_DIM).transpose(1, 2)
    yield _work(
        "sigmoid_gate_mul",
        sigmoid_gate_mul.launch,
        sigmoid_gate_mul.reference,
        *(attended, gate),
        written=[gate],
    )


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _work(
    name: str,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    *given: Any,
    written: Sequence[Tensor],
) -> Work:
    tensors = [x for x in given if isinstance(x, Tensor)]
    total = sum(x.numel() * x.element_size() for x in (*tensors, *written))
    return Work(name, launch, reference, given, total)


# Without a GPU: what the compilers allot


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes.

    Attributes:
        work: the operator. size: of the model. dtype: of the activations. target: such as "cuda 90".
        warps: of a program. registers: of a thread. shared: bytes of shared memory.
        spilled: bytes of stack of a thread (cuda), or registers spilled and bytes of scratch (hip).
    """

    work: str
    size: str
    dtype: str
    target: str
    warps: int
    registers: int
    shared: int
    spilled: int


def usages(
    sizes: Sequence[str],
    dtypes: Sequence[str],
    targets: Sequence[tuple[str, int | str]] = TARGETS,
    shapes: Sequence[tuple[int, int]] = ((1, 1), (64, 1), (1, 8192)),
    kernels: Sequence[str] | None = None,
) -> Iterator[Usage]:
    """What each kernel takes at each size, [batch, length], dtype and target; equal binaries only once."""
    seen = set()
    for target in targets:
        for size in sizes:
            for dtype in dtypes:
                for batch, length in shapes:
                    for work in works(WIDTHS[size], batch, length, DTYPES[dtype], "meta"):
                        if kernels and work.name not in kernels:
                            continue
                        with compile_only(*target) as compiled:
                            work.launch(*work.given)
                        for one in compiled:
                            if (target, one.binary.hash) not in seen:
                                seen.add((target, one.binary.hash))
                                yield _usage(work.name, size, dtype, target, one)


def _usage(work: str, size: str, dtype: str, target: tuple[str, int | str], compiled: Compiled) -> Usage:
    binary = compiled.binary
    if target[0] == "cuda":
        registers, spilled, local = _numbers(_resource_usage(binary.asm["cubin"]), "REG:", "STACK:", "LOCAL:")
        spilled += local
    else:
        names = (".vgpr_count:", ".vgpr_spill_count:", ".sgpr_spill_count:", ".private_segment_fixed_size:")
        registers, *spills = _numbers(binary.asm["amdgcn"], *names)
        spilled = sum(spills)
    where = f"{target[0]} {target[1]}"
    metadata = binary.metadata
    return Usage(work, size, dtype, where, metadata.num_warps, registers, metadata.shared, spilled)


def _numbers(text: str, *names: str) -> list[int]:
    found = [re.search(re.escape(name) + r"\s*(\d+)", text) for name in names]
    missing = [name for name, match in zip(names, found, strict=True) if match is None]
    if missing:
        raise OptionError(f"the compiler's listing does not name {', '.join(missing)}")
    return [int(match[1]) for match in found if match]


def _resource_usage(cubin: bytes) -> str:
    """cuobjdump's line on a binary; the tool comes with Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_all(options: argparse.Namespace) -> int:
    """Print the table of what every kernel takes; 1 if one spills."""
    table = Table(title="kernels", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("kernel", "first at", "dtype", "target"):
        table.add_column(column, no_wrap=True)
    for column in ("warps", "registers", "shared", "spilled"):
        table.add_column(column, justify="right")
    spilled = total = 0
    for usage in usages(options.size, options.dtype, shapes=_shapes(options), kernels=options.kernel):
        table.add_row(
            *(usage.work, usage.size, usage.dtype, usage.target),
            *map(str, (usage.warps, usage.registers, usage.shared, usage.spilled)),
        )
        total += 1
        spilled += usage.spilled > 0
    console = Console()
    console.width = max(console.width, ROW_WIDTH)
    console.print(table)
    console.print(f"{total} kernels, {spilled} spill to memory")
    return 1 if spilled else 0


# With a GPU: time against bytes

COPY = "a copy of as many bytes"
COMPILED = "torch.compile"
SEPARATE = "three launches"
OTHER_LIBRARY = "flash-linear-attention"
# The reference is a loop over chunks: minutes of compiling for each length.
NOT_COMPILED = ("chunk_gated_delta_rule", "chunk_gated_delta_rule, packed")


@dataclass(frozen=True)
class Claim:
    """A speed that a kernel has to have: times as fast as a peer, at least.

    Attributes:
        kernels: names of operators. batches, lengths: least and most of them at which it is claimed.
        A copy of as many bytes is a ratio of 1 at the copy bandwidth.
    """

    kernels: tuple[str, ...]
    batches: tuple[int, int]
    lengths: tuple[int, int]
    against: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} x {self.against}"

    def is_of(self, kernel: str, batch: int, length: int) -> bool:
        inside = self.batches[0] <= batch <= self.batches[1] and self.lengths[0] <= length <= self.lengths[1]
        return kernel in self.kernels and inside


MANY = 2**31
DECODE = ("gdn_decode", "gdn_decode, interleaved")
NORMS = ("rms_norm", "add_rms_norm", "gated_rms_norm", "qk_norm_rope", "qk_norm_rope_gate")
CLAIMS = (
    Claim(DECODE, (64, MANY), (1, 1), COPY, 0.7),
    Claim(DECODE[:1], (1, 1), (1, 1), SEPARATE, 2.0),
    Claim(NORMS, (1, MANY), (8192, MANY), COPY, 0.8),
)


def _claims_of(case: str) -> list[Claim]:
    kernel, batch, length = re.fullmatch(r"(.+), \S+ \w+, batch (\d+), (\d+) tokens?", case).groups()  # type: ignore[union-attr]
    return [claim for claim in CLAIMS if claim.is_of(kernel, int(batch), int(length))]


def verdicts(results: Iterable[Result]) -> Iterator[str]:
    """A line for each claim on a case that was measured: what was reached, and whether that is enough."""
    for result in results:
        for claim in _claims_of(result.case) if result.fused_expected else ():
            reached = next((r.of_medians for r in result.ratios if r.against == claim.against), None)
            if reached is None:
                yield f"NOT MEASURED: {result.case}: claimed {claim}"
            else:
                said = "met" if reached >= claim.ratio else "MISSED"
                yield f"{said}: {result.case}: {reached:.2f}, claimed {claim}"


def cases(options: argparse.Namespace) -> Iterator[Case | Skipped]:
    """One case for each kernel, size and number of tokens; what fails, or has no time left, is skipped."""
    if not options.device.startswith("cuda"):
        raise OptionError("kernels are timed on a GPU: --device cuda, or --compile-only without one")
    if importlib.util.find_spec("fla") is None:
        yield Skipped("every case", f"{OTHER_LIBRARY} is not installed: not among the peers")
    until = time.monotonic() + 60 * options.minutes
    for size in options.size:
        for name in options.dtype:
            for batch, length in _shapes(options):
                if time.monotonic() > until:
                    where = _case_name("every kernel", size, name, batch, length)
                    yield Skipped(where, f"the time was up: --minutes {options.minutes:g}")
                else:
                    yield from _cases(options, size, name, batch, length)


def _shapes(options: argparse.Namespace) -> list[tuple[int, int]]:
    """[batch, length] of sequences that decode, and of prompts."""
    return [*((batch, 1) for batch in options.batch), *((1, length) for length in options.tokens)]


def _case_name(kernel: str, size: str, dtype: str, batch: int, length: int) -> str:
    return f"{kernel}, {size} {dtype}, batch {batch}, {length} token{'s' * (length > 1)}"


def _cases(
    options: argparse.Namespace, size: str, dtype: str, batch: int, length: int
) -> Iterator[Case | Skipped]:
    torch.manual_seed(0)
    for work in works(WIDTHS[size], batch, length, DTYPES[dtype], options.device):
        name = _case_name(work.name, size, dtype, batch, length)
        if options.kernel and work.name not in options.kernel:
            continue
        if options.claims and not _claims_of(name):
            continue
        ready: list[Peer] = []
        for peer in _peers(work, options.claims):
            try:
                peer.sample()  # compiles
            except Exception as error:  # one peer that cannot run here must not end the run
                first = str(error).partition("\n")[0]
                yield Skipped(f"{name}, {peer.name}", f"{type(error).__name__}: {first}")
                if peer.name == "fxfuse":
                    break
            else:
                ready.append(peer)
        names = [peer.name for peer in ready]
        if "fxfuse" in names:
            yield Case(
                name=name,
                peers=tuple(ready),
                baselines=tuple(x for x in (COPY, COMPILED, SEPARATE, OTHER_LIBRARY) if x in names),
                bytes=work.bytes,
                dtype=DTYPES[dtype],
            )


def _peers(work: Work, claims: bool) -> Iterator[Peer]:
    calls = 0

    def counted() -> Any:
        nonlocal calls
        calls += 1
        return work.launch(*work.given)

    def always() -> bool:
        return True

    yield Peer("fxfuse", _timed(counted), lambda: _matches(work), lambda: calls)
    source = torch.empty(work.bytes // 2, dtype=torch.uint8, device=work.device)
    target = torch.empty_like(source)
    yield Peer(COPY, _timed(lambda: target.copy_(source)), lambda: torch.equal(target, source))
    if work.name == "gdn_decode":
        separate = functools.cache(lambda: three_launches(*work.given))
        yield Peer(SEPARATE, _timed(lambda: separate()()), always)
    if not claims and work.name not in NOT_COMPILED:
        torch.compiler.reset()  # at the limit of recompilations torch would silently run eager
        compiled = torch.compile(work.reference, dynamic=False)
        yield Peer(COMPILED, _timed(lambda: compiled(*work.given)), always)
    theirs = BY_FLA.get(work.name)
    if theirs is not None and importlib.util.find_spec("fla"):
        other = functools.cache(lambda: theirs(*work.given))
        yield Peer(OTHER_LIBRARY, _timed(lambda: other()()), always)


def _timed(function: Callable[[], object]) -> Callable[[], float]:
    """A sample of the device's time alone: a GPU graph of many calls, without Python between them."""

    def sample() -> float:
        from triton.testing import do_bench_cudagraph

        milliseconds: Any = do_bench_cudagraph(function, rep=20, return_mode="median")
        return float(milliseconds) / 1e3

    return sample


def three_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    z: Tensor,
    b: Tensor,
    a: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    eps: float,
    round_beta: bool,
) -> Callable[[], Tensor]:
    """`gdn_decode` of a contiguous row by convolution step, recurrence and gated norm, one after the other.

    The gates are computed once, outside: elsewhere they are part of the recurrence's kernel.
    """
    batch, key_heads, ratio, dv = value.shape
    channels, keys, heads = len(conv_weight), key_heads * key.shape[-1], key_heads * ratio
    mixed = query.as_strided((batch, channels, 1), (query.stride(0), 1, 1))
    g, beta = (
        x.unsqueeze(1) for x in gdn_gates.launch(a.flatten(1), b.flatten(1), A_log, dt_bias, round_beta)
    )
    gate = z.flatten(1, 2)

    def step() -> Tensor:
        fresh = causal_conv1d_update.launch(mixed, conv_state, conv_weight, conv_bias, True)
        q, k, v = fresh.transpose(1, 2).split([keys, keys, heads * dv], dim=-1)
        out = recurrent_gated_delta_rule.launch(
            q.unflatten(-1, (key_heads, -1)),
            k.unflatten(-1, (key_heads, -1)),
            v.unflatten(-1, (heads, dv)),
            g,
            beta,
            state,
            True,
        )
        return gated_rms_norm.launch(out.squeeze(1), gate, norm_weight, eps)

    return step


def _by_fla(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, normalise: bool
) -> Callable[[], object]:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    dense = [x.contiguous() for x in (query, key, value)]
    return lambda: fused_recurrent_gated_delta_rule(
        *dense,
        g=g,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalise,
    )


def _chunks_by_fla(*given: Any) -> Callable[[], object]:
    function = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return lambda: chunk_gated_delta_rule.by_fla(function, *given)


BY_FLA = {
    "recurrent_gated_delta_rule": _by_fla,
    "chunk_gated_delta_rule": _chunks_by_fla,
    "chunk_gated_delta_rule, packed": _chunks_by_fla,
}


def _matches(work: Work) -> bool:
    """Whether outputs and states are those of the reference in float64, to the rounding of their dtype."""
    given = copy.deepcopy(work.given)
    exact = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
    got, expected = (
        [*(out if isinstance(out, tuple) else (out,)), *(x for x in state if isinstance(x, Tensor))]
        for out, state in ((work.launch(*given), given), (work.reference(*exact), exact))
    )
    return all(_near(x, y) for x, y in zip(got, expected, strict=True))


def _near(got: Tensor, exact: Tensor) -> bool:
    rounding = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    size = exact.double().square().mean().sqrt()
    return bool(((got.double() - exact).abs() <= rounding * exact.abs() + 1e-3 * size).all())


def _names() -> list[str]:
    """Of the kernels, as in `Work`."""
    widths = next(iter(WIDTHS.values()))
    found = (work.name for t in (1, 2) for work in works(widths, 1, t, torch.bfloat16, "meta"))
    return list(dict.fromkeys(found))


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (given := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{given}: has to be at least {least}")
        return given

    return number


def parser() -> argparse.ArgumentParser:
    options = arguments(__doc__)
    options.add_argument("--compile-only", action="store_true", help="registers and spills; needs no GPU")
    for name, known, default in (("size", WIDTHS, list(WIDTHS)), ("dtype", DTYPES, ["bfloat16"])):
        said = f"of {', '.join(known)} (default {'all' if len(default) > 1 else default[0]})"
        options.add_argument(
            f"--{name}", nargs="+", choices=known, metavar=name.upper(), default=default, help=said
        )
    options.add_argument(
        "--batch",
        type=_at_least(1),
        nargs="+",
        default=[1, 8, 64, 256],
        help="sequences that decode (default %(default)s)",
    )
    options.add_argument(
        "--tokens", type=_at_least(2), nargs="+", default=[8192], help="of a prompt (default %(default)s)"
    )
    options.add_argument(
        "--kernel",
        nargs="+",
        choices=_names(),
        metavar="KERNEL",
        help=f"(default all) of {'; '.join(_names())}",
    )
    options.add_argument(
        "--claims",
        action="store_true",
        help="only what a speed is claimed of, without torch.compile: minutes",
    )
    options.add_argument(
        "--minutes",
        type=float,
        default=240.0,
        help="begin no case after them; the rest is said to be skipped (default %(default)s)",
    )
    options.set_defaults(device="cuda")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.compile_only:
        if options.json or options.plot:
            parser().error("--json and --plot are of times: --compile-only prints a table")
        return compile_all(options)
    if not torch.cuda.is_available():
        parser().error("no CUDA device: --compile-only shows registers and spills without one")
    reports: list[BenchReport] = []
    code = run("time of each kernel", parser(), lambda _: [torch.bfloat16], cases, argv, reports.append)
    for report in reports:
        print("\n".join(verdicts(report.results)))
        if any(left_out.case.endswith(", fxfuse") for left_out in report.skipped):
            return 1
    return code


if __name__ == "__main__":
    raise SystemExit(main())
