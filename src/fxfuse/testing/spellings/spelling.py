"""What a spelling is: a function that writes calls, or says that it does not apply."""

from collections.abc import Callable
from typing import Any

__all__ = ["DoesNotApply", "Spelling", "letters", "require"]

Spelling = Callable[..., Any]


class DoesNotApply(Exception):
    """This operand cannot be spelled so."""


def require(condition: bool) -> None:
    if not condition:
        raise DoesNotApply


def letters(count: int) -> str:
    return "abcdefgh"[:count]
