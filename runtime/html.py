"""A report as one HTML page: what was done, the table, and each kind of block before and after.

Nothing is loaded from elsewhere: styles and drawings are part of the page.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from fxfuse.runtime.report import NOTHING_LEFT, NOTHING_RAN, Report
from fxfuse.runtime.svg import draw

if TYPE_CHECKING:
    from fxfuse.runtime.pictures import Picture

WHOLE = "the model itself"
STYLE = """
:root { color-scheme: light dark; --line: #8889; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; padding: 1rem min(2rem, 4vw) 4rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
p, dl { max-width: 60rem; } dt { font-weight: 600; } dd { margin: 0 0 .6rem 1.5rem; }
table { border-collapse: collapse; } code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid var(--soft); vertical-align: top; }
td.count { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
tr.missed { background: #b3590018; } summary { cursor: pointer; padding: .4rem 0; font-weight: 600; }
.muted { opacity: .75; } .pair { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; }
figure, .wide { margin: 0; max-width: 100%; overflow-x: auto; }
.wide code { white-space: nowrap; }
figcaption { font-weight: 600; padding: .3rem 0; }
svg { display: block; } svg .detail { font-size: 10px; opacity: .8; }
svg text { font: 12px ui-monospace, monospace; text-anchor: middle; fill: currentColor; }
svg .edge { fill: none; stroke: var(--line); stroke-width: 1.2; }
svg .kept rect { fill: var(--soft); stroke: var(--line); } svg .outside text { opacity: .7; }
svg .outside rect { fill: none; stroke: var(--line); stroke-dasharray: 3 3; }
svg .changed rect { stroke-width: 2; } .before .changed rect, .key.old { fill: #b3590030; stroke: #b35900; }
.after .changed rect, .key.new { fill: #1a7f3730; stroke: #1a7f37; }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em -.1em 1em; }
.key { border: 2px solid #b35900; }
.key.old { background: #b3590030; } .key.new { border-color: #1a7f37; background: #1a7f3730; }
"""


def page(report: Report) -> str:
    """The whole page."""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    sections = [_summary(report), _table(report), _left_alone(report), _notes(report), _pictures(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>fxfuse report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>fxfuse report</h1>"
        f'<p class="muted">{escape(versions)}</p>{"".join(sections)}</body></html>\n'
    )


def _summary(report: Report) -> str:
    if not report.graphs:
        return "<p>No graph yet: capture, match and packing happen at the first call.</p>"
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="count">{g.nodes_before} → {g.nodes_after}</td>'
        f"<td>{escape(g.inner)}</td>"
        f'<td class="count">{_seconds(g.compile_seconds)}</td><td class="count">{g.calls}</td></tr>'
        for name, g in report.graph_totals()
    )
    measured = "".join(f"<p>Measured: {escape(str(m))}</p>" for m in report.measurements)
    memory = (
        f"{report.packed_bytes / 1e6:.1f} MB of weights shared with fused ones, "
        f"{report.copied_bytes / 1e6:.1f} MB copied."
    )
    if not report.calls:
        memory = _sentence(NOTHING_RAN)
    return (
        f"<p>{memory}</p>{measured or '<p>No speed was measured.</p>'}"
        f"{_wide(['graph', 'nodes', 'run by', 'compiled in', 'calls'], rows)}"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _seconds(spent: float) -> str:
    return f"{spent:.1f} s" if spent else "–"  # what was only looked at was not compiled


def _table(report: Report) -> str:
    phases = list(dict.fromkeys(row.phase for row in report.rows))
    lines = "".join(
        f"<tr{'' if any_match else ' class=missed'}><td><code>{escape(rule)}</code></td>"
        f"<td><code>{escape(where)}</code></td><td>{escape(detail)}</td>"
        + "".join(f'<td class="count">{escape(counts.get(phase, ""))}</td>' for phase in phases)
        + "</tr>"
        for (rule, where, detail), counts, any_match in report.lines()
    )
    if not lines:
        return ""
    return f"<h2>What was rewritten</h2>{_wide(['rule', 'where', 'what', *phases], lines)}"


def _wide(headings: Iterable[str], rows: str) -> str:
    """A table that is scrolled where the window is narrower."""
    heads = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def _left_alone(report: Report) -> str:
    reasons = report.reasons()
    if not reasons:
        return f"<h2>Left alone</h2><p>{_sentence(NOTHING_LEFT)}</p>" if report.graphs else ""
    items = "".join(
        f"<dt>{escape(reason)}</dt><dd>{', '.join(f'<code>{escape(p)}</code>' for p in places)}</dd>"
        for reason, places in reasons.items()
    )
    return f"<h2>Left alone</h2><dl>{items}</dl>"


def _notes(report: Report) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _pictures(report: Report) -> str:
    by_block: dict[str, dict[str, Picture]] = defaultdict(dict)
    for graph in report.graphs:
        for picture in graph.pictures:
            by_block[picture.block].setdefault(picture.phase, picture)
    if not by_block:
        return ""
    blocks = "".join(
        f"<h3><code>{escape(block or WHOLE)}</code></h3>{''.join(map(_pair, of_phase.values()))}"
        for block, of_phase in by_block.items()
    )
    return (
        "<h2>Blocks before and after</h2><p>One block of each kind. Operations that only move elements are "
        'drawn as lines.<span class="key old"></span>replaced<span class="key new"></span>put in its place'
        f"</p>{blocks}"
    )


def _pair(picture: Picture) -> str:
    sides = "".join(
        f'<figure class="{side}"><figcaption>{side}</figcaption>'
        f"{draw(boxes, f'{picture.block or WHOLE}, {picture.phase}, {side}')}</figure>"
        for side, boxes in (("before", picture.before), ("after", picture.after))
    )
    return (
        f'<details open><summary>{escape(picture.phase)}</summary><div class="pair">{sides}</div></details>'
    )
