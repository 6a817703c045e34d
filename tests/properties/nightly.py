"""The property suites with large numbers, and any example of them again.

    python tests/properties/nightly.py run --jobs 4                 everything; summary in docs/nightly.md
    python tests/properties/nightly.py run near_misses --count 500 --first 1000 --minutes 10
    python tests/properties/nightly.py replay near_misses 1234
    python tests/properties/nightly.py replay spellings 1234 --block projections
    python tests/properties/nightly.py table                        the summary anew, from the results at hand

Seeds count up from `--first`: the same seeds are the same graphs. Each of `--jobs` processes has a share in a
row. A run that is out of time stops after the example at hand, and says how many it did; what it knows is
written down every half minute, and `--resume` goes on from there.
"""

import argparse
import json
import logging
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import reduce
from itertools import pairwise
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import gradients
import near_misses
import spelled_blocks
import torch
import transformers
import whole_graphs

import fxfuse
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.mutants import CHANGES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".cache" / "nightly"
SUMMARY = ROOT / "docs" / "nightly.md"
# Below it nothing is written anew.
NOTES = "\n## Notes\n"
COUNTS = {"spellings": 10_000, "near_misses": 100_000, "whole_graphs": 5_000, "gradients": 2_000}


# Seconds between two writings of what is known so far.
EVERY = 30.0


@dataclass
class Result:
    """What one process did of a suite, from the example `start` on; `tally` is all that it takes to go on."""

    suite: str
    first: int
    start: int
    asked: int
    done: int = 0
    seconds: float = 0.0
    ended: str = ""
    tally: dict[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.suite}-{self.start}.json"

    def keep(self) -> None:
        self.ended = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        RESULTS.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".part")
        fresh.write_text(json.dumps(asdict(self), indent=1))
        fresh.replace(self.file)


def _plain(counted: Any) -> dict[str, Any]:
    return {name: dict(v) if isinstance(v, Counter) else v for name, v in vars(counted).items()}


def _loaded(kind: Any, plain: dict[str, Any]) -> Any:
    return kind(**{name: Counter(v) if isinstance(v, dict) else v for name, v in plain.items()})


class Spellings:
    """Spellings shared evenly among the blocks whose pass ships."""

    def __init__(self, tally: dict[str, Any]) -> None:
        self.shares = {
            name: _loaded(spelled_blocks.Share, tally.get(name, {"block": name, "rule": BLOCKS[name].rule}))
            for name in spelled_blocks.SHIPPED
        }

    def step(self, first: int, number: int) -> None:
        names = spelled_blocks.SHIPPED
        name, seed = names[number % len(names)], first + number // len(names)
        one, share = spelled_blocks.measure(BLOCKS[name], range(seed, seed + 1)), self.shares[name]
        share.drawn, share.matched = share.drawn + one.drawn, share.matched + one.matched
        share.missed += one.missed
        share.reasons += one.reasons

    def tally(self) -> dict[str, Any]:
        return {name: _plain(share) for name, share in self.shares.items()}

    def lines(self) -> list[str]:
        return spelled_blocks.table(list(self.shares.values())).splitlines()

    def wrong(self) -> list[str]:
        return [
            f"{s.block}: {s.share:.2%} of spellings matched, fewer than 99 %: {s.reasons.most_common(3)}\n"
            f"    python tests/properties/nightly.py replay spellings {s.missed[0]} --block {s.block}"
            for s in self.shares.values()
            if s.drawn and s.share < 0.99
        ]


