"""Which is faster on this machine for a linear over one row: the reduction of the pass, or the product.

Both are compiled by Inductor and timed in turns, once for a dtype and a number of threads, over weights that
come from memory. The answer lies beside Inductor's caches, where the next process finds it.
"""

import hashlib
import json
import logging
import platform
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

from fxfuse.passes import expert_rows, one_row_linears, pipeline
from fxfuse.passes.pipeline import Pass, Passes
from fxfuse.passes.program import Program
from fxfuse.runtime import inner

log = logging.getLogger("fxfuse")

WIDTH = 1024  # features of the linear that is timed
WEIGHT = 2**24  # bytes of its weight
COPIES = 8  # of the weight, read in turns: a cache has lost the first when the last was read
SMALL = 2**20  # bytes of a weight that the caches may hold: it is rewritten without being asked for
MARGIN = 1.1  # how many times as fast the product has to be, so that noise decides nothing
PAIRS, SECONDS = 25, 0.25  # timed at most, but never fewer than
FEWEST = 5
ASKING = {each.RULE: each.run for each in (one_row_linears, expert_rows)}
FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
FIELDS_OF_ARM = ("CPU implementer", "CPU part", "CPU variant", "CPU revision", "Features")


@dataclass(frozen=True)
class Speeds:
    """Milliseconds of a linear in both forms, medians, and the median of their ratio over pairs in turns."""

    reduction: float
    product: float
    ratio: float

    @property
    def product_is_faster(self) -> bool:
        return self.ratio > MARGIN


class Case(NamedTuple):
    """What may differ within a process."""

    dtype: torch.dtype
    threads: int
    precision: str

    @classmethod
    def now(cls, dtype: torch.dtype) -> "Case":
        return cls(dtype, torch.get_num_threads(), torch.get_float32_matmul_precision())


_lock = threading.RLock()
_answers: dict[Case, Callable[[], Speeds | None]] = {}


def asked_by(passes: Sequence[Pass], named: Passes, values: Iterable[Any]) -> tuple[Pass, ...]:
    """The passes, of which those of `ASKING` ask here first, unless the user has named them.

    Inductor writes at once what will be timed for the dtype of most parameters among the values, so that the
    C++ compiler works on it while the caller goes on.
    """
    by_name = [named] if isinstance(named, str) else named
    asking = [each for each in passes if each.run is ASKING.get(each.name) and each.name not in by_name]
    sizes: Counter[torch.dtype] = Counter()
    for value in values if any(each.name == one_row_linears.RULE for each in asking) else ():
        if isinstance(value, torch.nn.Parameter) and value.dim() in (2, 3) and _may_ask(value):
            sizes[value.dtype] += value.numel()
    if sizes and not torch.is_grad_enabled():  # where gradients are on, no product becomes a reduction
        with _lock:
            _answer(Case.now(sizes.most_common(1)[0][0]))
    return tuple(
        replace(each, run=partial(ASKING[each.name], stays=why_a_product)) if each in asking else each
        for each in passes
    )


def why_a_product(weight: torch.Tensor) -> str | None:
    """Why one row times this weight stays a product, None where it becomes a reduction.

    Measures where nothing is known of the dtype and the number of threads; so may take a second, once.
    """
    if not _may_ask(weight):
        return None
    case = Case.now(weight.dtype)
    with _lock:
        speeds = _answer(case)()
        _answers[case] = lambda: speeds
    if speeds is None or not speeds.product_is_faster:
        return None
    return (
        f"as a product it is faster on this machine: {speeds.product:.2f} ms against {speeds.reduction:.2f} "
        f"as a reduction, for {WEIGHT >> 20} MiB of {case.dtype} on {_cpu()['name']} with "
        f"{case.threads} thread{'s' if case.threads > 1 else ''}"
    )


def _may_ask(weight: torch.Tensor) -> bool:
    large = weight.numel() * weight.element_size() >= SMALL
    return (
        weight.device.type == "cpu"
        and weight.dtype in one_row_linears.DTYPES
        and statically_known_true(large)
    )


def _answer(case: Case) -> Callable[[], Speeds | None]:
    """What gives the speeds; what can be done for them beforehand has been begun."""
    if case not in _answers:
        try:
            with _undisturbed():
                _answers[case] = _found_or_begun(case)
        except Exception as error:
            _answers[case] = partial(_not_measured, error)
    return _answers[case]


def _not_measured(error: Exception) -> None:
    log.warning("linears over one row are rewritten without having been timed: %s", error)


