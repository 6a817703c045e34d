"""The five top-level folders install as one import package, and nothing else does."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fxfuse

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
FOLDERS = PYPROJECT["tool"]["setuptools"]["package-dir"]


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)


def test_every_package_folder_is_listed_in_pyproject() -> None:
    found = {
        ".".join([package, *folder.relative_to(ROOT / root).parts])
        for package, root in FOLDERS.items()
        for init in (ROOT / root).rglob("__init__.py")
        for folder in [init.parent]
    }
    assert found == set(PACKAGES)


def test_the_links_for_use_without_an_install_are_the_whole_package() -> None:
    """Type checkers read them, and a machine where nothing can be installed runs them."""
    links, modules = ROOT / ".typings/fxfuse", ROOT / "src/fxfuse"
    expected = {
        file.name: file for file in modules.iterdir() if file.suffix == ".py" or file.name == "testing"
    }
    expected |= {name: ROOT / name for name in ("passes", "patterns", "runtime")}
    assert {link.name: link.resolve() for link in links.iterdir() if link.name != "__pycache__"} == expected
    assert all(not link.readlink().is_absolute() for link in links.iterdir() if link.is_symlink())


def test_every_folder_with_modules_is_a_package() -> None:
    bare = {
        str(file.parent.relative_to(ROOT))
        for root in FOLDERS.values()
        for file in (ROOT / root).rglob("*.py")
        if not (file.parent / "__init__.py").is_file()
    }
    assert bare == set()


@pytest.mark.parametrize("name", ["passes", "patterns", "runtime"])
def test_a_mandated_package_refuses_its_bare_name(name: str) -> None:
    bare = python("-c", f"import {name}")
    assert bare.returncode == 1
    assert "ImportError" in bare.stderr
    assert f"fxfuse.{name}" in bare.stderr
    assert python("-c", f"import fxfuse.{name}").returncode == 0


def test_dynamo_lists_the_backend_without_an_import_of_fxfuse(tmp_path: Path) -> None:
    code = (
        "import sys, torch; names = torch._dynamo.list_backends(exclude_tags=());"
        "print('fxfuse' in names, 'fxfuse' in sys.modules)"
    )
    listed = python("-c", code, cwd=tmp_path)
    assert listed.stdout.split() == ["True", "False"], listed.stderr


def test_there_is_one_version() -> None:
    assert fxfuse.__version__ == PYPROJECT["project"]["version"]


def test_patterns_are_data_that_import_neither_passes_nor_runtime() -> None:
    imported = {
        name
        for file in (ROOT / "patterns").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert not [name for name in imported if re.match(r"fxfuse\.(passes|runtime)\b", name)]


def test_no_tests_lie_inside_the_packages() -> None:
    assert not [
        file
        for root in FOLDERS.values()
        for file in (ROOT / root).rglob("*.py")
        if file.name.startswith("test_") or file.name == "conftest.py"
    ]


# Spelt in pieces, so that this file does not find itself.
MACHINE_PATH = "|".join(["/" + "work/", "/" + r"home/\w", "/" + r"root\b", "/" + "opt/", "/" + r"Users/\w"])
HALF_MERGED = "^(" + "<" * 7 + "|" + ">" * 7 + ") "


@pytest.mark.parametrize("unwanted", [MACHINE_PATH, HALF_MERGED], ids=["machine paths", "conflict markers"])
def test_no_tracked_file_contains(unwanted: str) -> None:
    found = []
    for file in tracked_files():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        matches = re.finditer(unwanted, text, re.MULTILINE)
        found += [f"{file.relative_to(ROOT)}: {match[0]}" for match in matches]
    assert found == []


def test_every_environment_pins_the_same_torch() -> None:
    base = (ROOT / "constraints-base.txt").read_text()
    assert re.search(r"^torch==\d+\.\d+\.\d+$", base, re.MULTILINE)
    for name in ("constraints.txt", "constraints-oldest.txt"):
        lines = (ROOT / name).read_text().splitlines()
        pins = [line for line in lines if line and not line.startswith("#")]
        assert pins[0] == "-c constraints-base.txt"
        assert [pin.split("==")[0] for pin in pins[1:]] == ["transformers"]


def test_the_environments_span_the_supported_transformers() -> None:
    dependencies = PYPROJECT["project"]["dependencies"]
    floor = next(d for d in dependencies if d.startswith("transformers")).split(">=")[1].split(",")[0]
    assert f"transformers=={floor}." in (ROOT / "constraints-oldest.txt").read_text()