class NearMisses:
    def __init__(self, tally: dict[str, Any]) -> None:
        self.known = _loaded(near_misses.Tally, tally)

    def step(self, first: int, number: int) -> None:
        near_misses.judge(first + number, self.known)

    def tally(self) -> dict[str, Any]:
        return _plain(self.known)

    def lines(self) -> list[str]:
        tally = self.known
        roads = {road: tally.roads[road] for road in ("dynamo", "rewrite", "traced")}
        return [
            f"{tally.graphs:,} graphs: {roads['dynamo']:,} through Dynamo, {roads['rewrite']:,} through "
            f"rewrite(), {roads['traced']:,} made of a traced graph. {tally.still_matched:,} of the latter "
            f"two still matched something. {len(tally.wrong)} wrong.",
            "",
            f"Passes undone by an error: {len(tally.undone)}. Seeds of which no mutant could be drawn: "
            f"{len(tally.undrawn)}.",
            "",
            "| change | graphs |",
            "|---|---|",
            *(f"| {kind} | {tally.kinds[kind]:,} |" for kind in CHANGES),
            "",
            "| mutants of | graphs | still matched (of those not through Dynamo) |",
            "|---|---|---|",
            *(f"| {name} | {count:,} | {tally.matched[name]:,} |" for name, count in tally.blocks.items()),
        ]

    def wrong(self) -> list[str]:
        return [*self.known.wrong, *self.known.undone]


class WholeGraphs:
    def __init__(self, tally: dict[str, Any]) -> None:
        self.known = _loaded(whole_graphs.Tally, tally)

    def step(self, first: int, number: int) -> None:
        whole_graphs.judge(first + number, self.known)

    def tally(self) -> dict[str, Any]:
        return _plain(self.known)

    def lines(self) -> list[str]:
        matched = ", ".join(f"{rule} {count:,}" for rule, count in self.known.matched.most_common())
        programs, wrong = self.known.programs, len(self.known.wrong)
        return [f"{programs:,} programs; matched: {matched or 'nothing'}; {wrong} wrong."]

    def wrong(self) -> list[str]:
        return self.known.wrong


class Gradients:
    def __init__(self, tally: dict[str, Any]) -> None:
        self.known = _loaded(gradients.Tally, tally)

    def step(self, first: int, number: int) -> None:
        gradients.judge(first + number, self.known)

    def tally(self) -> dict[str, Any]:
        return _plain(self.known)

    def lines(self) -> list[str]:
        known = self.known
        return [
            f"{known.graphs:,} graphs and their gradients, {known.rewritten:,} of them rewritten; "
            f"{known.untrainable:,} more cannot be differentiated as they are. {len(known.wrong)} wrong, "
            f"{len(known.undone)} undone."
        ]

    def wrong(self) -> list[str]:
        return [*self.known.wrong, *self.known.undone]


Suite = Spellings | NearMisses | WholeGraphs | Gradients
SUITES: dict[str, Any] = {
    "spellings": Spellings,
    "near_misses": NearMisses,
    "whole_graphs": WholeGraphs,
    "gradients": Gradients,
}


def run(asked: Result, minutes: float, resume: bool = False) -> None:
    """One process's share of a suite, or what an earlier run has left of it."""
    result = asked
    if resume and asked.file.exists():
        earlier = Result(**json.loads(asked.file.read_text()))
        if earlier.first == asked.first:
            result = replace(earlier, asked=asked.asked)
    counted, before = SUITES[result.suite](result.tally), result.seconds
    started = written = time.monotonic()
    parent = parent_process()  # a share whose run was stopped ends, and leaves its file to the next
    while result.done < result.asked and time.monotonic() < started + minutes * 60:
        if parent is not None and not parent.is_alive():
            return
        counted.step(result.first, result.start + result.done)
        result.done += 1
        last = result.done == result.asked or time.monotonic() > started + minutes * 60
        if last or time.monotonic() > written + EVERY:
            written = time.monotonic()
            result.seconds, result.tally = round(before + written - started, 1), counted.tally()
            result.keep()


def run_shares(suite: str, first: int, count: int, jobs: int, minutes: float, resume: bool) -> None:
    """The examples of a suite, each of the processes a share of them in a row."""
    bounds = [count * job // jobs for job in range(jobs + 1)]
    shares = [Result(suite, first, a, b - a) for a, b in pairwise(bounds)]
    known = results_of(suite)
    if resume and known and [(r.start, r.asked) for r in known] != [(s.start, s.asked) for s in shares]:
        raise SystemExit(f"{suite}: --resume goes on with the --count and --jobs of the run that it resumes")
    for result in known if not resume else ():
        result.file.unlink()
    if jobs == 1:
        run(shares[0], minutes, resume)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_quietly) as pool:
        for done in [pool.submit(run, share, minutes, resume) for share in shares]:
            done.result()


