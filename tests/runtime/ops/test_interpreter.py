"""Every kernel runs under Triton's interpreter, where no GPU is needed."""

import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxfuse.runtime.ops

KERNELS = Path(__file__).parent / "kernels"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_every_operator_with_a_kernel_has_tests_of_it() -> None:
    names = [module.name for module in pkgutil.iter_modules(fxfuse.runtime.ops.__path__)]
    with_kernel = {
        name
        for name in names
        if hasattr(importlib.import_module(f"fxfuse.runtime.ops.{name}"), "launch")
        and name != "gate_product"
        and not name.endswith("_kernel")  # a part of the operator's file
    }
    tested = {path.stem.removeprefix("test_") for path in KERNELS.glob("test_*.py")} - {"strides"}
    assert with_kernel and with_kernel == tested


def passed_under_the_interpreter(marks: str) -> int:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks, str(KERNELS)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    return int(passed[1]) if passed else 0


@needs_triton
def test_every_kernel_is_its_reference_under_the_interpreter() -> None:
    assert passed_under_the_interpreter("not slow") >= 2 * len(list(KERNELS.glob("test_*.py")))


@pytest.mark.slow
@needs_triton
def test_a_thousand_steps_under_the_interpreter() -> None:
    assert passed_under_the_interpreter("slow") >= 1


def test_the_operators_import_without_triton_and_do_not_import_it() -> None:
    code = """
import sys
{}
import torch, fxfuse.runtime.ops
assert not any(name.partition(".")[0] == "triton" and module for name, module in sys.modules.items())
from fxfuse.runtime.ops.rms_norm import rms_norm
assert rms_norm(torch.ones(2, 3), torch.ones(3), 1e-6, False).shape == (2, 3)
"""
    for triton in ("", "sys.modules['triton'] = None"):
        run = subprocess.run([sys.executable, "-c", code.format(triton)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
