"""Every Python block and every command of the pages runs, page by page and in order; links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fxfuse import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)

# What a reader brings along: a folder with a checkpoint, under the names that the pages use.
PREPARED = """
import torch
checkpoint = folder = {folder!r}
torch.set_num_threads(1)
"""


def blocks(page: Path) -> list[str]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def checkpoint(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder, max_shard_size="100KB")  # several files, as large ones have
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page: Path, checkpoint: Path, tmp_path: Path) -> None:
    """In a process of its own, as a reader would; the line of an error is that of the page."""
    text = page.read_text(encoding="utf-8")
    code = PREPARED.format(folder=str(checkpoint))
    for block in FENCE.finditer(text):
        line = text[: block.start(1)].count("\n")
        source = "\n" * line + block[1]
        code += f"exec(compile({source!r}, {str(page)!r}, 'exec'))\n"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


# What a page tells to type. `fxfuse demo` is minutes; tests/runtime/test_demo.py has it.
VERBS = ("inspect", "explain", "convert", "verify")
COMMAND = re.compile(
    rf"^(?:\$ )?(fxfuse (?:{'|'.join(VERBS)}) .+?)(?: {{2,}}.*)?$|`(fxfuse (?:{'|'.join(VERBS)}) [^`]+)`",
    re.M,
)
PLACES = ("FOLDER", "A", "B")


def commands(page: Path) -> list[str]:
    return [first or second for first, second in COMMAND.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.name)
def test_the_commands_of_a_page_run_in_order(
    page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        words = [str(checkpoint) if word in PLACES else word for word in command.split()[1:]]
        result = CliRunner().invoke(cli.app, words)
        assert result.exit_code == 0, f"{command}: {result.stderr}"


def test_the_pages_have_commands_of_every_verb() -> None:
    """Or the test above would hold for pages that its pattern does not read."""
    told = {command.split()[1] for page in PAGES for command in commands(page)}
    assert told == set(VERBS)


def test_make_targets_and_paths_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        told = re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.M)
        assert {target for words in told for target in words.split()} <= targets, page.name
        for path in re.findall(r"`((?:bench|docs|examples|passes|patterns|runtime|tests)/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.slow
def test_the_example_generates_the_same_tokens_and_writes_its_page(checkpoint: Path, tmp_path: Path) -> None:
    script, page = ROOT / "examples" / "generate.py", tmp_path / "report.html"
    found = subprocess.run(
        [sys.executable, str(script), str(checkpoint), "--inner", "eager", "--html", str(page)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert "the same tokens: True" in found.stdout and "ms a call" in found.stdout and page.is_file()


def test_the_pass_of_the_how_to_page_is_shorter_than_60_lines() -> None:
    first = blocks(ROOT / "docs" / "how-to-write-a-pass.md")[0]
    assert "program.permuted" in first and len(first.splitlines()) < 60


def test_the_reference_is_what_the_docstrings_say() -> None:
    """`make docs` writes it anew."""
    found = subprocess.run(
        [sys.executable, "-c", "import make_api; print(make_api.page() == make_api.PAGE.read_text('utf-8'))"],
        capture_output=True,
        text=True,
        cwd=ROOT / "docs",
    )
    assert found.stdout == "True\n", found.stderr[-2000:] or "docs/api.md is out of date: make docs"


def test_the_reference_has_every_public_name() -> None:
    import fxfuse

    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert all(f"### `fxfuse.{name}`" in page for name in fxfuse.__all__)
