"""The list of bugs that peers had is whole, and names tests that exist."""

import re
from pathlib import Path

import pytest
from cases import GRAPHS, MODELS, OTHERS, PAGE, ROOT, nodes, page, state


@pytest.mark.parametrize("row", [*GRAPHS, *MODELS, *OTHERS], ids=lambda row: row[0].replace(" ", ""))
def test_a_row_names_tests_that_exist_or_says_why_there_is_none(row: tuple[str, str, str]) -> None:
    where = row[2]
    assert nodes(where) or state(where) == "not shown"
    for node in nodes(where):
        path, name = node.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / path).read_text(), re.M), node


def test_the_page_is_what_the_list_says() -> None:
    assert PAGE.read_text() == page(), "python tests/upstream/cases.py writes it anew"


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("test_*.py")), ids=lambda file: file.stem)
def test_every_test_of_a_bug_is_in_the_list(file: Path) -> None:
    listed = {node for _, _, where in (*GRAPHS, *MODELS, *OTHERS) for node in nodes(where)}
    names = re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)
    assert file == Path(__file__) or {f"upstream/{file.name}::{name}" for name in names} <= listed
