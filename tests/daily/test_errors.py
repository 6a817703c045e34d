"""Errors and warnings of ours: one family, messages that name the thing, warnings once, by logging."""

import ast
import builtins
import importlib
import logging
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import errors
from fxfuse.errors import FxfuseError

ROOT = Path(__file__).parents[2]
FOLDERS = ("src/fxfuse", "runtime", "passes", "patterns")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# What Python itself asks of a module, an attribute or a call that is not there.
PROTOCOL = {"ImportError", "AttributeError", "NotImplementedError"}
# Where another exception is right: (file, exception) and why.
EXEMPT = {
    ("runtime/safetensors_file.py", "ValueError"): "a hook of the JSON parser; its caller turns it into ours",
    ("runtime/ops/triton_kernel.py", "TypeError"): "an object that is not callable, as Python says it",
}


def raised(path: Path) -> Iterator[tuple[int, str, ast.Raise]]:
    """Every `raise Name` and `raise Name(...)` of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            called = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            yield node.lineno, name, node


def classes() -> dict[str, type]:
    """Every exception class that is defined in one of our modules."""
    found: dict[str, type] = {}
    for module in pkgutil.walk_packages(fxfuse.__path__, "fxfuse."):
        if not module.name.endswith("__main__"):
            loaded = importlib.import_module(module.name)
            for name, value in vars(loaded).items():
                if (
                    isinstance(value, type)
                    and issubclass(value, BaseException)
                    and value.__module__ == module.name
                ):
                    found[name] = value
    return found


def caught_beside(path: Path, name: str) -> bool:
    """Whether a class that steers the control flow is caught in a file of the same folder."""
    return any(
        isinstance(handler, ast.ExceptHandler)
        and handler.type is not None
        and name in ast.unparse(handler.type)
        for other in path.parent.glob("*.py")
        for handler in ast.walk(ast.parse(other.read_text(encoding="utf-8")))
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_raised_is_ours(path: Path) -> None:
    where, own = path.relative_to(ROOT).as_posix(), classes()
    for line, name, _ in raised(path):
        if name in PROTOCOL or (where, name) in EXEMPT or where.startswith("src/fxfuse/testing/"):
            continue
        if hasattr(builtins, name):
            pytest.fail(f"{where}:{line} raises {name}: raise a class of fxfuse.errors that derives from it")
        kind = own.get(name)
        ours = kind is None or issubclass(kind, FxfuseError) or caught_beside(path, name)
        assert ours, f"{where}:{line}: {name} is no FxfuseError and is not caught beside"


def test_the_exemptions_are_still_needed() -> None:
    found = {(p.relative_to(ROOT).as_posix(), name) for p in FILES for _, name, _ in raised(p)}
    assert found >= EXEMPT.keys()


def test_public_exceptions_derive_from_one_and_say_what_they_mean() -> None:
    public = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, BaseException)]
    assert len(public) >= 7
    for kind in public:
        assert issubclass(kind, FxfuseError) and kind.__doc__ and kind.__doc__.endswith(".")
        assert getattr(fxfuse, kind.__name__) is kind


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_message_is_without_the_thing_it_is_about(path: Path) -> None:
    """A message is put together from what was found, or is long enough to say what to do."""
    for line, name, node in raised(path):
        if not name.endswith("Error") or not isinstance(node.exc, ast.Call) or name in PROTOCOL:
            continue
        assert node.exc.args, f"{path.name}:{line}: {name} without a message"
        message = node.exc.args[0]
        if isinstance(message, ast.Constant):
            assert len(str(message.value)) > 30, f"{path.name}:{line}: {message.value!r} names nothing"


def test_we_speak_through_one_logger_and_print_nothing() -> None:
    speakers = {"runtime/demo.py", "src/fxfuse/cli.py", "runtime/report.py", "runtime/random_checkpoint.py"}
    for path in FILES:
        where = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called != "warnings.warn", f"{where}:{node.lineno}: warnings go through logging"
            if called == "logging.getLogger" and where != "runtime/unread_logs.py":  # which asks who listens
                assert ast.unparse(node.args[0]) == "'fxfuse'", f"{where}:{node.lineno}"
            if called == "print" and where not in speakers:
                pytest.fail(f"{where}:{node.lineno} prints")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).relu() * self.up(x)


def test_a_warning_comes_once_however_often_the_model_is_called(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fxfuse.runtime import live_weights

    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(live_weights.Packed, "empty", no_memory)
    model = fxfuse.optimize(Gated(), inner="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            model(torch.randn(3, 8))
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and said[0].name == "fxfuse" and "packing failed" in said[0].getMessage()


def test_an_operator_says_which_tensors_do_not_fit() -> None:
    with pytest.raises(fxfuse.ShapeError, match="rms_norm"):
        torch.ops.fxfuse.rms_norm(torch.randn(2, 8), torch.randn(5), 1e-6, True)
