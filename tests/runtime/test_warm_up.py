"""Inductor's first questions to the C++ compiler are asked while Dynamo captures."""

import subprocess
import sys

import pytest
from torch._inductor.async_compile import AsyncCompile

from fxfuse.runtime import warm_up

CHILD = """
import torch, fxfuse
from fxfuse.runtime import warm_up
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

fxfuse.optimize(torch.nn.Linear(2, 2), inner="eager")
assert warm_up.begin.cache_info().currsize == 0
fxfuse.optimize(torch.nn.Linear(2, 2, device="meta"))
assert warm_up.begin.cache_info().currsize == 0
fxfuse.optimize(torch.nn.Linear(2, 2))
assert warm_up.begin.cache_info().currsize == 1
warm_up.begin().join()
assert valid_vec_isa_list.cache_info().currsize == 1
"""


def test_optimize_begins_it_for_inductor_on_a_cpu() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_failing_compiler_is_left_to_the_graph_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", failing)
    with caplog.at_level("DEBUG", logger="fxfuse"):
        warm_up.begin.__wrapped__().join()
    assert "no compiler" in caplog.text
