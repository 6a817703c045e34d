"""The command with the large numbers: its summary, and what stays of a page that is written anew."""

from dataclasses import replace
from pathlib import Path

import nightly
import pytest
from nightly import Result


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    page = tmp_path / "nightly.md"
    page.write_text("# Old\n\nold numbers\n\n## Notes\n\nWritten by hand.\n")
    monkeypatch.setattr(nightly, "SUMMARY", page)
    monkeypatch.setattr(nightly, "RESULTS", tmp_path / "results")
    return page


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["nightly.py", "run", "near_misses", "--first", "1", *arguments])
    assert nightly.main() == 0


def test_a_run_writes_numbers_and_keeps_the_notes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "--count", "2")
    text = page.read_text()
    assert "2 examples, seeds from 1" in text and "old numbers" not in text
    assert text.endswith("\n## Notes\n\nWritten by hand.\n")
    (result,) = nightly.results_of("near_misses")
    assert result.done == result.tally["graphs"] == 2


def test_shares_are_the_graphs_of_one_run_and_a_resumed_run_goes_on(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--count", "5")
    whole = nightly.counted(nightly.results_of("near_misses")).tally()
    for asked in (Result("near_misses", 1, 0, 2), Result("near_misses", 1, 2, 3)):
        nightly.run(replace(asked, asked=1), 5.0)
        nightly.run(asked, 5.0, resume=True)
    assert [result.done for result in nightly.results_of("near_misses")] == [2, 3]
    assert nightly.counted(nightly.results_of("near_misses")).tally() == whole


def test_what_is_wrong_is_in_the_summary_with_the_command_that_repeats_it() -> None:
    wrong = "a block: what differs\n    python tests/properties/nightly.py replay near_misses 7"
    text = nightly.summary([[Result("near_misses", 0, 0, 100, done=10, tally={"wrong": [wrong]})]])
    assert wrong in text and "10 examples of 100 asked for, out of time (the examples 0 to 9)" in text