def _quietly() -> None:
    torch.set_num_threads(1)
    logging.getLogger("fxfuse").setLevel(logging.CRITICAL)


def results_of(suite: str) -> list[Result]:
    """What is known of a suite, in the order of its examples."""
    found = [Result(**json.loads(file.read_text())) for file in RESULTS.glob(f"{suite}-*.json")]
    return sorted(found, key=lambda result: result.start)


def _added(a: Any, b: Any) -> Any:
    """Two tallies as one: counts and lists of the same name together."""
    if isinstance(a, dict):
        return {key: _added(a[key], b[key]) if key in a and key in b else (a | b)[key] for key in a | b}
    return a if isinstance(a, str) else a + b


def counted(results: list[Result]) -> Suite:
    """All processes' shares of one suite together."""
    made: Suite = SUITES[results[0].suite](reduce(_added, (result.tally for result in results)))
    return made


def summary(suites: list[list[Result]]) -> str:
    lines = [
        "# Nightly numbers",
        "",
        "The property suites with large numbers, written by `make test-nightly`. A seed is the same graph",
        "everywhere: `python tests/properties/nightly.py replay SUITE SEED` shows one.",
        "",
        f"fxfuse {fxfuse.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}.",
    ]
    for results in suites:
        asked, done, seconds = (sum(getattr(r, of) for r in results) for of in ("asked", "done", "seconds"))
        parts = ", ".join(f"{r.start:,} to {r.start + r.done - 1:,}" for r in results)
        short = "" if done == asked else f" of {asked:,} asked for, out of time (the examples {parts})"
        all_of_it = counted(results)
        lines += [
            "",
            f"## {results[0].suite}",
            "",
            f"{done:,} examples{short}, seeds from {results[0].first}, {seconds / 60:.1f} minutes of a core, "
            f"ended {max(r.ended for r in results)}.",
            "",
            *all_of_it.lines(),
        ]
        if all_of_it.wrong():
            lines += ["", "Wrong:", "", "```", *all_of_it.wrong()[:20], "```"]
    return "\n".join(lines) + "\n"


def with_notes(numbers: str, before: str) -> str:
    """The new numbers, and below them what somebody wrote under the heading of notes."""
    _, heading, notes = before.partition(NOTES)
    return numbers + heading + notes


def _write_table() -> None:
    numbers = summary([results for suite in SUITES if (results := results_of(suite))])
    SUMMARY.write_text(with_notes(numbers, SUMMARY.read_text() if SUMMARY.exists() else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run suites")
    running.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all of them without one")
    running.add_argument("--count", type=int, help="examples of each suite")
    running.add_argument("--first", type=int, default=0, help="the first seed")
    running.add_argument("--minutes", type=float, default=600.0, help="for each suite")
    running.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    running.add_argument("--resume", action="store_true", help="go on where a run from that seed ended")
    again = commands.add_parser("replay", help="show one example again")
    again.add_argument("suite", choices=SUITES)
    again.add_argument("seed", type=int)
    again.add_argument("--block", default="projections", choices=BLOCKS)
    commands.add_parser("table", help="write the summary from the results at hand")
    arguments = parser.parse_args()
    _quietly()
    if arguments.command == "replay":
        suites = {
            "near_misses": near_misses.replay,
            "whole_graphs": whole_graphs.replay,
            "gradients": gradients.replay,
        }
        if arguments.suite == "spellings":
            print(spelled_blocks.replay(arguments.block, arguments.seed))
        else:
            print(suites[arguments.suite](arguments.seed))
        return 0
    wrong = 0
    if arguments.command == "run":
        for suite in arguments.suites or SUITES:
            count = arguments.count or COUNTS[suite]
            run_shares(suite, arguments.first, count, arguments.jobs, arguments.minutes, arguments.resume)
            found = counted(results_of(suite))
            print("\n".join([f"{suite}:", *found.lines(), *found.wrong()]))
            wrong += len(found.wrong())
    _write_table()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
