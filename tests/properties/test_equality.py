"""What counts as the same: the oracle of the property suites itself."""

import torch
from equality import difference
from torch import Tensor

X = torch.linspace(1, 4, 100)


def compared(change: Tensor, dtype: torch.dtype = torch.float16) -> str | None:
    return difference(lambda x: x.to(dtype), lambda x: (x + change).to(dtype), [X], exact=False)


def test_a_single_number_may_be_rounded_to_its_neighbour() -> None:
    one = torch.zeros(100).index_fill_(0, torch.tensor([40]), 2.0**-9)
    assert compared(one) is None
    assert compared(one, torch.float32) is not None
    assert compared(3 * one) is not None


def test_many_of_them_may_not() -> None:
    assert compared(torch.full((100,), 2.0**-9)) is not None
