"""Row maps and weight plans: what a rewrite does to parameters, as data."""

from fxfuse.passes.weights.draft import Draft
from fxfuse.passes.weights.naming import fused_name
from fxfuse.passes.weights.plan import WeightPlan
from fxfuse.passes.weights.ranks import all_ranks
from fxfuse.passes.weights.row_map import RowMap, Rows
from fxfuse.passes.weights.tensor_spec import TensorSpec
from fxfuse.passes.weights.transform import Transform
from fxfuse.passes.weights.usage import Usage

__all__ = [
    "Draft",
    "RowMap",
    "Rows",
    "TensorSpec",
    "Transform",
    "Usage",
    "WeightPlan",
    "all_ranks",
    "fused_name",
]
