"""The plans of all ranks of a tensor-parallel group as one plan, whose inverse puts the whole together."""

from collections.abc import Sequence
from dataclasses import replace

from fxfuse.errors import PlanError
from fxfuse.passes.weights.check import row_uses
from fxfuse.passes.weights.plan import WeightPlan
from fxfuse.passes.weights.row_map import Rows
from fxfuse.passes.weights.transform import Transform
from fxfuse.passes.weights.usage import Usage


def all_ranks(plans: Sequence[WeightPlan]) -> WeightPlan:
    """One plan with every rank's targets, named `rank0.NAME`, `rank1.NAME`, ...

    Raises PlanError when the ranks together leave rows out, or their plans are for different sources.
    """
    sources = {source.name: source for plan in plans for source in plan.sources}
    if not plans or any(sources[s.name] != s for plan in plans for s in plan.sources):
        raise PlanError("plans of one group are made from the same tensors: plan each rank from one source")
    transforms = [
        Transform(replace(t.target, name=f"rank{rank}.{t.target.name}"), t.rows, t.beside)
        for rank, plan in enumerate(plans)
        for t in plan.transforms
    ]
    blocks: dict[str, list[Rows]] = {name: [] for name in sources}
    for transform in transforms:
        for panel in transform.panels:
            for block in panel.segments:
                blocks[block.source].append(block)
    repeated = [name for name, used in blocks.items() if row_uses(sources[name], used)["repeated"]]
    usages = [Usage(name, "repeated", "tensor_parallel_replica") for name in repeated]
    return WeightPlan(tuple(sources.values()), tuple(transforms), tuple(usages))