def _found_or_begun(case: Case) -> Callable[[], Speeds | None]:
    forms, inputs = _both_forms(case.dtype)
    key = _key(case, forms)
    stored = _stored(key)
    if stored is not None:
        return lambda: stored
    begun = [inner.begun(form, inputs) for form in forms]

    def measured() -> Speeds | None:
        try:
            with _undisturbed():
                speeds = _timed(case.dtype, *(finished() for finished in begun))
        except Exception as error:
            _not_measured(error)
            return None
        log.info("a linear over one row of %s, in milliseconds: %s", case.dtype, speeds)
        _store(key, speeds)
        return speeds

    return measured


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without the modes of the caller, and apart from the graph that is being compiled."""
    with tracing(None), _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


def _both_forms(dtype: torch.dtype) -> tuple[list[GraphModule], list[torch.Tensor]]:
    """The linear as the other passes leave it and as `one_row_linears` does, and what both take, as fakes."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = torch.empty(1, WIDTH, dtype=dtype, device="cpu")
        weight = torch.empty(_rows(dtype), WIDTH, dtype=dtype, device="cpu")
        graph = make_fx(lambda x, weight: F.linear(x, weight), pre_dispatch=True)(x, weight)
    program = Program(graph, {}, mode)
    own = [each for each in pipeline.PASSES if each.run is one_row_linears.run]
    return [pipeline.apply(program, passes)[0].graph_module for passes in ([], own)], [x, weight]


def _rows(dtype: torch.dtype) -> int:
    return WEIGHT // (WIDTH * dtype.itemsize)


def _timed(dtype: torch.dtype, product: Callable[..., Any], reduction: Callable[..., Any]) -> Speeds:
    x = torch.ones(1, WIDTH, dtype=dtype, device="cpu")
    weights = torch.ones(COPIES, _rows(dtype), WIDTH, dtype=dtype, device="cpu")
    times: list[tuple[float, float]] = []
    until = time.perf_counter() + SECONDS
    while len(times) < FEWEST or (len(times) < PAIRS and time.perf_counter() < until):
        pair: dict[Callable[..., Any], float] = {}
        for call in (product, reduction) if len(times) % 2 else (reduction, product):
            weight = weights[(2 * len(times) + len(pair)) % COPIES]
            start = time.perf_counter()
            call(x, weight)
            pair[call] = (time.perf_counter() - start) * 1e3
        times.append((pair[reduction], pair[product]))
    del times[:2]  # the first calls load what the others use
    reductions, products = zip(*times, strict=True)
    return Speeds(
        statistics.median(reductions),
        statistics.median(products),
        statistics.median(mine / theirs for mine, theirs in times),
    )


def _key(case: Case, forms: Sequence[GraphModule]) -> dict[str, Any]:
    """All that the speeds depend on."""
    from torch._inductor import config, cpp_builder

    return {
        "dtype": str(case.dtype),
        "threads": case.threads,
        "precision": case.precision,
        "cpu": _cpu(),
        "vectors": [torch.backends.cpu.get_cpu_capability(), config.cpp.simdlen],
        "torch": [torch.__version__, torch.version.git_version],
        "compiler": cpp_builder.get_compiler_version_info(cpp_builder.get_cpp_compiler()),
        "weight": [WIDTH, WEIGHT, COPIES],
        "graphs": [form.code for form in forms],
    }


@cache
def _cpu() -> dict[str, str]:
    """Name and features of the CPU."""
    found = {"name": platform.processor() or platform.machine()}
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return found
    pairs = (line.partition(":") for line in lines)
    found |= {k.strip(): v.strip() for k, _, v in pairs if k.strip() in FIELDS + FIELDS_OF_ARM}
    return found | {"name": found.get("model name", found["name"])}


def _file(key: dict[str, Any]) -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return Path(cache_dir(), "fxfuse", f"one_row_{digest[:32]}.json")


def _stored(key: dict[str, Any]) -> Speeds | None:
    """What an earlier process has found; None where there is nothing, or nothing that can be read."""
    try:
        found = json.loads(_file(key).read_text())
        speeds = Speeds(**{name: float(value) for name, value in found["speeds"].items()})
        return speeds if found["key"] == key else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _store(key: dict[str, Any], speeds: Speeds) -> None:
    """Whole or not at all; where nothing can be written, the next process measures again."""
    try:
        path = _file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            whole.write_text(json.dumps({"key": key, "speeds": asdict(speeds)}))
            whole.replace(path)
    except OSError as error:
        log.debug("the speeds of a linear over one row could not be kept: %s", error)
