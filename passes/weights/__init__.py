"""Row maps and weight plans: what a rewrite does to parameters, as data."""

from fxfuse.passes.weights.naming import fused_name
from fxfuse.passes.weights.plan import Transform, WeightPlan
from fxfuse.passes.weights.row_map import RowMap, Rows
from fxfuse.passes.weights.tensor_spec import TensorSpec

__all__ = ["RowMap", "Rows", "TensorSpec", "Transform", "WeightPlan", "fused_name"]
