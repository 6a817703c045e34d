"""Memory and time of packing, and of the whole first call; each sample is a process of its own.

Packing by itself stands beside a fused copy of the same weights, which is what merging costs elsewhere; the
first call of an optimised model, with capture and compiling, beside that of the model as it is. The figures
are what a process held more than before: at the peak, and afterwards.
"""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from generation import prompt
from harness import Case, Peer, run, synchronize
from models import Contender, Model, build, case_of, model_arguments, right, title
from prefill import last_logits
from processes import held_bytes, in_process, main_or_child, peak_bytes, reset_peak

import fxfuse
from fxfuse.runtime.live_weights import SharedSlot, is_packed

Work = Callable[[Model, argparse.Namespace], Any]


def groups_of(model: Model) -> list[list[torch.nn.Parameter]]:
    """The parameters that the plan lays together."""
    parameters = dict(model.named_parameters())
    return [[parameters[name] for name in t.sources] for t in fxfuse.plan(model).transforms]


def _copy(model: Model, options: argparse.Namespace) -> Any:
    return [torch.cat([p.detach() for p in group]) for group in groups_of(model)]


def _pack(model: Model, options: argparse.Namespace) -> Any:
    groups = groups_of(model)
    for group in groups:
        SharedSlot().fill(group)
    return groups


def _first_call(model: Model, options: argparse.Namespace) -> Any:
    return last_logits(Contender("", model), 1)(prompt(model, options.batch, options.prompt))


def _first_optimized_call(model: Model, options: argparse.Namespace) -> Any:
    fxfuse.optimize(model, inner=options.inner, mode=options.mode, report="off")
    return _first_call(model, options)


PACKING: dict[str, Work] = {"fused copy": _copy, "fxfuse packing": _pack}
CALLS: dict[str, Work] = {"eager": _first_call, "fxfuse": _first_optimized_call}


def child(options: argparse.Namespace) -> dict[str, Any]:
    """One way, once: seconds, memory, whether fused code ran and the weights or outputs are right."""
    model, way = build(options), options.way
    fxfuse.plan(model)  # what is imported is not counted
    weights = _digest(model)
    before, start = reset_peak(options.device), time.perf_counter()
    kept = {**PACKING, **CALLS}[way](model, options)
    synchronize(options.device)
    seconds = time.perf_counter() - start
    found: dict[str, Any] = {
        "seconds": seconds,
        "peak": peak_bytes(options.device) - before,
        "held": held_bytes(options.device) - before,
        "right": _digest(model) == weights,
        "fused": 0,
    }
    if way == "fxfuse packing":
        found["fused"] = sum(all(map(is_packed, group)) for group in kept)
    if way == "fxfuse":
        plain, ours = Contender("eager", model), Contender("fxfuse", model, ours=True)
        found["fused"] = ours.calls()
        plain = Contender("eager", build(options))  # the same weights, drawn from the same seed
        ids = prompt(model, options.batch, options.prompt)
        found["right"] &= right(plain, ours, lambda each: last_logits(each, 1), ids)
    return found


def _digest(model: Model) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Packing, and the first call."""
    shapes = build(options, device="meta")
    weights = sum(p.nbytes for p in shapes.parameters())
    merged = sum(p.nbytes for group in groups_of(shapes) for p in group)

    def peer(way: str) -> Peer:
        rows: list[dict[str, Any]] = []

        def sample() -> float:
            rows.append(in_process(__file__, options, way=way))
            return float(rows[-1]["seconds"])

        def figures() -> dict[str, float]:
            peak, held = (statistics.median(row[key] for row in rows) for key in ("peak", "held"))
            return {"weights MB": weights / 1e6, "peak MB": peak / 1e6, "held MB": held / 1e6}

        calls = (lambda: sum(row["fused"] for row in rows)) if "fxfuse" in way else None
        return Peer(way, sample, lambda: all(row["right"] for row in rows), calls, figures)

    for name, ways, read in (("packing", PACKING, 2 * merged), ("first call", CALLS, weights)):
        compared = [Contender(way, shapes, ours="fxfuse" in way) for way in ways]
        case = title(options, shapes, f"{name} ({merged / 1e6:.0f} MB to merge)")
        yield case_of(case, compared, [peer(way) for way in ways], unit=name, bytes=read)


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__, rounds=3, warmup=1)
    options.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default 64)")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("memory of packing and of the first call", parser(), lambda options: [], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main_or_child(main, child))
