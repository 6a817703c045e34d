"""The property suites with large numbers, and any example of them again.

    python tests/properties/nightly.py run                          everything; summary in docs/nightly.md
    python tests/properties/nightly.py run near_misses --count 500 --first 1000 --minutes 10
    python tests/properties/nightly.py replay near_misses 1234
    python tests/properties/nightly.py replay spellings 1234 --block projections
    python tests/properties/nightly.py table                        the summary anew, from the results at hand

Seeds count up from `--first`: the same seeds are the same graphs. A run that is out of time stops after the
example at hand, and says how many it did.
"""

import argparse
import json
import logging
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

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
COUNTS = {"spellings": 10_000, "near_misses": 100_000, "whole_graphs": 5_000}


@dataclass
class Result:
    """What one suite did."""

    suite: str
    first: int
    asked: int
    done: int = 0
    seconds: float = 0.0
    ended: str = ""
    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def _spellings(result: Result, deadline: float) -> None:
    """`asked` spellings, shared evenly among the blocks whose pass ships."""
    names = spelled_blocks.SHIPPED
    shares = {name: spelled_blocks.Share(name, BLOCKS[name].rule) for name in names}
    for number in range(result.asked):
        if time.monotonic() > deadline:
            break
        name, seed = names[number % len(names)], result.first + number // len(names)
        one = spelled_blocks.measure(BLOCKS[name], range(seed, seed + 1))
        share = shares[name]
        share.drawn, share.matched = share.drawn + one.drawn, share.matched + one.matched
        share.missed += one.missed
        share.reasons += one.reasons
        result.done += 1
    result.lines = spelled_blocks.table(list(shares.values())).splitlines()
    result.wrong = [
        f"{s.block}: {s.share:.2%} of spellings matched, fewer than 99 %: {s.reasons.most_common(3)}\n"
        f"    python tests/properties/nightly.py replay spellings {s.missed[0]} --block {s.block}"
        for s in shares.values()
        if s.drawn and s.share < 0.99
    ]


def _near_misses(result: Result, deadline: float) -> None:
    tally = near_misses.Tally()
    for seed in range(result.first, result.first + result.asked):
        if time.monotonic() > deadline:
            break
        near_misses.judge(seed, tally)
        result.done += 1
    traced = tally.graphs - tally.through_dynamo
    result.lines = [
        f"{tally.graphs:,} graphs, {tally.through_dynamo:,} of them through Dynamo; of the other {traced:,}, "
        f"{tally.still_matched:,} still matched something; {len(tally.wrong)} wrong.",
        "",
        f"Passes undone by an error: {len(tally.undone)}.",
        "",
        "| change | graphs |",
        "|---|---|",
        *(f"| {kind} | {tally.kinds[kind]:,} |" for kind in CHANGES),
        "",
        "| mutants of | graphs | still matched (of those not through Dynamo) |",
        "|---|---|---|",
        *(f"| {name} | {count:,} | {tally.matched[name]:,} |" for name, count in tally.blocks.items()),
    ]
    result.wrong = [*tally.wrong, *tally.undone]


def _whole_graphs(result: Result, deadline: float) -> None:
    tally = whole_graphs.Tally()
    for seed in range(result.first, result.first + result.asked):
        if time.monotonic() > deadline:
            break
        whole_graphs.judge(seed, tally)
        result.done += 1
    matched = ", ".join(f"{rule} {count:,}" for rule, count in tally.matched.most_common())
    result.lines = [
        f"{tally.programs:,} programs; matched: {matched or 'nothing'}; {len(tally.wrong)} wrong."
    ]
    result.wrong = tally.wrong


SUITES = {"spellings": _spellings, "near_misses": _near_misses, "whole_graphs": _whole_graphs}


def run(suite: str, first: int, count: int, minutes: float) -> Result:
    result = Result(suite, first, count)
    started = time.monotonic()
    SUITES[suite](result, started + minutes * 60)
    result.seconds = round(time.monotonic() - started, 1)
    result.ended = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return result


def summary(results: list[Result]) -> str:
    lines = [
        "# Nightly numbers",
        "",
        "The property suites with large numbers, written by `make test-nightly`. A seed is the same graph",
        "everywhere: `python tests/properties/nightly.py replay SUITE SEED` shows one.",
        "",
        f"fxfuse {fxfuse.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}.",
    ]
    for result in results:
        short = "" if result.done == result.asked else f" of {result.asked:,} asked for, out of time"
        lines += [
            "",
            f"## {result.suite}",
            "",
            f"{result.done:,} examples{short}, seeds from {result.first}, {result.seconds / 60:.1f} minutes, "
            f"ended {result.ended}.",
            "",
            *result.lines,
        ]
        lines += ["", "Wrong:", "", "```", *result.wrong[:20], "```"] if result.wrong else []
    return "\n".join(lines) + "\n"


def with_notes(numbers: str, before: str) -> str:
    """The new numbers, and below them what somebody wrote under the heading of notes."""
    _, heading, notes = before.partition(NOTES)
    return numbers + heading + notes


def _write_table() -> None:
    files = [RESULTS / f"{suite}.json" for suite in SUITES]
    numbers = summary([Result(**json.loads(f.read_text())) for f in files if f.exists()])
    SUMMARY.write_text(with_notes(numbers, SUMMARY.read_text() if SUMMARY.exists() else ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run suites")
    running.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all of them without one")
    running.add_argument("--count", type=int, help="examples of each suite")
    running.add_argument("--first", type=int, default=0, help="the first seed")
    running.add_argument("--minutes", type=float, default=600.0, help="for each suite")
    again = commands.add_parser("replay", help="show one example again")
    again.add_argument("suite", choices=SUITES)
    again.add_argument("seed", type=int)
    again.add_argument("--block", default="projections", choices=BLOCKS)
    commands.add_parser("table", help="write the summary from the results at hand")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("fxfuse").setLevel(logging.CRITICAL)
    if arguments.command == "replay":
        suites = {"near_misses": near_misses.replay, "whole_graphs": whole_graphs.replay}
        if arguments.suite == "spellings":
            print(spelled_blocks.replay(arguments.block, arguments.seed))
        else:
            print(suites[arguments.suite](arguments.seed))
        return 0
    wrong: Counter[str] = Counter()
    if arguments.command == "run":
        RESULTS.mkdir(parents=True, exist_ok=True)
        for suite in arguments.suites or SUITES:
            result = run(suite, arguments.first, arguments.count or COUNTS[suite], arguments.minutes)
            (RESULTS / f"{suite}.json").write_text(json.dumps(asdict(result), indent=1))
            print("\n".join([f"{suite}: {result.done} in {result.seconds} s", *result.lines, *result.wrong]))
            wrong[suite] = len(result.wrong)
    _write_table()
    return int(wrong.total() > 0)


if __name__ == "__main__":
    sys.exit(main())
