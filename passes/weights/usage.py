"""What a plan declares where it uses rows of a source more than once, or not at all."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fxfuse.errors import PlanError

# how -> the roles that allow it. A tensor is repeated for what it is, never for having one element.
ROLES = MappingProxyType(
    {
        "repeated": ("per_tensor_scale", "expert_scale", "tensor_parallel_replica"),
        "partial": ("tensor_parallel_shard", "copies"),
    }
)


@dataclass(frozen=True, slots=True)
class Usage:
    """`source` is "repeated" (rows stand in several places) or "partial" (rows are left out), and why.

    Roles: a `per_tensor_scale` is one value for several logical shards, an `expert_scale` has one value for
    gate and up of each expert; a `tensor_parallel_replica` is held by several ranks, such as a key-value head
    when there are more ranks than heads; of a `tensor_parallel_shard` other ranks hold the rest; `copies` are
    the repeated rows that the inverse of a plan leaves out. Raises PlanError for any other pair.
    """

    source: str
    how: str
    role: str

    def __post_init__(self) -> None:
        if self.role not in ROLES.get(self.how, ()):
            known = "; ".join(f"{how}: {', '.join(roles)}" for how, roles in ROLES.items())
            raise PlanError(f"{self.source}: {self.how!r} as {self.role!r} is not known; known are {known}")

    def to_data(self) -> list[str]:
        """The declaration as JSON values."""
        return [self.source, self.how, self.role]

    @classmethod
    def from_data(cls, data: Any) -> "Usage":
        """The declaration that `to_data` wrote; raises PlanError for anything else."""
        if not isinstance(data, list) or [type(value) for value in data] != [str, str, str]:
            raise PlanError("a usage is written as a list of source, how and role")
        return cls(*data)
