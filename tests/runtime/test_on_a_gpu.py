"""A whole model on a CUDA device, by kernels: prompts, tokens and a prompt that goes on, as the plain one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, StaticCache

import fxfuse

Make = Callable[..., Any]
DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=96),
}
LENGTHS = (70, 1, 1, 12, 1)


def logits(model: Any, cache: str, ids: Tensor) -> list[Tensor]:
    past, found, start = CACHES[cache](model), [], 0
    with torch.no_grad():
        for length in LENGTHS:
            given = ids[:, start : start + length]
            found.append(model(given, past_key_values=past, use_cache=True).logits.clone())
            start += length
    return found


@pytest.mark.parametrize("kind", ["contiguous", "interleaved"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(
    ("inner", "dtype"), [("eager", torch.float32), ("eager", torch.bfloat16), ("inductor", torch.bfloat16)]
)
def test_a_model_gives_what_it_gave(
    make_model: Make, make_next: Make, kind: str, cache: str, inner: str, dtype: torch.dtype
) -> None:
    plain = (make_model if kind == "contiguous" else make_next)().to(DEVICE, dtype)
    ids = torch.randint(1, 300, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = logits(copy.deepcopy(plain).double(), cache, ids)
    expected = logits(copy.deepcopy(plain), cache, ids)
    model = fxfuse.optimize(plain, inner=inner)
    got = logits(model, cache, ids)
    report = model.optimization_report
    assert report.calls == len(LENGTHS) and not report.misses, report
    assert {"gdn_decode", "qk_norm_rope_gate"} <= {row.rule for row in report.rows}
    for ours, theirs, right in zip(got, expected, exact, strict=True):
        mine, original = ((x.double() - right).square().mean().sqrt() for x in (ours, theirs))
        assert mine <= 1.5 * original + 1e-5 * right.square().mean().sqrt()


def test_tokens_are_replayed_from_a_recording_whatever_the_address_of_the_cache(make_model: Make) -> None:
    plain = make_model().to(DEVICE)
    model = fxfuse.optimize(copy.deepcopy(plain), mode="reduce-overhead")
    counters.clear()
    kept = []
    for seed in range(2):
        kept.append(torch.empty(2**20, device=DEVICE))  # so that the next cache lies elsewhere
        ids = torch.randint(1, 300, (2, 21), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        how = {"do_sample": False, "max_new_tokens": 20, "min_new_tokens": 20}
        expected = plain.generate(ids, cache_implementation="static", disable_compile=True, **how)
        assert torch.equal(model.generate(ids, cache_implementation="static", **how), expected)
    assert [graph.phase for graph in model.optimization_report.graphs] == ["prefill", "decode"]
    assert not any("CUDA graph" in note for note in model.optimization_report.notes)
    assert not counters["inductor"]["cudagraph_skips"]


def test_a_model_on_another_device_than_the_current_one(make_model: Make) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    plain = make_model().to("cuda:1")
    ids = torch.randint(1, 300, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0)).to("cuda:1")
    expected = logits(copy.deepcopy(plain), "static", ids)
    got = logits(fxfuse.optimize(plain, inner="eager"), "static", ids)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
