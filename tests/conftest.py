"""What holds for every test."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Each file starts with an empty compile cache.

    transformers' models share one guarded frame. When plain torch.compile calls reach its limit of graphs,
    Dynamo leaves that frame alone for the rest of the process, and every model after it runs eagerly.
    """
    yield
    import torch

    torch._dynamo.reset()
