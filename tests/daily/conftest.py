"""What the tests of daily use have in common; tiny models are in tests/conftest.py."""

import importlib.util
from typing import Any

import pytest

_kept: list[Any] = []


def pytest_configure() -> None:
    """Make a torchvision that was built for CUDA importable beside a torch for CPUs.

    Its compiled operators are then missing, and importing it raises where it gives them shapes; processors
    use none of them. transformers takes the package for usable, so everything near it would fail.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # operators go with it


@pytest.fixture(scope="session", autouse=True)
def _quiet(quiet: None) -> None:
    pass
