"""One harness for every measured claim: `python bench/NAME.py [--json FILE] [--plot FILE] ...`.

The things compared (peers) are timed interleaved, A B A B ..., in one process, so that a machine that slows
down slows down for all of them. A result carries the median, the ratio of medians against each baseline
with the lowest and the highest ratio of single pairs, the share of the machine's limits measured in the
same run, and whether the output was right and the fused code ran: a time without those two is not a result.

Run by itself it prints the machine and its limits.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from fxfuse.errors import OptionError

SCHEMA = 1  # of the JSON form; raised when a field changes its meaning or goes away

# What decides how fast a CPU multiplies; everything else in /proc/cpuinfo is noise here.
_ISA = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
_TABLE_WIDTH = 110  # a narrower terminal, or none, would break the numbers in two
# The last three change what the baselines run where they are installed.
_PACKAGES = ("torch", "transformers", "triton", "fxfuse", "flash-linear-attention", "causal-conv1d", "peft")


# The machine and its limits


@dataclass(frozen=True)
class Machine:
    """Where and with what a measurement was made.

    Attributes:
        cpu: model name; `isa` its instruction sets of note; `cores` those this process may use. threads: of
        torch. load: other runnable processes in the last minute when the run began; above a few tenths,
        times are doubtful. accelerator: name of the GPU used, or None. versions: of python and the packages
        involved; a package that is not installed is left out. date: UTC, ISO 8601.
    """

    cpu: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    load: float
    accelerator: str | None
    system: str
    versions: dict[str, str]
    date: str


def machine(device: str = "cpu") -> Machine:
    """The record of this machine."""
    name, flags = _cpu_info()
    return Machine(
        cpu=name,
        isa=tuple(flag for flag in _ISA if flag in flags),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0,
        accelerator=torch.cuda.get_device_name() if device.startswith("cuda") else None,
        system=f"{platform.system()} {platform.machine()}",
        versions={"python": platform.python_version(), **_versions()},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_info() -> tuple[str, frozenset[str]]:
    """Model name and flags, from Linux's list where there is one."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or "unknown", frozenset(flags.split())


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most, measured in the same run.

    Attributes:
        read_gb_s: memory read bandwidth in GB/s (10**9 bytes).
        matmul_gflop_s: matrix product rate in GFLOP/s by dtype name.
    """

    read_gb_s: float
    matmul_gflop_s: dict[str, float]


def limits(dtypes: Sequence[torch.dtype], device: str = "cpu") -> Limits:
    """Measure the limits that results are compared with; some seconds."""
    return Limits(
        read_bandwidth(device), {_dtype_name(dtype): matmul_rate(dtype, device) for dtype in dtypes}
    )


def read_bandwidth(device: str = "cpu", size: int | None = None, repeats: int = 7) -> float:
    """Memory read bandwidth in GB/s: the fastest of several multi-threaded sums over a buffer that no cache
    holds.

    Args:
        size: bytes; by default eight times the last-level cache and at least 512 MB.
    """
    if size is None:
        size = max(8 * _last_level_cache(device), 512 * 2**20)
    # Of seven reductions tried on a CPU, a full fp32 sum read fastest.
    buffer = torch.ones(size // 4, device=device)
    return buffer.nbytes / _fastest(buffer.sum, device, repeats) / 1e9


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int | None = None, repeats: int = 5) -> float:
    """Rate of a square matrix product in GFLOP/s: the fastest of several.

    Args:
        size: rows and columns; by default 2048, or 8192 on an accelerator.
    """
    size = size or (2048 if device == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: a @ b, device, repeats) / 1e9


def _fastest(function: Callable[[], object], device: str, repeats: int) -> float:
    sample = timed(function, device)
    sample()
    return min(sample() for _ in range(repeats))


def _last_level_cache(device: str) -> int:
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Timing


def timed(
    function: Callable[[], object], device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """`function` as a sample: called, it runs the function once and returns the seconds that took."""

    def sample() -> float:
        synchronize(device)
        start = clock()
        function()
        synchronize(device)
        return clock() - start

    return sample


def synchronize(device: str) -> None:
    """Wait for what was launched on an accelerator; nothing to wait for on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Peer:
    """One of the things compared.

    Attributes:
        name: as in the table. sample: runs it once and returns the seconds per unit (see `timed`).
        fused_calls: a count that grows with each call of fused code, for the peers that are ours; None for
        others. output_matched: called once after the timing; whether this peer's output is what it has to
        be. figures: called once after the timing; further numbers, each named with its unit.
    """

    name: str
    sample: Callable[[], float]
    output_matched: Callable[[], bool]
    fused_calls: Callable[[], int] | None = None
    figures: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Skipped:
    """What could not be measured here, and why: never a silent gap in the results."""

    case: str
    reason: str


