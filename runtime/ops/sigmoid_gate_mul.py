"""Gated attention output: y = x · sigmoid(gate), in float32, rounded once.

Formula: Qiu et al., "Gated Attention for Large Language Models" (2025), as in Qwen3-Next. The gate may stay
where the projection left it, interleaved with the query by head; x may have the strides of attention's
output.
"""

import torch
from torch import Tensor

from fxfuse.runtime.ops import gate_product, triton_kernel
from fxfuse.runtime.ops.activations import wide


def reference(x: Tensor, gate: Tensor) -> Tensor:
    """The product in plain torch.

    Args:
        x, gate: [..., D], such as [B, T, H, D], in any float dtypes and of any strides.

    Returns:
        [..., D] in the dtype of x, contiguous.
    """
    return (wide(x) * torch.sigmoid(wide(gate))).to(x.dtype).contiguous()


def launch(x: Tensor, gate: Tensor) -> Tensor:
    """`reference` by the Triton kernel."""
    return gate_product.launch(x, gate, False, x.dtype)


@torch.library.custom_op("fxfuse::sigmoid_gate_mul", mutates_args=())
def sigmoid_gate_mul(x: Tensor, gate: Tensor) -> Tensor:
    """The product as one node of a graph; shapes and dtypes as in `reference`."""
    gate_product.check("sigmoid_gate_mul", x, gate)
    return (launch if triton_kernel.refusal(x, gate) is None else reference)(x, gate)


@sigmoid_gate_mul.register_fake
def _(x, gate):  # type: ignore[no-untyped-def]
    gate_product.check("sigmoid_gate_mul", x, gate)
    return x.new_empty(x.shape)
