"""Names of modules that differ in the number of a layer alone, as one name."""

import re
from collections import defaultdict
from collections.abc import Iterable

# Runs of layer numbers that a table spells out; of more, the first two and the last.
MOST_SPANS = 4


def grouped(places: Iterable[str]) -> list[str]:
    """Names of modules, those that differ in one number alone taken together: `layers.{0..23}.mlp`."""
    by_pattern: dict[str, set[str]] = defaultdict(set)
    for place in places:
        by_pattern[pattern_of(place)].add(place)
    return [grouped_as(pattern, found) for pattern, found in by_pattern.items()]


def pattern_of(where: str) -> str:
    """`layers.3.mlp` as `layers.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?=\.|$)", "*", where)


def grouped_as(pattern: str, places: Iterable[str]) -> str:
    """`layers.*.mlp` with the numbers that occur: `layers.{0..23}.mlp`, `layers.{0..2,4..6,…,20..22}.mlp`."""
    if pattern.count("*") != 1:
        return pattern
    head, tail = pattern.split("*")
    numbers = sorted({int(place[len(head) : len(place) - len(tail)]) for place in places})
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    parts = [str(s[0]) if len(s) == 1 else f"{s[0]}..{s[-1]}" for s in spans]
    text = ",".join(parts if len(parts) <= MOST_SPANS else [*parts[:2], "…", parts[-1]])
    return f"{head}{{{text}}}{tail}" if len(numbers) > 1 else f"{head}{text}{tail}"
