"""What the tests of daily use have in common; tiny models are in tests/conftest.py."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quiet(quiet: None) -> None:
    pass
