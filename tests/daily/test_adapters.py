"""LoRA through PEFT, put on before and after optimize(): the base merges, and nothing is stale.

Needs peft: `make test-extras` has an environment with it.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from fxfuse.runtime import live_weights

peft = pytest.importorskip("peft", reason="peft is not installed: make test-extras has it")

Make = Callable[..., Any]
TARGETS = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "gate_proj",
    "up_proj",
]
BASE = {
    "linear_attn.in_proj_qkv_base_layer_z_base_layer_b_a",
    "self_attn.q_k_v_proj_base_layer",
    "mlp.gate_up_proj_base_layer",
}


def lora(**more: Any) -> Any:
    """Adapters that change the answer from the first call on."""
    return peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM", **more
    )


def adapted(make_model: Make, **more: Any) -> tuple[Any, Any]:
    """A plain model with adapters, and an optimised one with the same weights."""
    torch.manual_seed(1)
    plain = peft.get_peft_model(make_model(), lora(**more)).eval()
    return plain, fxfuse.optimize(copy.deepcopy(plain), inner="eager")


def report_of(model: Any) -> fxfuse.Report:
    return model.get_base_model().optimization_report


def merged(report: fxfuse.Report, graph: int = -1) -> set[str]:
    matches = (m for o in report.graphs[graph].outcomes.values() for m in o.matches)
    return {m.where.split(".layers.")[1].partition(".")[2] for m in matches}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def same(plain: Any, model: Any, ids: Tensor) -> Tensor:
    report = report_of(model) if hasattr(model, "get_base_model") else model.optimization_report
    calls = report.calls
    got, expected = logits(model, ids), logits(plain, ids)
    assert report.calls == calls + 1
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    return expected


def test_adapters_before_optimize(make_model: Make, prompt: Tensor) -> None:
    plain, model = adapted(make_model)
    with_adapter = same(plain, model, prompt)
    assert merged(report_of(model)) >= BASE
    with plain.disable_adapter(), model.disable_adapter():
        without = same(plain, model, prompt)
    assert (with_adapter - without).abs().max() > 1e-2
    same(plain, model, prompt)
    how = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    assert torch.equal(model.generate(input_ids=prompt, **how), plain.generate(input_ids=prompt, **how))


def test_the_small_products_of_adapters_stay_apart_and_say_so(make_model: Make, prompt: Tensor) -> None:
    """Merged they were not faster: docs/performance.md has the numbers."""
    plain, model = adapted(make_model)
    same(plain, model, prompt)
    report = report_of(model)
    assert merged(report) == BASE
    left = {miss.where.split(".")[-2]: miss.reason for miss in misses(report.graphs[-1])}
    assert "low-rank product" in left.pop("lora_A")
    # what nothing but its own adapter reads the input of
    assert left == dict.fromkeys(("o_proj", "out_proj"), "no other linear of its kind reads the same input")


def test_adapters_after_optimize_and_the_way_back(make_model: Make, prompt: Tensor) -> None:
    bare = make_model()
    plain, model = copy.deepcopy(bare), fxfuse.optimize(copy.deepcopy(bare), inner="eager")
    before = same(plain, model, prompt)
    torch.manual_seed(2)
    plain = peft.get_peft_model(plain, lora()).eval()
    torch.manual_seed(2)
    model = peft.get_peft_model(model, lora()).eval()
    with_adapter = same(plain, model, prompt)
    assert (with_adapter - before).abs().max() > 1e-2 and merged(report_of(model)) >= BASE
    model = model.unload()
    torch.testing.assert_close(same(bare, model, prompt), before)
    assert model.deoptimize() is model
    assert all(torch.equal(p, bare.get_parameter(n)) for n, p in model.named_parameters())
    assert live_weights.packed_bytes(model.parameters()) == 0


@pytest.mark.parametrize("again", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_merging_unmerging_and_deleting_an_adapter_is_seen_at_once(
    make_model: Make, prompt: Tensor, again: bool
) -> None:
    plain, model = adapted(make_model)
    start = same(plain, model, prompt)
    for _ in range(1 + again):
        for each in (plain, model):
            each.merge_adapter()
        torch.testing.assert_close(same(plain, model, prompt), start, atol=1e-4, rtol=1e-4)
        for each in (plain, model):
            each.unmerge_adapter()
        torch.testing.assert_close(same(plain, model, prompt), start, atol=1e-4, rtol=1e-4)
    for each in (plain, model):
        torch.manual_seed(5)
        each.add_adapter("second", lora())
        each.set_adapter("second")
    assert (same(plain, model, prompt) - start).abs().max() > 1e-2
    for each in (plain, model):
        each.delete_adapter("second")
        each.set_adapter("default")
    torch.testing.assert_close(same(plain, model, prompt), start, atol=1e-4, rtol=1e-4)
    whole = model.merge_and_unload()
    torch.testing.assert_close(same(plain, whole, prompt), start, atol=1e-4, rtol=1e-4)


def test_training_adapters_keeps_the_base_merged_and_gives_every_adapter_its_gradient(
    make_model: Make, prompt: Tensor
) -> None:
    """Rollout and training step in turns, as reinforcement learning has them: nothing is packed twice."""
    plain, model = adapted(make_model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (plain, model)]
    for _ in range(4):
        same(plain, model, prompt)
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            each.train()
            optimizer.zero_grad()
            each(input_ids=prompt, labels=prompt, use_cache=False).loss.backward()
            optimizer.step()
            each.eval()
        expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
        got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert got.keys() == expected.keys() and len(got) == 2 * 11 and all("lora_" in n for n in got)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: n + m)
    report = report_of(model)
    trained = [i for i, g in enumerate(report.graphs) if any("grad mode" in m.reason for m in misses(g))]
    assert len(trained) == 1 and merged(report, trained[0]) == BASE
    assert all(graph.packs <= 1 for graph in report.graphs)
    assert not report.failures and not any("runs as it was" in note for note in report.notes)


def misses(graph: Any) -> list[Any]:
    return [miss for outcome in graph.outcomes.values() for miss in outcome.misses]


def test_what_peft_saves_is_what_it_saves_of_a_plain_model(
    make_model: Make, prompt: Tensor, tmp_path: Any
) -> None:
    plain, model = adapted(make_model)
    same(plain, model, prompt)
    for each, name in ((plain, "plain"), (model, "packed")):
        each.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "packed")]
    assert files[0] == files[1]
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path / "packed").eval()
    torch.testing.assert_close(logits(again, prompt), logits(plain, prompt), atol=1e-5, rtol=1e-4)
