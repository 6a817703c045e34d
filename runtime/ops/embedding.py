"""Rows of a table, whose gradient is added up for the rows in use alone.

Inductor adds the gradients of all rows in float32 and casts them afterwards: three passes over a table of a
quarter million rows for each step. Here they are added in float32, too, for the tokens of the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient(grad: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The gradient of `embedding` for its table.

    Args:
        grad: [..., H], of the result. ids: [...], integers. rows: of the table.
        padding_idx: a row without gradient; -1 for none.

    Returns:
        [rows, H] in the dtype of grad; sums are taken in float32 (float64 for float64) and rounded once.
    """
    used, place = ids.reshape(-1).long().unique(return_inverse=True)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = grad.new_zeros(len(used), grad.shape[-1], dtype=wide)
    sums.index_add_(0, place, grad.reshape(-1, grad.shape[-1]).to(wide))
    sums[used == padding_idx] = 0
    return grad.new_zeros(rows, grad.shape[-1]).index_copy_(0, used, sums.to(grad.dtype))


@torch.library.custom_op("fxfuse::embedding", mutates_args=())
def embedding(weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    """`torch.nn.functional.embedding` as one node of a graph: [N, H] and [...] give [..., H]."""
    return F.embedding(ids, weight)


@embedding.register_fake
def _(weight, ids, padding_idx):  # type: ignore[no-untyped-def]
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.custom_op("fxfuse::embedding_backward", mutates_args=())
def embedding_backward(grad: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """`gradient` as one node of a graph."""
    return gradient(grad, ids, rows, padding_idx)


@embedding_backward.register_fake
def _(grad, ids, rows, padding_idx):  # type: ignore[no-untyped-def]
    return grad.new_empty(rows, grad.shape[-1])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    weight, ids, padding_idx = inputs
    ctx.save_for_backward(ids)
    ctx.rows, ctx.padding_idx = weight.shape[0], padding_idx


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    return embedding_backward(grad, ids, ctx.rows, ctx.padding_idx), None, None


embedding.register_autograd(_backward, setup_context=_save)
