"""Names of merged parameters, from the names of their members alone."""

from collections.abc import Sequence
from itertools import takewhile

from fxfuse.errors import PlanError


def fused_name(names: Sequence[str]) -> str:
    """Dotted name of the parameter that the named parameters merge into, in their order.

    `a.q_proj.weight, a.k_proj.weight, a.v_proj.weight` gives `a.q_k_v_proj.weight`: the last module names are
    split at "_", what all have in common at either end is written once, the rest is joined. Members of
    different modules stand under their longest common parent, dots turned into "_". The result has more
    tokens than any member, so it is never a member's name. Raises PlanError unless there are two or more,
    all different.
    """
    if len(names) < 2 or len(set(names)) != len(names) or not all(all(name.split(".")) for name in names):
        raise PlanError(f"a merged name needs two or more distinct dotted names, not {list(names)}")
    paths = [name.split(".") for name in names]
    leaf = paths[0][-1]
    shared_leaf = all(len(path) > 1 and path[-1] == leaf for path in paths)
    if shared_leaf:
        paths = [path[:-1] for path in paths]
    parent = _common_start(paths)
    tokens = ["_".join(path[len(parent) :]).split("_") for path in paths]
    start = _common_start(tokens)
    tokens = [member[len(start) :] for member in tokens]
    end = _common_start([member[::-1] for member in tokens])[::-1]
    middles = [token for member in tokens for token in member[: len(member) - len(end)]]
    return ".".join([*parent, "_".join([*start, *middles, *end]), *([leaf] if shared_leaf else [])])


def _common_start(members: Sequence[Sequence[str]]) -> list[str]:
    """Leading tokens that all members share, leaving each member at least one token of its own."""
    shortest = min(map(len, members)) - 1
    same = takewhile(lambda column: len(set(column)) == 1, zip(*members, strict=False))
    return [column[0] for column, _ in zip(same, range(shortest), strict=False)]
