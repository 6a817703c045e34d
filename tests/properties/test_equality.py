"""What counts as the same: the oracle of the property suites itself."""

import pytest
import torch
import torch.nn.functional as F
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


def cancelled(x: Tensor) -> Tensor:
    """Sums of large numbers of which little is left: roundings of fp32 are large beside it."""
    return torch.exp(x * 1000.3 - x * 1000.1)


def test_what_roundings_do_to_the_original_they_may_do_to_a_rewrite() -> None:
    def otherwise(x: Tensor) -> Tensor:
        return torch.exp(x * 700.3 + x * 300 - (x * 600.1 + x * 400))

    assert not torch.allclose(otherwise(X), cancelled(X), rtol=2e-5, atol=0)
    assert difference(cancelled, otherwise, [X], exact=False) is None


@pytest.mark.parametrize("fault", [3e-5, 1e-3])
def test_a_small_fault_is_found_where_roundings_are_smaller(fault: float) -> None:
    """Of the largest number; in all numbers, and in one of a hundred."""
    for faults in (fault, torch.zeros(100).index_fill_(0, torch.tensor([7]), fault)):
        why = difference(torch.exp, lambda x, off=faults: torch.exp(x) + off * 54.6, [X], exact=False)
        assert why is not None and "roundings make" in why


def test_a_fault_larger_than_the_roundings_is_found() -> None:
    assert difference(cancelled, lambda x: cancelled(x) * 1.002, [X], exact=False) is not None


def test_an_end_of_what_is_defined_does_not_allow_everything() -> None:
    """Off in its last place, the last number has no root."""

    def edge(x: Tensor) -> Tensor:
        return torch.sqrt(1 - (x / 4) ** 2)

    assert difference(edge, lambda x: torch.sqrt((1 - x / 4) * (1 + x / 4)), [X], exact=False) is None
    assert difference(edge, lambda x: edge(x) + 0.1 * x, [X], exact=False) is not None


def softplus_by_hand(x: Tensor) -> Tensor:
    """Infinite below -88, where exp(-x) is: the truth is next to 0."""
    return x + torch.log1p(torch.exp(-x))


WIDE = torch.linspace(-120, 120, 97)


def test_what_the_original_loses_need_not_be_lost() -> None:
    assert difference(softplus_by_hand, F.softplus, [WIDE], exact=False) is None


@pytest.mark.parametrize("place", [0, 50, 96])
def test_other_numbers_in_their_place_or_beside_them_are_found(place: int) -> None:
    """Of which the first is lost: neither infinite nor next to 0."""
    off = torch.zeros(97).index_fill_(0, torch.tensor([place]), 0.01)
    assert difference(softplus_by_hand, lambda x: F.softplus(x) + off, [WIDE], exact=False) is not None
