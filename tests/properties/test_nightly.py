"""The command with the large numbers: its summary, and what stays of a page that is written anew."""

import json
from pathlib import Path

import nightly
import pytest


def test_a_run_writes_numbers_and_keeps_the_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "nightly.md"
    page.write_text("# Old\n\nold numbers\n\n## Notes\n\nWritten by hand.\n")
    monkeypatch.setattr(nightly, "SUMMARY", page)
    monkeypatch.setattr(nightly, "RESULTS", tmp_path / "results")
    arguments = ["nightly.py", "run", "near_misses", "--count", "2", "--first", "1", "--minutes", "5"]
    monkeypatch.setattr("sys.argv", arguments)
    assert nightly.main() == 0
    text = page.read_text()
    assert "2 examples, seeds from 1" in text and "old numbers" not in text
    assert text.endswith("\n## Notes\n\nWritten by hand.\n")
    assert json.loads((tmp_path / "results" / "near_misses.json").read_text())["done"] == 2


def test_what_is_wrong_is_in_the_summary_with_the_command_that_repeats_it() -> None:
    wrong = "a block: what differs\n    python tests/properties/nightly.py replay near_misses 7"
    result = nightly.Result("near_misses", first=0, asked=100, done=10, wrong=[wrong])
    text = nightly.summary([result])
    assert wrong in text and "10 examples of 100 asked for, out of time" in text
