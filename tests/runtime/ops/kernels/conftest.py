"""Each kernel against its reference: under Triton's interpreter where TRITON_INTERPRET=1, on a GPU otherwise.

With neither there is nothing to run here; `test_interpreter.py` one folder up runs all of it in a process of
its own, because Triton reads the variable when it is imported.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

settings.register_profile("kernels", max_examples=25, deadline=None, database=None, derandomize=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not INTERPRETED and "ops/kernels" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="module", autouse=True)
def _poisoned() -> Iterator[None]:
    """Every uninitialised tensor holds NaN, so that an element that no kernel writes is seen.

    In these modules only: a process that runs the tests of a GPU has those of whole models, too.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(scope="session")
def make() -> Callable[..., Tensor]:
    """make(seed, *shape, dtype=...) draws values and strides: permuted, stepped, sliced from a larger one."""

    def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        random = torch.Generator().manual_seed(seed)

        def below(n: int) -> int:
            return int(torch.randint(n, (1,), generator=random))

        order = torch.randperm(len(shape), generator=random).tolist() if below(2) else range(len(shape))
        steps = [1 + (below(4) == 0) for _ in shape]
        margins = [below(2) for _ in shape]
        ends = [2 * below(2) for _ in shape]
        sizes = [margins[d] + shape[d] * steps[d] + ends[d] for d in order]
        values = torch.randn(*sizes, generator=random) * scale
        values = values.to(dtype).to(DEVICE).permute(*torch.tensor(order).argsort().tolist())
        slices = [slice(margins[d], margins[d] + shape[d] * steps[d], steps[d]) for d in range(len(shape))]
        view = values[tuple(slices)] if shape else values
        assert view.shape == shape
        drawn = view.clone()
        values.fill_(torch.nan)  # an element that is read beyond the edges is seen
        return view.copy_(drawn)

    return tensor


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """close(got, exact, dtype): one rounding to the dtype apart, and what float32 arithmetic adds.

    A whole unit in the last place instead of half of one, because the interpreter truncates to bfloat16.
    """

    def check(got: Tensor, exact: Tensor, dtype: torch.dtype, noise: float = 1e-5) -> None:
        assert got.shape == exact.shape and got.dtype == dtype
        exact = exact.double()
        size = exact.square().mean().sqrt() if exact.numel() else exact.new_zeros(())
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        bound = rounding * exact.abs() + noise * (exact.abs() + size) + tiny
        worst = ((got.double() - exact).abs() - bound).max() if exact.numel() else exact.new_zeros(())
        assert bool(worst <= 0), f"{worst:.3e} beyond the bound (not a number: an element was not written)"

    return check


@pytest.fixture(scope="session")
def doubled() -> Callable[..., list[Any]]:
    """The arguments, every floating tensor as a float64 copy: from those the references are exact."""

    def convert(*given: Any) -> list[Any]:
        return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]

    return convert
