"""Drawing of a small graph as SVG: rows by the longest path, few crossings, lines around the boxes.

The layout is Sugiyama's: layers, dummy points where a line passes a layer, and sweeps that order each layer
by the mean place of what it is joined to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from fxfuse.runtime.pictures import Box

HEIGHT, GAP, RISE = 36, 14, 26
LINE = 12
SWEEPS = 12
# A box is as wide as its text, within limits; text is cut at the upper one.
NARROWEST, WIDEST = 104, 260
# Widths of a letter, for the operator and for the smaller line below it (class detail in html.py).
LETTER, SMALL_LETTER = 7.3, 6.1

Point = str | tuple[str, str, int]


def draw(boxes: Sequence[Box], title: str) -> str:
    """The graph as an `<svg>` element; boxes come after what they read, screen readers read out `title`."""
    layer = _layers(boxes)
    edges = [(source, box.name) for box in boxes for source in box.inputs]
    rows, chains = _rows(boxes, layer, edges)
    width: dict[Point, int] = {box.name: _width(box) for box in boxes}
    place = _places(rows, width)
    right = max((place[p] + width.get(p, LINE) / 2 for row in rows for p in row), default=NARROWEST) + GAP
    bottom = len(rows) * (HEIGHT + RISE) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:.0f} {bottom:.0f}" width="{right:.0f}" '
        f'height="{bottom:.0f}" role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title>",
    ]
    parts += [_curve([(place[p], _middle(_row(p, layer))) for p in chain]) for chain in chains]
    parts += [_drawn(box, place[box.name], _middle(layer[box.name]), width[box.name]) for box in boxes]
    return "".join([*parts, "</svg>"])


def _middle(row: int) -> float:
    return GAP + row * (HEIGHT + RISE) + HEIGHT / 2


def _row(point: Point, layer: dict[str, int]) -> int:
    return layer[point] if isinstance(point, str) else point[2]


def _width(box: Box) -> int:
    text = max(len(box.operator) * LETTER, len(box.detail) * SMALL_LETTER)
    return min(max(round(text) + 12, NARROWEST), WIDEST)


def _layers(boxes: Sequence[Box]) -> dict[str, int]:
    """The row of each box: below all that it reads; what reads nothing stands above its first reader."""
    layer: dict[str, int] = {}
    for box in boxes:
        layer[box.name] = 1 + max((layer[source] for source in box.inputs), default=-1)
    readers: dict[str, list[str]] = defaultdict(list)
    for box in boxes:
        for source in box.inputs:
            readers[source].append(box.name)
    for box in reversed(boxes):
        if not box.inputs and readers[box.name]:
            layer[box.name] = min(layer[name] for name in readers[box.name]) - 1
    return layer


def _rows(
    boxes: Sequence[Box], layer: dict[str, int], edges: Sequence[tuple[str, str]]
) -> tuple[list[list[Point]], list[list[Point]]]:
    """The points of each row from left to right, and for each edge the points that it passes."""
    rows: list[list[Point]] = [[] for _ in range(1 + max(layer.values(), default=0))]
    for box in boxes:
        rows[layer[box.name]].append(box.name)
    chains: list[list[Point]] = []
    joined: dict[Point, list[Point]] = defaultdict(list)
    for source, target in edges:
        between: list[Point] = [(source, target, row) for row in range(layer[source] + 1, layer[target])]
        for point in between:
            rows[_row(point, layer)].append(point)
        chain: list[Point] = [source, *between, target]
        chains.append(chain)
        for upper, lower in pairwise(chain):
            joined[upper].append(lower)
            joined[lower].append(upper)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for index in range(len(rows)) if down else reversed(range(len(rows))):
            beside = index - 1 if down else index + 1
            if 0 <= beside < len(rows):
                order = {point: i for i, point in enumerate(rows[beside])}
                rows[index] = _by_mean(rows[index], joined, order)
    return rows, chains


def _by_mean(row: list[Point], joined: dict[Point, list[Point]], order: dict[Point, int]) -> list[Point]:
    def key(item: tuple[int, Point]) -> tuple[float, int]:
        at = [order[other] for other in joined[item[1]] if other in order]
        return (sum(at) / len(at) if at else float(item[0]), item[0])

    return [point for _, point in sorted(enumerate(row), key=key)]


def _places(rows: Sequence[Sequence[Point]], width: Mapping[Point, int]) -> dict[Point, float]:
    """The middle of each point: rows centred over the widest; what has no width is a line."""
    widths = [sum(width.get(point, LINE) + GAP for point in row) for row in rows]
    widest = max(widths, default=0)
    place: dict[Point, float] = {}
    for row, whole in zip(rows, widths, strict=True):
        left = GAP + (widest - whole) / 2
        for point in row:
            place[point] = left + width.get(point, LINE) / 2
            left += width.get(point, LINE) + GAP
    return place


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A line from the lower edge of the first box to the upper edge of the last."""
    (x, y), half = points[0], HEIGHT / 2
    path = [f"M{x:.1f} {y + half:.1f}"]
    for i, (to_x, to_y) in enumerate(points[1:], 1):
        start = y + half
        stop = to_y - half
        middle = (start + stop) / 2
        path.append(f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {stop:.1f}")
        if i < len(points) - 1:
            path.append(f"V{to_y + half:.1f}")
        x, y = to_x, to_y
    return f'<path class="edge" d="{"".join(path)}"/>'


def _drawn(box: Box, x: float, y: float, width: int) -> str:
    kind = "outside" if box.outside else "changed" if box.changed else "kept"
    left, top = x - width / 2, y - HEIGHT / 2
    operator, detail = _cut(box.operator, LETTER), _cut(box.detail, SMALL_LETTER)
    below = f'<text class="detail" x="{x:.1f}" y="{y + 12:.1f}">{escape(detail)}</text>'
    return (
        f'<g class="{kind}"><title>{escape(f"{box.name}: {box.operator} {box.detail}")}</title>'
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{width}" height="{HEIGHT}" rx="6"/>'
        f'<text x="{x:.1f}" y="{y - 2 if box.detail else y + 4:.1f}">{escape(operator)}</text>'
        f"{below if box.detail else ''}</g>"
    )


def _cut(text: str, letter: float) -> str:
    most = int((WIDEST - 12) / letter)
    return text if len(text) <= most else f"{text[: most - 1]}…"
