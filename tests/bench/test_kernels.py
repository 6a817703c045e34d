"""What bench/kernels.py says of the kernels: nothing spills, a spill is seen, and what it times is right."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxfuse.runtime.ops import gdn_decode_kernel

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module("kernels")


BOTH = {
    "rms_norm",
    "add_rms_norm",
    "gated_rms_norm",
    "silu_mul",
    "sigmoid_gate_mul",
    "gdn_gates",
    "qk_norm_rope",
    "qk_norm_rope_gate",
    "qkvzba_split",
}
PROMPT = {"causal_conv1d", "chunk_gated_delta_rule"}
DECODE = {"causal_conv1d_update", "recurrent_gated_delta_rule", "gdn_decode"}


@pytest.mark.parametrize(
    ("target", "length", "names"),
    [(("cuda", 90), 1, BOTH | DECODE), (("hip", "gfx942"), 8192, BOTH | PROMPT)],
)
def test_no_kernel_spills_where_three_value_heads_share_a_key_head(
    kernels: Any, target: Any, length: int, names: set[str]
) -> None:
    found = list(kernels.usages(["27b"], ["bfloat16"], [target], shapes=[(1, length)]))
    assert {x.work.partition(",")[0] for x in found} == names
    assert all(x.registers > 0 for x in found)
    assert [x for x in found if x.spilled] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_kernel_spills_at_any_size_for_any_target(kernels: Any, dtype: str) -> None:
    found = list(kernels.usages(list(kernels.WIDTHS), [dtype]))
    assert {x.target for x in found} == {"cuda 80", "cuda 90", "cuda 100", "hip gfx942"}
    assert [x for x in found if x.spilled] == []


@pytest.mark.parametrize(
    ("target", "head"), [(("cuda", 90), 128), pytest.param(("hip", "gfx942"), 256, marks=pytest.mark.slow)]
)
def test_a_spill_is_seen(kernels: Any, monkeypatch: pytest.MonkeyPatch, target: Any, head: int) -> None:
    monkeypatch.setattr(gdn_decode_kernel, "ELEMENTS_PER_WARP", head * head // 2)
    monkeypatch.setattr(kernels, "HEAD", head)
    monkeypatch.setattr(kernels, "works", only(kernels.works, "gdn_decode"))
    (usage,) = kernels.usages(["0.8b"], ["bfloat16"], [target], shapes=[(1, 1)])
    assert usage.warps == 2 and usage.spilled > 0


def only(works: Any, name: str) -> Any:
    return lambda *given: (work for work in works(*given) if work.name == name)


def test_what_it_times_is_right_under_the_interpreter() -> None:
    code = """
import torch, kernels
kernels.KEY_HEADS, kernels.HEAD, kernels.HEAD_DIM, kernels.ROTARY, kernels.CACHE = 2, 8, 8, 4, 6
widths, names = kernels.Widths(24, 6, 4, 2, 20), set()
for length in (1, 5):
    for work in kernels.works(widths, 2, length, torch.float32, "cpu"):
        assert kernels._matches(work), work.name
        assert work.bytes > 0
        names.add(work.name)
        if work.name == "gdn_decode":
            one, other = (kernels.copy.deepcopy(work.given) for _ in range(2))
            torch.testing.assert_close(kernels.three_launches(*one)(), work.launch(*other))
            torch.testing.assert_close(one[12], other[12])
            assert torch.equal(one[6], other[6])
            wrong = kernels.Work("", lambda *x: work.launch(*x) + 1, work.reference, work.given, 1)
            assert not kernels._matches(wrong)
print(len(names))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=BENCH,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["17"]
