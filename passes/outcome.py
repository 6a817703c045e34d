"""What a pass did: what matched, and what almost did, with the reason."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Match:
    """One rewrite: by which rule, in which module, of which parameters, in words ("4 linears → 1")."""

    rule: str
    where: str
    members: tuple[str, ...]
    detail: str


@dataclass(frozen=True)
class Miss:
    """One candidate that was left alone: the node that decided it, and the reason in words.

    A `chosen` one could have been rewritten and is faster as it is.
    """

    rule: str
    where: str
    node: str
    reason: str
    chosen: bool = False


@dataclass
class Outcome:
    """Matches and misses of one run of one pass."""

    matches: list[Match] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)

    @property
    def candidates(self) -> int:
        return len(self.matches) + len(self.misses)
