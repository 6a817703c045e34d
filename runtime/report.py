"""What was rewritten, what was not and why, and what it costs."""

from __future__ import annotations

import json
import logging
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from weakref import WeakSet

from rich.console import Console
from rich.table import Table
from torch import nn

from fxfuse.errors import OptionError
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.pipeline import PASSES
from fxfuse.runtime.grouped_names import grouped, grouped_as, pattern_of
from fxfuse.runtime.launches import Block
from fxfuse.runtime.measure import Measurement, measure
from fxfuse.runtime.pictures import Picture

log = logging.getLogger("fxfuse")

# Graphs that a summary lists one by one.
MOST_GRAPHS = 8
NOTHING_RAN = "no rewritten graph was called yet, and no weight of the model was moved"
NOTHING_LEFT = "nothing that any pass could have matched"


@dataclass
class GraphRecord:
    """One compiled graph: which phase it serves, its size before and after, seconds spent, and its calls."""

    phase: str
    nodes_before: int
    nodes_after: int
    inner: str
    outcomes: dict[str, Outcome]
    plan_digest: str = ""
    compile_seconds: float = 0.0
    calls: int = 0
    packs: int = 0
    pictures: list[Picture] = field(default_factory=list, repr=False)
    launches: list[Block] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        parts = [
            f"{name} {len(o.matches)} of {o.candidates}" for name, o in self.outcomes.items() if o.candidates
        ]
        return f"{self.phase} graph in {self.compile_seconds:.1f} s: {', '.join(parts)}"


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule, where it was applied (layers grouped), and how often."""

    rule: str
    where: str
    detail: str
    phase: str
    matched: int
    candidates: int


def versions() -> dict[str, str]:
    """Versions of what the rewrite depends on."""
    found = {"python": platform.python_version()}
    return found | {name: _version(name) for name in ("fxfuse", "torch", "triton", "transformers")}


@cache
def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclass
class Report:
    """The record of a model's graphs; grows while the model meets new shapes.

    Attributes:
        graphs: one record for each compiled graph, in the order of compilation.
        notes: what the user should know, in words.
        packed_bytes, copied_bytes: what parameters share with fused weights, and what copies take on top.
        failures: graphs that run as they were because compiling them failed.
        measurements: what `benchmark` has found.
        model: gives the optimised model, None where it is gone or there never was one.
    """

    graphs: list[GraphRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    packed_bytes: int = 0
    copied_bytes: int = 0
    versions: dict[str, str] = field(default_factory=versions)
    failures: int = 0
    measurements: list[Measurement] = field(default_factory=list)
    model: Callable[[], nn.Module | None] = field(default=lambda: None, repr=False, compare=False)
    _copies: WeakSet[Any] = field(default_factory=WeakSet, repr=False, compare=False)

    def count_copies(self, copies: Iterable[Any]) -> None:
        """Add copies that a graph reads: one that several read counts once, one that is gone not at all."""
        self._copies.update(copies)
        self.copied_bytes = sum(copy.nbytes for copy in self._copies)

    @property
    def calls(self) -> int:
        """How often a compiled graph of ours ran."""
        return sum(graph.calls for graph in self.graphs)

    @property
    def matched(self) -> int:
        return sum(row.matched for row in self.rows)

    @property
    def misses(self) -> list[Miss]:
        """Every candidate left alone, once for each graph it was met in."""
        return [m for graph in self.graphs for outcome in graph.outcomes.values() for m in outcome.misses]

    @property
    def rows(self) -> list[Row]:
        """Matches and candidates by rule, place and phase; places that differ in a number alone are one."""
        places: dict[tuple[str, str, str, str], dict[str, set[str]]] = defaultdict(
            lambda: {"matched": set(), "missed": set()}
        )
        for graph in self.graphs:
            for outcome in graph.outcomes.values():
                for m in outcome.matches:
                    places[m.rule, pattern_of(m.where), m.detail, graph.phase]["matched"].add(m.where)
                for miss in outcome.misses:
                    places[miss.rule, pattern_of(miss.where), "left alone", graph.phase]["missed"].add(
                        miss.where
                    )
        return [
            Row(
                rule,
                grouped_as(pattern, found["matched"] | found["missed"]),
                detail,
                phase,
                len(found["matched"]),
                len(found["matched"] | found["missed"]),
            )
            for (rule, pattern, detail, phase), found in places.items()
        ]

    def benchmark(self, inputs: Mapping[str, Any], *, rounds: int = 7) -> Measurement:
        """Measure one call of the model as it was and optimised, in turns; kept in the report.

        Args:
            inputs: keyword arguments of the call, such as `{"input_ids": ids}`, copied for each call.
            rounds: how many times each of the two is timed.

        Raises OptionError where the model is no longer optimised, `rounds` is less than 1 or inputs have no
        names, and UnsupportedModelError where no compiled graph runs for these inputs.
        """
        model = self.model()
        if model is None or getattr(model, "_compiled_call_impl", None) is None:
            raise OptionError(
                "this report has no optimised model to measure: call model.optimize(), then "
                "model.optimization_report.benchmark(inputs)"
            )
        found = measure(model, inputs, lambda: self.calls, rounds)
        self.measurements.append(found)
        return found

    def note(self, text: str) -> bool:
        """Record a note; False where it was there already."""
        if text in self.notes:
            return False
        self.notes.append(text)
        return True

    def warn(self, text: str) -> None:
        """Record a note, and log it as a warning the first time."""
        if self.note(text):
            log.warning("%s", text)

    def to_dict(self) -> dict[str, Any]:
        return {
            "versions": self.versions,
            "rows": [asdict(row) for row in self.rows],
            "misses": [asdict(miss) for miss in self.misses],
            "graphs": [
                {k: v for k, v in vars(graph).items() if k not in ("outcomes", "pictures", "launches")}
                | ({"launches": [asdict(block) for block in graph.launches]} if graph.launches else {})
                for graph in self.graphs
            ],
            "packed_bytes": self.packed_bytes,
            "copied_bytes": self.copied_bytes,
            "calls": self.calls,
            "measurements": [{**asdict(m), "ratio": m.ratio} for m in self.measurements],
            "notes": self.notes,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page: the table, and each kind of block before and after, drawn."""
        from fxfuse.runtime.html import page

        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path

    def __str__(self) -> str:
        console = Console(width=120, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        if not self.graphs:
            yield "fxfuse: no graph yet: capture, match and packing happen at the first call"
        else:
            yield self.table()
            yield self._summary()
        for graph in self.graphs:
            if graph.launches:
                yield f"  kernels of the {graph.phase} graph:"
                yield from (f"  {line}" for block in graph.launches for line in str(block).splitlines())
        reasons = self.reasons()
        for reason, places in reasons.items():
            yield f"  left alone: {', '.join(places)}: {reason}"
        if self.graphs and not reasons:
            yield f"left alone: {NOTHING_LEFT}"
        for measured in self.measurements:
            yield f"  measured: {measured}"
        for note in self.notes:
            yield f"  note: {note}"

    def reasons(self) -> dict[str, list[str]]:
        """Where each reason for a miss holds, layers grouped; "its weight" stands for a miss's own one."""
        found: dict[str, list[str]] = defaultdict(list)
        for miss in self.misses:
            reason = miss.reason.replace(f"{miss.where}.weight", "its weight") if miss.where else miss.reason
            found[reason].append(miss.where)
        return {reason: grouped(places) for reason, places in found.items()}

    def lines(self) -> list[tuple[tuple[str, str, str], dict[str, str], bool]]:
        """The table: rule, place and detail; "matched of candidates" by phase; whether anything matched."""
        counts: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
        matched: dict[tuple[str, str, str], int] = defaultdict(int)
        for row in self.rows:
            key = row.rule, row.where or "the whole graph", row.detail
            counts[key][row.phase] = f"{row.matched} of {row.candidates}"
            matched[key] += row.matched
        return [
            (key, counts[key], matched[key] > 0) for key in sorted(counts, key=lambda key: _order(key[0]))
        ]

    def table(self) -> Table:
        """The lines as a table of rich."""
        phases = list(dict.fromkeys(row.phase for row in self.rows))
        table = Table(title="fxfuse", title_justify="left")
        for heading in ("rule", "where", "what"):
            table.add_column(heading, overflow="fold")
        for phase in phases:
            table.add_column(phase, justify="right", no_wrap=True)
        for cells, counts, _ in self.lines():
            table.add_row(*cells, *(counts.get(phase, "") for phase in phases))
        return table

    def graph_totals(self) -> list[tuple[str, GraphRecord]]:
        """What to call each graph, and the graph; where breaks made many of them, the sums of each phase."""
        if len(self.graphs) <= MOST_GRAPHS:
            return [(graph.phase, graph) for graph in self.graphs]
        kinds: dict[tuple[str, str], list[GraphRecord]] = defaultdict(list)
        for graph in self.graphs:
            kinds[graph.phase, graph.inner].append(graph)
        return [
            (
                f"{phase}, {len(graphs)} graphs",
                GraphRecord(
                    phase,
                    sum(g.nodes_before for g in graphs),
                    sum(g.nodes_after for g in graphs),
                    inner,
                    {},
                    compile_seconds=sum(g.compile_seconds for g in graphs),
                    calls=sum(g.calls for g in graphs),
                ),
            )
            for (phase, inner), graphs in kinds.items()
        ]

    def _summary(self) -> str:
        graphs = "; ".join(
            f"{name} {g.nodes_before} → {g.nodes_after} nodes"
            + (f" in {g.compile_seconds:.1f} s" if g.compile_seconds else "")
            for name, g in self.graph_totals()
        )
        used = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        memory = (
            f"memory: {self.packed_bytes / 1e6:.1f} MB of weights shared with fused ones, "
            f"{self.copied_bytes / 1e6:.1f} MB copied; calls of compiled graphs: {self.calls}"
        )
        return f"graphs: {graphs}\n{memory if self.calls else NOTHING_RAN}\nversions: {used}"


def announce(record: GraphRecord, show: str) -> None:
    """Say that a graph was compiled: a table where somebody watches a terminal, one log line elsewhere."""
    if show == "auto" and sys.stderr.isatty():
        console = Console(stderr=True)
        console.print(Report([record]).table(), str(record), sep="\n")
    elif show != "off":
        log.info("%s", record)


def _order(rule: str) -> int:
    """The place of a rule in the pipeline; one that is not there comes last."""
    names = [p.name for p in PASSES]
    return names.index(rule) if rule in names else len(names)


__all__ = ["GraphRecord", "Match", "Miss", "Report", "Row", "announce"]
