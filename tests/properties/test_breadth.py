"""A handful of the models that `breadth.py` runs through optimize()."""

import json
from typing import Any

import breadth
import pytest


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_5_text"])
def test_a_model_of_another_family_is_right(model_type: str) -> None:
    row: dict[str, Any] = breadth.isolated(model_type)
    assert row["state"] == "right", json.dumps(row, indent=1)
    assert bool(row["matches"]) == (model_type != "gpt2"), "gpt2 has one projection for q, k and v already"


def test_without_passes_a_model_is_right_and_has_no_matches() -> None:
    row = breadth.isolated("llama", passes=())
    assert row["state"] == "right" and not row["matches"], json.dumps(row, indent=1)


def test_the_table_counts_and_lists_every_state() -> None:
    rows: list[dict[str, Any]] = [
        {"model_type": "b", "state": "wrong", "detail": "x|y", "seconds": 60.0},
        {
            "model_type": "a",
            "class": "A",
            "state": "right",
            "detail": "",
            "seconds": 60.0,
            "matches": {"r": 2},
        },
    ]
    text = breadth.table(rows)
    assert "2 model types in 2 minutes. 1 wrong, 1 right; 1 have matches." in text
    assert text.index("| a | A | right | r 2 |") < text.index("| b |  | wrong |  |  | x/y |")
