"""Writes docs/api.md from the docstrings: `python docs/make_api.py`; a test compares."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fxfuse
import fxfuse.testing
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.pipeline import PASSES, Pass
from fxfuse.passes.program import FusedWeight, Program, Weight
from fxfuse.runtime.measure import Measurement
from fxfuse.runtime.options import Options
from fxfuse.runtime.report import GraphRecord, Row

PAGE = Path(__file__).with_name("api.md")
HEAD = """# Reference

Written from the docstrings by `python docs/make_api.py`; a test fails where the two differ.

Importing `fxfuse` adds `optimize()`, `deoptimize()` and `optimization_report` to every transformers model:
`fxfuse.optimize` and its companions without their first argument.
"""

SECTIONS: dict[str, list[str]] = {
    "Models": ["optimize", "deoptimize", "optimized", "explain", "load_state_dict"],
    "Weights and checkpoints": ["plan", "convert", "WeightPlan"],
    "Graphs": ["rewrite", "Rewritten"],
    "Reports": ["Report"],
    "Errors": [
        "FxfuseError",
        "UnsupportedModelError",
        "CheckpointError",
        "PlanError",
        "VerificationError",
        "OptionError",
        "ShapeError",
    ],
}
DETAILS = [Options, Measurement, GraphRecord, Row]
FOR_PASSES = [Pass, Program, Weight, FusedWeight, Outcome, Match, Miss]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(f"fxfuse.{name}", getattr(fxfuse, name)) for name in names]
        if title == "Reports":
            parts += [_entry(f"{each.__module__}.{each.__name__}", each) for each in DETAILS]
    parts.append("## Testing\n")
    parts += [_entry(f"fxfuse.testing.{n}", getattr(fxfuse.testing, n)) for n in fxfuse.testing.__all__]
    parts.append("## The passes\n")
    parts += [f"- `{p.name}`: {_first(inspect.getmodule(p.run))}" for p in PASSES]
    parts.append("\n## For passes of your own\n")
    parts += [_entry(f"{each.__module__}.{each.__name__}", each) for each in FOR_PASSES]
    return "\n".join(parts).rstrip() + "\n"


def _first(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def _entry(name: str, thing: Any) -> str:
    if not callable(thing):
        return f"### `{name}`\n\n{_doc(thing)}"
    lines = [f"### `{name}`\n"]
    is_error = inspect.isclass(thing) and issubclass(thing, Exception)
    if not is_error:
        lines.append(f"```text\n{name.rpartition('.')[2]}{_signature(thing)}\n```\n")
    lines.append(_doc(thing))
    if inspect.isclass(thing) and not is_error:
        lines += [f"- **`{shown}`** {text}" for shown, text in _methods(thing)]
        lines.append("")
    return "\n".join(lines)


def _signature(thing: Callable[..., Any]) -> str:
    text = str(inspect.signature(thing))
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)
    text = re.sub(r"<factory>|<function .*? at 0x[0-9a-f]+>", "…", text)
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)
    if len(text) < 90:
        return text
    inside, _, after = text[1:].rpartition(")")
    parts = re.split(r", (?![^\[\(]*[\]\)])", inside)
    return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){after}"


def _methods(cls: type) -> Iterator[tuple[str, str]]:
    for name, value in vars(cls).items():
        plain = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if name.startswith("_") or not (inspect.isfunction(plain) or isinstance(plain, property)):
            continue
        text = _first(plain)
        if text:
            yield name if isinstance(plain, property) else f"{name}({_parameters(plain)})", text


def _parameters(function: Callable[..., Any]) -> str:
    names = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    return ", ".join(names)


def _doc(thing: Any) -> str:
    """The docstring, with its lists of arguments as lists of Markdown."""
    out = []
    for line in (inspect.getdoc(thing) or "").splitlines():
        heading = re.fullmatch(r"(Args|Attributes|Raises|Returns):", line)
        item = re.match(r"    (\w[\w, ]*): (.*)", line)
        if heading:
            out.append(f"**{heading[1]}**\n")
        elif item:
            out.append(f"- `{item[1]}`: {item[2]}")
        else:
            out.append(f"  {line.strip()}" if line.startswith("     ") else line)
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
