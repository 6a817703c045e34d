"""The life of a model after optimize(): dtypes, devices, hooks, modes, other models, threads and processes.

Ways of saving are in tests/runtime/test_saving.py, exchanged weights in tests/runtime/test_live_weights.py.
"""

import copy
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfuse
from fxfuse.runtime import live_weights

Make = Callable[..., Any]
ONE = ("full_attention",)


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """The optimised answer; fails where no compiled graph of ours ran."""
    calls = model.optimization_report.calls
    with torch.no_grad():
        found = model(ids, **kwargs).logits
    assert model.optimization_report.calls == calls + 1
    return found


def in_threads(function: Callable[[int], None], count: int) -> None:
    """Call the function with each number below `count`, all at the same time."""
    threads = [threading.Thread(target=function, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def plain(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward(ids).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_and_back(make_model: Make, prompt: Tensor, dtype: torch.dtype) -> None:
    model = make_model(layers=ONE).optimize(inner="eager")
    logits(model, prompt)
    packed = live_weights.packed_bytes(model.parameters())
    for each in (dtype, torch.float32):
        model.to(each)
        assert live_weights.packed_bytes(model.parameters()) == 0
        got = logits(model, prompt)
        assert got.dtype == each
        torch.testing.assert_close(got, plain(model, prompt), rtol=0.05, atol=0.05)
        assert live_weights.packed_bytes(model.parameters()) == packed * each.itemsize // 4
    assert not model.optimization_report.failures


def test_half_precision_and_back(make_model: Make, prompt: Tensor) -> None:
    model = make_model(layers=ONE).optimize(inner="eager")
    logits(model, prompt)
    model.half()
    torch.testing.assert_close(logits(model, prompt), plain(model, prompt), rtol=0.02, atol=0.02)
    assert next(model.parameters()).dtype == torch.float16 and not model.optimization_report.failures


def test_under_inference_mode_with_weights_made_and_packed_outside(make_model: Make, prompt: Tensor) -> None:
    model = make_model().optimize(inner="eager")
    with torch.inference_mode():
        calls = model.optimization_report.calls
        got = model(prompt).logits
        assert model.optimization_report.calls == calls + 1
    torch.testing.assert_close(got, plain(model, prompt), atol=1e-5, rtol=1e-4)
    assert live_weights.packed_bytes(model.parameters()) > 0
    assert not any(p.is_inference() for p in model.parameters())
    model(prompt, labels=prompt, use_cache=False).loss.backward()  # and they can be trained


def test_several_optimised_models_in_turns_keep_their_own_answers(make_model: Make, prompt: Tensor) -> None:
    models = [make_model(layers=ONE, seed=seed).optimize(inner="eager") for seed in range(3)]
    expected = [plain(model, prompt) for model in models]
    for _ in range(2):
        for model, answer in zip(models, expected, strict=True):
            torch.testing.assert_close(logits(model, prompt), answer, atol=1e-5, rtol=1e-4)
    models[1].deoptimize()
    with torch.no_grad():
        assert torch.equal(models[1](prompt).logits, expected[1])
    torch.testing.assert_close(logits(models[2], prompt), expected[2], atol=1e-5, rtol=1e-4)


def test_threads_that_call_one_model_at_the_same_time_get_their_own_answers(make_model: Make) -> None:
    model = make_model(layers=ONE).optimize(inner="eager")
    prompts = [
        torch.randint(1, 300, (1, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    expected = [plain(model, ids) for ids in prompts]
    logits(model, prompts[0])
    wrong: list[str] = []
    barrier = threading.Barrier(len(prompts), timeout=120)

    def caller(i: int) -> None:
        barrier.wait()
        for _ in range(5):
            with torch.no_grad():
                got = model(prompts[i]).logits
            if not torch.allclose(got, expected[i], atol=1e-4):
                wrong.append(f"thread {i}: off by {(got - expected[i]).abs().max():.3g}")

    in_threads(caller, len(prompts))
    assert not wrong and not model.optimization_report.failures
    assert model.optimization_report.calls >= 1 + 5 * len(prompts) - len(prompts)


@pytest.mark.parametrize("grad", [False, True])
def test_threads_that_meet_at_the_first_call_get_their_own_answers(make_model: Make, grad: bool) -> None:
    """Each may compile; half of them with gradients, where grad is on, which is another graph."""
    model = make_model(layers=ONE * 2).requires_grad_(False)
    model.model.norm.weight.requires_grad_(grad)
    prompts = [
        torch.randint(1, 300, (1, 5 + i % 2), generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    expected = [plain(model, ids) for ids in prompts]
    model.optimize(inner="eager")
    wrong: list[str] = []
    barrier = threading.Barrier(len(prompts), timeout=120)

    def caller(i: int) -> None:
        try:
            barrier.wait()
            for _ in range(2):
                with torch.set_grad_enabled(grad and i >= 2):
                    got = model(prompts[i]).logits
                assert got.requires_grad == (grad and i >= 2), "another thread's mode"
                torch.testing.assert_close(got.detach(), expected[i], atol=1e-4, rtol=1e-4)
        except Exception as error:
            wrong.append(f"thread {i}: {type(error).__name__}: {error}")

    in_threads(caller, len(prompts))
    assert not wrong, wrong
    assert not model.optimization_report.failures and model.optimization_report.calls == 2 * len(prompts)


def test_autocast_that_comes_and_goes_around_calls(make_model: Make, prompt: Tensor) -> None:
    model = make_model().optimize(inner="eager")
    reference = copy.deepcopy(model).double()
    for on in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            got, own = logits(model, prompt), plain(model, prompt)
        exact = plain(reference, prompt)
        assert got.dtype == own.dtype == (torch.bfloat16 if on else torch.float32)
        assert (got - exact).norm() <= 1.1 * (own - exact).norm() + 1e-6
    assert not model.optimization_report.failures


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_answers_and_its_writes_stay_its_own(
    make_model: Make, prompt: Tensor, tmp_path: Path
) -> None:
    model = make_model(layers=ONE).optimize(inner="eager")
    before = logits(model, prompt)
    pid = os.fork()
    if pid == 0:  # the child: no pytest in here
        code = 1
        try:
            same = torch.equal(logits(model, prompt), before)
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(2)
            torch.save((same, logits(model, prompt), plain(model, prompt)), tmp_path / "child.pt")
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    same, changed, reference = torch.load(tmp_path / "child.pt")
    assert same and not torch.equal(changed, before)
    torch.testing.assert_close(changed, reference, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(model, prompt), before)


# accelerate: placement by device_map, and hooks that bring weights in for a call.


def test_a_device_map_of_one_device_merges_as_ever(make_model: Make, prompt: Tensor, tmp_path: Path) -> None:
    make_model(layers=ONE).save_pretrained(tmp_path)
    model = type(make_model(layers=ONE)).from_pretrained(tmp_path, device_map={"": "cpu"})
    expected = plain(model, prompt)
    model.optimize(inner="eager")
    torch.testing.assert_close(logits(model, prompt), expected, atol=1e-5, rtol=1e-4)
    assert model.optimization_report.matched == 2 and not model.optimization_report.misses


def test_offloaded_weights_stay_where_they_are_with_the_reason(
    make_model: Make, prompt: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model(layers=ONE)
    expected = plain(model, prompt)
    model.requires_grad_(False)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    fxfuse.optimize(offloaded, inner="eager")
    with torch.no_grad():
        got = [offloaded(prompt).logits for _ in range(2)]
    assert all(torch.allclose(each, expected, atol=1e-5) for each in got)
    assert offloaded.model.layers[0].mlp.up_proj.weight.device.type == "meta"
    report = offloaded.optimization_report
    assert report.matched == 0 and report.packed_bytes == 0
    (note,) = [note for note in report.notes if "accelerate's hooks" in note]
    assert "at every call of Qwen3_5ForCausalLM, model.embed_tokens" in note
    assert "model.layers.0.mlp.up_proj" in note and caplog.text.count("accelerate's hooks") == 1


def test_a_hook_on_some_modules_leaves_those_alone_and_merges_the_rest(
    make_model: Make, prompt: Tensor
) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch._dynamo.reset()  # it keeps away from functions that it has given up under an offloaded model
    model = make_model(layers=ONE * 2)
    expected = plain(model, prompt)
    for name in ("gate_proj", "up_proj"):
        layer = getattr(model.model.layers[0].mlp, name)
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    model.optimize(inner="eager")
    with torch.no_grad():
        got = model(prompt).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    report = model.optimization_report
    (note,) = [note for note in report.notes if "accelerate's hooks" in note]
    assert "of model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj: these run as they were" in note
    merged = {m.where for g in report.graphs for o in g.outcomes.values() for m in o.matches}
    assert "model.layers.0.mlp.gate_up_proj" not in merged and "model.layers.1.mlp.gate_up_proj" in merged


def test_a_copy_of_an_optimised_model_can_be_optimised_by_itself(make_model: Make, prompt: Tensor) -> None:
    model = make_model(layers=ONE).optimize(inner="eager")
    before = logits(model, prompt)
    twin = copy.deepcopy(model)
    assert twin.optimization_report is None
    twin.optimize(inner="eager")
    assert torch.equal(logits(twin, prompt), before)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(logits(model, prompt), before) and not logits(twin, prompt).any()


def test_weights_spread_over_ranks_stay_as_they_are_with_the_reason(
    make_model: Make, prompt: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = make_model(layers=ONE)
        expected = plain(model, prompt)
        how = {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        parallelize_module(model.model.layers[0], init_device_mesh("cpu", (1,)), how)
        model.optimize(inner="eager")
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(prompt).logits, expected, atol=1e-5, rtol=1e-4)
        notes = " ".join(model.optimization_report.notes)
        assert "tensor subclass DTensor" in notes and "quantised" not in notes
        assert caplog.text.count("tensor subclass DTensor") == 1
    finally:
        torch.distributed.destroy_process_group()
