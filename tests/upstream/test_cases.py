"""The list of bugs that peers had is whole, and names tests that exist."""

import re

import pytest
from cases import GRAPHS, MODELS, PAGE, ROOT, nodes, page, state


@pytest.mark.parametrize("row", [*GRAPHS, *MODELS], ids=lambda row: row[0].replace(" ", ""))
def test_a_row_names_tests_that_exist_or_says_why_there_is_none(row: tuple[str, str, str]) -> None:
    where = row[2]
    assert nodes(where) or state(where) == "not shown"
    for node in nodes(where):
        path, name = node.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / path).read_text(), re.M), node


def test_the_page_is_what_the_list_says() -> None:
    assert PAGE.read_text() == page(), "python tests/upstream/cases.py writes it anew"


def test_every_test_of_a_bug_is_in_the_list() -> None:
    listed = {node for _, _, where in (*GRAPHS, *MODELS) for node in nodes(where)}
    names = re.findall(
        r"^def (test_\w+)\(", (ROOT / "tests/upstream/test_graph_rewriting.py").read_text(), re.M
    )
    assert {f"upstream/test_graph_rewriting.py::{name}" for name in names} <= listed
