"""Each fault of the list can still be put in: its line is there, once, and its tests exist."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutate import FAULTS, ROOT


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_fault_can_be_put_in(number: int) -> None:
    fault = FAULTS[number]
    assert (ROOT / fault.file).read_text().count(fault.old) == 1, f"{fault.file}: {fault.old!r}"
    for path in re.findall(r"tests/\S+", fault.tests):
        assert (ROOT / path).exists(), path
