"""What bench/kernels.py says of the kernels: nothing spills, a spill is seen, and what it times is right."""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
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
PROMPT = {"causal_conv1d", "causal_conv1d_update", "chunk_gated_delta_rule"}
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


@pytest.mark.parametrize("target", [("cuda", 90), ("hip", "gfx942")])
def test_a_step_over_few_columns_compiles_without_spills(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, target: Any
) -> None:
    def fewer(*given: Any) -> Iterator[Any]:
        for work in only(original, "gdn_decode")(*given):
            columns = work.given[6]
            yield replace(work, given=(*work.given[:6], columns[..., 1:], *work.given[7:]))

    original = kernels.works
    monkeypatch.setattr(kernels, "works", fewer)
    (usage,) = kernels.usages(["27b"], ["bfloat16"], [target], shapes=[(1, 1)])
    assert usage.registers > 0 and not usage.spilled


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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--kernel", "nope"], "invalid choice: 'nope' (choose from 'rms_norm', "),
        (["--batch", "0"], "argument --batch: 0: has to be at least 1"),
        (["--tokens", "1"], "argument --tokens: 1: has to be at least 2"),
        (["--size", "3b"], "invalid choice: '3b' (choose from '0.8b', "),
        (["--compile-only", "--json", "x.json"], "--compile-only prints a table"),
    ],
)
def test_wrong_arguments_are_said_before_anything_runs(
    kernels: Any, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        kernels.main(given)
    assert said in capsys.readouterr().err


def test_what_is_only_compiled_can_be_chosen(kernels: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--compile-only", "--size", "0.8b", "--batch", "2", "--tokens", "9", "--kernel", "silu_mul"]
    assert kernels.main(given) == 0
    *lines, total = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    rows = [line for line in lines if "0.8b" in line]
    assert {row[0] for row in rows} == {"silu_mul"} and int(total[0]) == len(rows)
    assert {" ".join(row[3:5]) for row in rows} == {"cuda 80", "cuda 90", "cuda 100", "hip gfx942"}


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
    assert interpreted(code) == ["18"]


TINY = """
import dataclasses, torch, kernels, harness
kernels.KEY_HEADS, kernels.HEAD, kernels.HEAD_DIM, kernels.ROTARY, kernels.CACHE = 2, 8, 8, 4, 6
kernels.WIDTHS = {"tiny": kernels.Widths(24, 6, 4, 2, 20)}
kernels._timed = lambda function: lambda: (function(), 1.0)[1]
options = kernels.parser().parse_args(["--dtype", "float32", "--claims"])
options.device = "cpu"
def measured(batch, length):
    cases = list(kernels._cases(options, "tiny", "float32", batch, length))
    skipped = [x for x in cases if isinstance(x, harness.Skipped)]
    whole = [x for x in cases if isinstance(x, harness.Case)]
    limit = harness.Limits(1.0, {})
    return skipped, [r for case in whole for r in harness.measure(case, limit, rounds=1, warmup=1)]
"""


def interpreted(code: str) -> list[str]:
    """Lines that the code prints, in a process with Triton's interpreter, in the folder of the benchmarks."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=BENCH,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()


def test_what_is_claimed_is_measured_and_said_to_be_met_or_missed() -> None:
    lines = interpreted(
        TINY
        + """
kernels.CLAIMS = tuple(dataclasses.replace(c, batches=(1, 2), lengths=(1, 9)) for c in kernels.CLAIMS)
for batch, length in ((2, 1), (1, 5)):
    skipped, results = measured(batch, length)
    assert not skipped and all(r.output_matched and r.ran_fused >= r.fused_expected for r in results), results
    print("\\n".join(kernels.verdicts(results)))
"""
    )
    met = [line for line in lines if line.startswith("met: ")]
    missed = [line for line in lines if line.startswith("MISSED: ")]
    assert len(met) == 2 + 5 + 5 and {*met, *missed} == set(lines)
    (line,) = missed
    assert line == ("MISSED: gdn_decode, tiny float32, batch 2, 1 token: 1.00, claimed 2.00 x three launches")


def test_a_peer_that_fails_is_said_to_and_the_others_are_measured() -> None:
    lines = interpreted(
        TINY
        + """
def broken(*given):
    raise RuntimeError("out of luck\\nand more")
options.claims, options.kernel = False, ["gdn_decode"]
kernels.three_launches, kernels.NOT_COMPILED = broken, ("gdn_decode",)
skipped, results = measured(1, 1)
print(*skipped, [r.peer for r in results])
print(*kernels.verdicts(results))
kernels.gdn_decode.launch = broken
skipped, results = measured(1, 1)
print(*skipped, results)
"""
    )
    assert lines[0].endswith("reason='RuntimeError: out of luck') ['fxfuse', 'a copy of as many bytes']")
    assert "batch 1, 1 token, three launches'" in lines[0]
    case = "gdn_decode, tiny float32, batch 1, 1 token"
    assert lines[1] == f"NOT MEASURED: {case}: claimed 2.00 x three launches"
    assert lines[2].endswith("batch 1, 1 token, fxfuse', reason='RuntimeError: out of luck') []")


def test_no_case_begins_when_the_time_is_up(kernels: Any) -> None:
    options = kernels.parser().parse_args(["--size", "27b", "--minutes", "-1", "--batch", "1", "8"])
    found = [x for x in kernels.cases(options) if "time was up" in x.reason]
    assert [x.case for x in found] == [
        "every kernel, 27b bfloat16, batch 1, 1 token",
        "every kernel, 27b bfloat16, batch 8, 1 token",
        "every kernel, 27b bfloat16, batch 1, 8192 tokens",
    ]
