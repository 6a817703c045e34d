"""SwiGLU's product: y = silu(gate) · up, in float32, rounded once.

Formula: Shazeer, "GLU Variants Improve Transformer" (2020). The operands may be parts of one row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.runtime.ops import gate_product, triton_kernel
from fxfuse.runtime.ops.activations import wide


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The product in plain torch.

    Args:
        gate, up: [..., I], in any float dtypes and of any strides.

    Returns:
        [..., I] in the dtype of gate, contiguous.
    """
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype).contiguous()


def launch(gate: Tensor, up: Tensor) -> Tensor:
    """`reference` by the Triton kernel."""
    return gate_product.launch(up, gate, True, gate.dtype)


@torch.library.custom_op("fxfuse::silu_mul", mutates_args=())
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The product as one node of a graph; shapes and dtypes as in `reference`."""
    gate_product.check("silu_mul", gate, up)
    return (launch if triton_kernel.refusal(gate, up) is None else reference)(gate, up)


@silu_mul.register_fake
def _(gate, up):  # type: ignore[no-untyped-def]
    gate_product.check("silu_mul", gate, up)
    return gate.new_empty(gate.shape)
