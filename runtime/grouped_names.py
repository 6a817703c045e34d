"""Names of modules that differ in the number of a layer alone, as one name."""

import re
from collections import defaultdict
from collections.abc import Iterable

from fxfuse.passes.ranges import ranges


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
    numbers = {int(place[len(head) : len(place) - len(tail)]) for place in places}
    return f"{head}{ranges(numbers, shortened=True)}{tail}"
