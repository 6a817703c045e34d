"""The tenth of the two thousand near misses that goes through Dynamo, as torch.compile has them."""

import pytest
from near_misses import DYNAMO_EVERY, run


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(10_000, 12_000, 500))
def test_two_hundred_near_misses_stay_right(first: int) -> None:
    tally = run(range(first, first + 500, DYNAMO_EVERY))
    assert tally.wrong == [], "\n".join(tally.wrong)
    assert tally.graphs == tally.roads["dynamo"] == 50, tally.undrawn
