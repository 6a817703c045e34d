"""What no kernel of an operator takes on any device, asked before a graph is lowered to the operator."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fxfuse.runtime.ops import (
    chunk_gated_delta_rule,
    gated_rms_norm,
    gdn_decode,
    gdn_gates,
    qk_norm_rope_gate,
    recurrent_gated_delta_rule,
    rms_norm,
    triton_kernel,
)

_LIMITS: dict[str, Callable[..., str | None]] = {
    "chunk_gated_delta_rule": chunk_gated_delta_rule.unsupported,
    "gated_rms_norm": gated_rms_norm.unsupported,
    "gdn_decode": gdn_decode.unsupported,
    "gdn_gates": gdn_gates.unsupported,
    "qk_norm_rope": qk_norm_rope_gate.unsupported,
    "qk_norm_rope_gate": qk_norm_rope_gate.unsupported,
    "recurrent_gated_delta_rule": recurrent_gated_delta_rule.unsupported,
    "rms_norm": rms_norm.unsupported,
}


def unsupported(operator: str, *arguments: Any) -> str | None:
    """Why the kernel of `fxfuse::operator` takes such tensors on no device, or None.

    `arguments` are the operator's, in its order, of which only the tensors count; fake ones will do.
    """
    limit = _LIMITS.get(operator, triton_kernel.unsupported)
    return limit(*(x for x in arguments if isinstance(x, Tensor)))