@dataclass(frozen=True)
class Case:
    """Peers that do the same work, under one set of conditions.

    Attributes:
        name: the conditions, as in the table.
        peers: in the order in which they take turns.
        baselines: names of the peers that the others are compared with.
        unit: what the seconds are for, such as `token`.
        bytes: that one unit has to read from memory at least; `flops` the operations of its matrix products.
        dtype: of the matrix products, to find their rate among the limits.
    """

    name: str
    peers: tuple[Peer, ...]
    baselines: tuple[str, ...]
    unit: str = "call"
    bytes: float | None = None
    flops: float | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        names = [peer.name for peer in self.peers]
        for name in self.baselines:
            if name not in names:
                raise OptionError(f"case {self.name!r}: baseline {name!r} is not among {', '.join(names)}")
        if len(set(names)) != len(names):
            raise OptionError(f"case {self.name!r}: two peers have one name: {', '.join(names)}")


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a baseline: above 1 is faster.

    Attributes:
        of_medians: median of the baseline over median of the peer.
        lowest: of the ratios of single pairs, timed one after the other; `highest` likewise.
    """

    against: str
    of_medians: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Result:
    """One peer in one case.

    Attributes:
        seconds: median per unit; `samples` has every one, in order.
        first_seconds: wall time of the first sample, with everything that happens once, such as compiling.
        ratios: against each baseline but itself.
        bandwidth_fraction: of the measured read bandwidth, given the bytes that have to be read.
        compute_fraction: of the measured matrix product rate, given the operations.
        fused_expected: this peer has fused code; `ran_fused`: it ran in every timed sample.
        output_matched: the output was checked and right.
        figures: further numbers, each named with its unit.
    """

    case: str
    peer: str
    unit: str
    seconds: float
    samples: tuple[float, ...]
    first_seconds: float
    ratios: tuple[Ratio, ...]
    bandwidth_fraction: float | None
    compute_fraction: float | None
    fused_expected: bool
    ran_fused: bool
    output_matched: bool
    figures: dict[str, float] = field(default_factory=dict)


def measure(
    case: Case,
    limit: Limits,
    *,
    rounds: int = 7,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = True,
) -> tuple[Result, ...]:
    """Time the peers of a case interleaved; one result for each, in their order.

    Args:
        rounds: timed samples of each peer.
        warmup: untimed samples of each peer before; 0 where each sample is a process of its own.

    Raises:
        OptionError: fewer than one round, or fewer than no samples before.
    """
    if rounds < 1 or warmup < 0:
        raise OptionError(f"rounds={rounds}, warmup={warmup}: at least 1 and 0 are needed")
    first: dict[str, float] = {}
    samples: dict[str, list[float]] = {peer.name: [] for peer in case.peers}
    fused = {peer.name: peer.fused_calls is not None for peer in case.peers}
    turns = [(turn, peer) for turn in range(warmup + rounds) for peer in case.peers]
    hidden = not (progress and sys.stderr.isatty())
    for turn, peer in tqdm(turns, desc=case.name, leave=False, disable=hidden):
        before = peer.fused_calls() if peer.fused_calls else 0
        start = clock()
        seconds = peer.sample()
        first.setdefault(peer.name, clock() - start)
        if turn >= warmup:
            samples[peer.name].append(seconds)
            fused[peer.name] &= peer.fused_calls is not None and peer.fused_calls() > before
    return tuple(
        _result(case, peer, samples, first[peer.name], fused[peer.name], limit) for peer in case.peers
    )


def _result(
    case: Case, peer: Peer, samples: Mapping[str, list[float]], first: float, ran_fused: bool, limit: Limits
) -> Result:
    own = samples[peer.name]
    seconds = statistics.median(own)
    rate = limit.matmul_gflop_s.get(_dtype_name(case.dtype))
    return Result(
        case=case.name,
        peer=peer.name,
        unit=case.unit,
        seconds=seconds,
        samples=tuple(own),
        first_seconds=first,
        ratios=tuple(_ratio(name, samples[name], own) for name in case.baselines if name != peer.name),
        bandwidth_fraction=case.bytes / seconds / 1e9 / limit.read_gb_s if case.bytes else None,
        compute_fraction=case.flops / seconds / 1e9 / rate if case.flops and rate else None,
        fused_expected=peer.fused_calls is not None,
        ran_fused=ran_fused,
        output_matched=peer.output_matched(),
        figures=peer.figures(),
    )


def _ratio(name: str, baseline: Sequence[float], own: Sequence[float]) -> Ratio:
    pairs = [a / b for a, b in zip(baseline, own, strict=True)]
    return Ratio(name, statistics.median(baseline) / statistics.median(own), min(pairs), max(pairs))


def against_fastest(result: Result) -> Ratio:
    """The ratio against the fastest baseline: the only one that a claim of speed may rest on.

    Raises:
        OptionError: the result was compared with nothing.
    """
    if not result.ratios:
        raise OptionError(f"{result.case}, {result.peer}: no baseline to compare with")
    return min(result.ratios, key=lambda ratio: ratio.of_medians)


# The report


@dataclass(frozen=True)
class BenchReport:
    """All results of one run of one benchmark, with what is needed to judge and repeat it."""

    claim: str
    machine: Machine
    limits: Limits
    settings: dict[str, Any]
    results: tuple[Result, ...]
    schema: int = field(default=SCHEMA)
    skipped: tuple[Skipped, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, default=str)  # a folder among the settings

    @classmethod
    def from_json(cls, text: str) -> "BenchReport":
        """The report that `to_json` wrote.

        Raises:
            OptionError: it was written in another schema.
        """
        data = json.loads(text)
        if data.get("schema") != SCHEMA:
            raise OptionError(f"results of schema {data.get('schema')}: this harness reads schema {SCHEMA}")
        results = tuple(
            Result(
                **{
                    **row,
                    "samples": tuple(row["samples"]),
                    "ratios": tuple(Ratio(**ratio) for ratio in row["ratios"]),
                }
            )
            for row in data["results"]
        )
        where = {**data["machine"], "isa": tuple(data["machine"]["isa"])}
        limit = Limits(**data["limits"])
        skipped = tuple(Skipped(**row) for row in data.get("skipped", ()))
        return cls(data["claim"], Machine(**where), limit, data["settings"], results, SCHEMA, skipped)

    @property
    def ok(self) -> bool:
        """Every output was right, and fused code ran wherever it should have."""
        return all(row.output_matched and row.ran_fused >= row.fused_expected for row in self.results)

    def print(self, console: Console | None = None) -> None:
        """The machine, the limits and one table for each case, for people."""
        console = console or Console(highlight=False)
        console.width = max(console.width, _TABLE_WIDTH)
        console.print(describe(self.machine, self.limits), soft_wrap=True)
        for name in dict.fromkeys(row.case for row in self.results):
            table = _table(name, [row for row in self.results if row.case == name])
            needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
            console.width = max(console.width, needed)
            console.print(table)
        for row in self.results:
            if row.fused_expected and row.ratios:
                best = against_fastest(row)
                console.print(
                    f"{row.case}: {row.peer} is {best.of_medians:.2f}x as fast as {best.against}, "
                    f"the fastest baseline (single pairs {best.lowest:.2f} to {best.highest:.2f})",
                    soft_wrap=True,
                )
        for left_out in self.skipped:
            console.print(f"{left_out.case}: skipped, {left_out.reason}", markup=False, soft_wrap=True)


def describe(where: Machine, limit: Limits) -> str:
    """Machine and limits in three lines."""
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    rates = ", ".join(f"{rate:.0f} GFLOP/s {name}" for name, rate in limit.matmul_gflop_s.items())
    device = f", {where.accelerator}" if where.accelerator else ""
    return (
        f"{where.cpu}{device}: {where.cores} cores, {where.threads} threads, {' '.join(where.isa)}, "
        f"load {where.load}\n{versions}, {where.date}\nlimits: reads {limit.read_gb_s:.1f} GB/s, {rates}"
    )


def _table(name: str, rows: Sequence[Result]) -> Table:
    against = {ratio.against for row in rows for ratio in row.ratios}
    figures = list(dict.fromkeys(name for row in rows for name in row.figures))
    baselines = [row.peer for row in rows if row.peer in against]
    table = Table(
        title=f"{name}; x: times as fast as", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    for column in (
        f"ms/{rows[0].unit}",
        "first s",
        *(f"x {baseline}" for baseline in baselines),
        "of read",
        "of matmul",
        "fused",
        "right",
        *figures,
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        ratios = {ratio.against: ratio for ratio in row.ratios}
        table.add_row(
            row.peer,
            f"{row.seconds * 1e3:.3f}",
            f"{row.first_seconds:.1f}",
            *(_ratio_cell(ratios.get(baseline)) for baseline in baselines),
            _percent(row.bandwidth_fraction),
            _percent(row.compute_fraction),
            "yes" if row.ran_fused else "NO" if row.fused_expected else "",
            "yes" if row.output_matched else "NO",
            *(f"{row.figures[name]:,.4g}" if name in row.figures else "" for name in figures),
        )
    return table


def _ratio_cell(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.of_medians:.2f} ({ratio.lowest:.2f}-{ratio.highest:.2f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def plot(report: BenchReport, path: str | Path) -> None:
    """Write a bar for each result (median; whiskers from the fastest to the slowest sample), one panel per
    case.

    Raises:
        OptionError: matplotlib is not installed.
    """
    _require_matplotlib()
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for row in report.results))
    figure = Figure(figsize=(1 + 3.5 * len(cases), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        rows = [row for row in report.results if row.case == name]
        heights = [row.seconds * 1e3 for row in rows]
        below = [height - min(row.samples) * 1e3 for height, row in zip(heights, rows, strict=True)]
        above = [max(row.samples) * 1e3 - height for height, row in zip(heights, rows, strict=True)]
        axes.bar([row.peer for row in rows], heights, yerr=[below, above], capsize=4)
        axes.set(title=name, ylabel=f"ms per {rows[0].unit}")
    where = report.machine.accelerator or report.machine.cpu
    figure.suptitle(f"{report.claim}; {where}", fontsize="medium")
    figure.savefig(path)


def _require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plot needs matplotlib: pip install 'fxfuse[bench]'")


# The command line of a benchmark


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a bar chart (png, svg, pdf)")
    parser.add_argument("--rounds", type=int, default=7, help="timed samples of each peer (default 7)")
    parser.add_argument("--warmup", type=int, default=2, help="samples before those (default 2)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    return parser


def run(
    claim: str,
    parser: argparse.ArgumentParser,
    dtypes: Callable[[argparse.Namespace], Sequence[torch.dtype]],
    cases: Callable[[argparse.Namespace], Iterable[Case | Skipped]],
    argv: Sequence[str] | None = None,
    then: Callable[["BenchReport"], object] = lambda report: None,
) -> int:
    """The body of every benchmark: parse, measure the limits, time each case, print and write.

    Args:
        dtypes: of the matrix products whose rate is measured.
        cases: makes the cases; an iterator, so that one case's models are gone before the next one's are
            made. What cannot be measured here is `Skipped`, with the reason.
        then: called with the report when it is printed and written.

    Returns:
        The exit code: 0, or 1 if an output was wrong or fused code did not run.
    """
    options = parser.parse_args(argv)
    if options.plot:
        _require_matplotlib()  # before the minutes of measuring, not after
    if options.threads:
        torch.set_num_threads(options.threads)
    where = machine(options.device)
    limit = limits(dtypes(options), options.device)
    results: list[Result] = []
    skipped: list[Skipped] = []
    try:
        for case in cases(options):
            if isinstance(case, Skipped):
                skipped.append(case)
            else:
                results += measure(case, limit, rounds=options.rounds, warmup=options.warmup)
    except OptionError as error:
        parser.error(str(error))
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "plot")}
    report = BenchReport(claim, where, limit, settings, tuple(results), skipped=tuple(skipped))
    report.print()
    if options.json:
        options.json.write_text(report.to_json())
    if options.plot and results:
        plot(report, options.plot)
    then(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    print(describe(machine(), limits([torch.float32, torch.bfloat16])))
