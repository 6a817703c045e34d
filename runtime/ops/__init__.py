"""Named operations: schema, reference, fake implementation, kernel, a file each; importing registers them."""

from fxfuse.runtime.ops import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    chunk_gated_delta_rule_backward,
    embedding,
    gated_delta_rule,
    gated_rms_norm,
    gather_features,
    gdn_decode,
    gdn_gates,
    qk_norm_rope_gate,
    qkvzba_split,
    recurrent_gated_delta_rule,
    rms_norm,
    sigmoid_gate_mul,
    silu_mul,
    under_autocast,
)

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "chunk_gated_delta_rule",
    "chunk_gated_delta_rule_backward",
    "embedding",
    "gated_delta_rule",
    "gated_rms_norm",
    "gather_features",
    "gdn_decode",
    "gdn_gates",
    "qk_norm_rope_gate",
    "qkvzba_split",
    "recurrent_gated_delta_rule",
    "rms_norm",
    "sigmoid_gate_mul",
    "silu_mul",
]

under_autocast.register()
