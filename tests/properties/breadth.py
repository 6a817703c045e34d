"""Every causal language model of transformers, tiny and random, through optimize().

    python tests/properties/breadth.py                     all of them, table in docs/breadth.md
    python tests/properties/breadth.py --only llama gpt2   some, printed, and their rows anew
    python tests/properties/breadth.py --table             the table anew, from the results at hand

A type counts as built if a small config of it is known (`tiny_models`) and the plain model answers. The
optimised model must answer, too, and pass the reference oracle.
"""

import argparse
import copy
import json
import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import WHY_NOT, prepared
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fxfuse
from fxfuse.passes.pipeline import Passes
from fxfuse.runtime.optimize import optimization_report
from fxfuse.testing import assert_equivalent

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".cache" / "breadth.jsonl"
TABLE = ROOT / "docs" / "breadth.md"
SECONDS = 240


def examine(model_type: str, passes: Passes = "default") -> dict[str, Any]:
    """One row of the table: what became of the class."""
    row: dict[str, Any] = {"model_type": model_type}
    try:
        model, inputs = prepared(model_type)
    except Exception as error:
        return row | {"state": "not built", "detail": WHY_NOT.get(model_type, _line(error))}
    row["class"] = type(model).__name__
    plain = copy.deepcopy(model)
    try:
        torch.manual_seed(0)
        fxfuse.optimize(model, inner="eager", passes=passes, report="off")
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return row | {"state": "crash", "detail": _line(error)}
    report: Any = optimization_report(model)
    graphs = report.graphs
    row["matches"] = Counter(
        match.rule for graph in graphs for outcome in graph.outcomes.values() for match in outcome.matches
    )
    row["misses"] = Counter(
        miss.reason for graph in graphs for outcome in graph.outcomes.values() for miss in outcome.misses
    )
    row["graphs"], row["failures"], row["notes"] = len(graphs), report.failures, list(report.notes)
    try:
        assert_equivalent(plain, model, inputs, logits=("logits",))
    except fxfuse.VerificationError as error:
        if "does not run in" in str(error) or "when asked for" in str(error):
            return _without_wide_run(row, plain, model, inputs)
        return row | {"state": "wrong", "detail": str(error)[:2000]}
    except Exception as error:
        return row | {"state": "not compared", "detail": _line(error)}
    return row | {"state": "right", "detail": "reference oracle"}


def _without_wide_run(row: dict[str, Any], plain: nn.Module, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Models that do not run in float64 are compared with their own fp32 answer."""
    with torch.no_grad():
        expected, got = plain(**inputs).logits, model(**inputs).logits
    error = (expected - got).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt().clamp_min(1e-12)
    state = "right" if error < 1e-5 else "wrong"
    return row | {"state": state, "detail": f"fp32 only: relative RMS difference {float(error):.1e}"}


def _line(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def isolated(model_type: str, passes: Passes = "default") -> dict[str, Any]:
    """`examine` in a process of its own, within SECONDS."""
    read, write = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(SECONDS)
        row = examine(model_type, passes)
        os.write(write, json.dumps(row).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    seconds = round(time.perf_counter() - started, 1)
    if text:
        return json.loads(text) | {"seconds": seconds}
    slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    state, detail = ("too slow", f"over {SECONDS} s") if slow else ("crash", f"process status {status}")
    return {"model_type": model_type, "state": state, "detail": detail, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    states = Counter(row["state"] for row in rows)
    merged = sum(1 for row in rows if row.get("matches"))
    seconds = sum(row["seconds"] for row in rows)
    lines = [
        "# Breadth: every causal language model of transformers",
        "",
        'Each class of `AutoModelForCausalLM` as a tiny random model through `optimize(inner="eager")`,',
        "held to the reference oracle on two prompts. Written by `python tests/properties/breadth.py`.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, fxfuse {fxfuse.__version__}: "
        f"{len(rows)} model types in {seconds / 60:.0f} minutes. "
        + ", ".join(f"{count} {state}" for state, count in states.most_common())
        + f"; {merged} have matches.",
        "",
        "| model type | class | state | matches | graphs | detail |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["model_type"]):
        matches = ", ".join(f"{rule} {count}" for rule, count in row.get("matches", {}).items())
        detail = "" if row["state"] == "right" else row["detail"].replace("|", "/").replace("\n", " ")[:160]
        cells = (
            row["model_type"],
            row.get("class", ""),
            row["state"],
            matches,
            row.get("graphs", ""),
            detail,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _known() -> dict[str, dict[str, Any]]:
    """Rows of earlier runs, by model type."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["model_type"]: row for row in map(json.loads, lines)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="model types instead of all of them")
    parser.add_argument("--table", action="store_true", help="write the table from the results at hand")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    every = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    rows = _known() if arguments.only or arguments.table else {}
    names = [] if arguments.table else arguments.only or every
    RESULTS.parent.mkdir(exist_ok=True)
    for number, name in enumerate(names, 1):
        row = rows[name] = isolated(name)
        shown = json.dumps(row, indent=1) if arguments.only else f"{row['state']} {row['detail'][:120]}"
        print(f"{number}/{len(names)} {name}: {shown}", flush=True)
        RESULTS.write_text("".join(json.dumps(each) + "\n" for each in rows.values()))
    if rows.keys() >= set(every):
        TABLE.write_text(table(list(rows.values())))
    return int(any(row["state"] in ("wrong", "crash") for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
