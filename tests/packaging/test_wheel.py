"""What a built wheel holds: everything under `fxfuse`, nothing beside it, and it works from anywhere."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    # From a copy: setuptools writes build/ beside pyproject.toml, and a stale build/ leaks into wheels.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("src", "passes", "patterns", "runtime", "tests", "bench"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
    out = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("fxfuse-*.whl"))


def test_the_wheel_holds_every_package_and_nothing_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fxfuse"}
    packages = {os.path.dirname(name).replace("/", ".") for name in names if name.endswith("/__init__.py")}
    assert packages == set(PACKAGES)
    assert not [name for name in names if "test_" in name]


def test_the_wheel_has_every_module_of_the_checkout(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    folders = {"fxfuse": "src/fxfuse", "fxfuse/passes": "passes", "fxfuse/patterns": "patterns"}
    folders["fxfuse/runtime"] = "runtime"
    here = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in folders.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert packed == here


def test_the_wheel_runs_from_inside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    # The checkout's own passes/ and runtime/ lie in the working directory and must not get in the way.
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import fxfuse, fxfuse.passes, fxfuse.runtime as runtime; print(fxfuse.__file__, runtime.__file__)"
    # -S -E would hide torch, so the wheel only goes first on the path, before an editable install.
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert all(path.startswith(str(tmp_path)) for path in result.stdout.split())
