"""The rule for low precision: no larger error than the original's own, both against float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def no_worse() -> Callable[..., None]:
    """no_worse(ours, theirs, exact): our RMS error is at most 1.1 times the original's in its dtype."""

    def check(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        assert ours.dtype == theirs.dtype and exact.dtype == torch.float64
        mine, original = ((x.double() - exact).square().mean().sqrt() for x in (ours, theirs))
        noise = exact.square().mean().sqrt() * torch.finfo(torch.float32).eps
        assert mine <= 1.1 * original + noise, f"{mine:.3e} against {original:.3e} of the original"

    return check
