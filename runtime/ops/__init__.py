"""Named operations: schema, reference, fake implementation and kernel, one file each; importing registers."""

from fxfuse.runtime.ops import gated_delta_rule, gather_features

__all__ = ["gated_delta_rule", "gather_features"]
