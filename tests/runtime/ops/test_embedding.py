"""The gradient of an embedding, for the rows in use: that of torch, added in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.runtime.ops.embedding import gradient
from fxfuse.testing.tensors import integer_tensor

ROWS, WIDTH = 7, 4
IDS = {
    "repeated": torch.tensor([[1, 6, 1], [0, 1, 6]]),
    "one": torch.tensor(3),
    "none": torch.empty(2, 0, dtype=torch.long),
    "int32": torch.tensor([2, 2, 5], dtype=torch.int32),
}


def gradients(call: object, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = integer_tensor((ROWS, WIDTH), 0).to(dtype).requires_grad_()
    y = call(weight, ids)  # type: ignore[operator]
    y.backward(integer_tensor(tuple(y.shape), 1).to(dtype))
    assert weight.grad is not None
    return y, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("padding", [-1, 1])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_rows_and_gradients_are_those_of_torch(ids: Tensor, padding: int, dtype: torch.dtype) -> None:
    known = None if padding < 0 else padding
    expected = gradients(lambda weight, ids: F.embedding(ids, weight, known), ids, dtype)
    got = gradients(lambda weight, ids: torch.ops.fxfuse.embedding(weight, ids, padding), ids, dtype)
    assert all(map(torch.equal, got, expected))


def test_many_uses_of_one_row_are_added_in_float32() -> None:
    grad = torch.full((1000, 1), 1.0, dtype=torch.bfloat16)
    assert gradient(grad, torch.zeros(1000, dtype=torch.long), 2, -1).tolist() == [[1000.0], [0.0]]


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_opcheck(ids: Tensor) -> None:
    weight = torch.randn(ROWS, WIDTH, requires_grad=True)
    torch.library.opcheck(torch.ops.fxfuse.embedding.default, (weight, ids, 1))
    grad = torch.randn(*ids.shape, WIDTH)
    torch.library.opcheck(torch.ops.fxfuse.embedding_backward.default, (grad, ids, ROWS, 1))
