"""What is done to or around a model after optimize(): hooks, other forwards, an outer compile, bad calls."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM

import fxfuse
from fxfuse.errors import UnsupportedModelError
from fxfuse.runtime.optimize import optimization_report
from fxfuse.runtime.optimized_call import MOST_HOOKINGS

Make = Callable[..., Any]
ONE = ("full_attention",)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16, bias=False), nn.Linear(8, 16, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.gate(x)) * self.up(x)


@pytest.fixture
def small() -> nn.Module:
    """A small model whose graph is compiled."""
    model = fxfuse.optimize(nn.Sequential(Gated(), nn.Linear(16, 4)), inner="eager")
    follows(model)
    return model


@pytest.fixture
def model(make_model: Make, prompt: Tensor) -> Any:
    """A language model whose graph is compiled."""
    model = make_model(layers=ONE).optimize(inner="eager")
    answer(model, prompt)
    return model


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def follows(model: nn.Module) -> Tensor:
    """The optimised answer, which is that of the model's own forward with whatever has been done to it."""
    with torch.no_grad():
        got = model(X)
        torch.testing.assert_close(got, model.forward(X), atol=1e-6, rtol=1e-5)
    return got


def answer(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def report_of(model: nn.Module) -> fxfuse.Report:
    report = optimization_report(model)
    assert report is not None and report.calls > 0
    return report


def test_a_hook_added_after_the_first_call_is_obeyed_and_its_removal_too(small: Any) -> None:
    before, report = follows(small), report_of(small)
    hook = small[0].gate.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.allclose(follows(small), before)
    assert report.reasons()["its module has a forward hook"] == ["0.gate"]
    hook.remove()
    graphs, calls = len(report.graphs), report.calls
    assert torch.equal(follows(small), before)
    assert (len(report.graphs), report.calls) == (graphs, calls + 1)  # the graph from before is used again


def test_hooks_before_and_of_every_module_are_obeyed(small: Any) -> None:
    before, seen = follows(small), []
    first = small[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert not torch.allclose(follows(small), before)
    first.remove()
    everywhere = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            small(X)
    finally:
        everywhere.remove()
    assert {small, small[0], small[0].gate} <= set(seen)
    assert torch.equal(follows(small), before)


def test_a_module_that_brings_a_hook_along_or_takes_it_elsewhere_is_obeyed(small: Any) -> None:
    before = follows(small)
    hooked = copy.deepcopy(small[0].gate)
    hooked.register_forward_hook(lambda module, args, output: output * 3)
    follows(small)
    own, small[0].gate = small[0].gate, hooked
    tripled = follows(small)
    assert not torch.allclose(tripled, before)
    small[0].gate, small[0].up = small[0].up, small[0].gate  # of one shape: nothing else tells them apart
    assert not torch.allclose(follows(small), tripled)
    small[0].gate, small[0].up = own, small[0].gate
    assert torch.equal(follows(small), before)


def test_a_copy_with_a_hook_may_lie_where_the_module_before_it_lay(small: Any) -> None:
    hooked = copy.deepcopy(small[0].gate)
    hooked.register_forward_hook(lambda module, args, output: output * 3)
    follows(small)
    address = id(small[0].gate)
    small[0].gate = None
    copies = [hooked]  # which take no number from torch's counter of hooks
    while id(copies[-1]) != address and len(copies) < 100:
        copies.append(copy.deepcopy(hooked))
    small[0].gate = copies[-1]
    follows(small)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_module_come_as_often_as_without_us(small: Any, kind: str) -> None:
    def heard(forward: Callable[[Tensor], Tensor]) -> list[str]:
        seen: list[str] = []
        x = X.clone().requires_grad_()
        hook = getattr(nn.modules.module, f"register_module_{kind}_hook")(
            lambda module, *_: seen.append(type(module).__name__)
        )
        try:
            forward(x).sum().backward()
        finally:
            hook.remove()
        return sorted(name for name in seen if name != "GraphModule")  # of a graph that runs as it was

    small(X).sum().backward()  # compiled without the hook
    expected = heard(copy.deepcopy(small))
    assert heard(small) == expected and len(expected) > 4
    assert len(report_of(small).graphs) > 1


def test_hooks_that_come_and_go_at_every_call_are_obeyed_and_not_compiled_forever(
    small: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for factor in range(MOST_HOOKINGS + 3):
        hook = small[1].register_forward_hook(lambda module, args, output, by=factor: output * by)
        follows(small)
        hook.remove()
        follows(small)
    report = report_of(small)
    assert len(report.graphs) <= MOST_HOOKINGS
    (note,) = [note for note in report.notes if "hooks were added" in note]
    assert caplog.text.count(note) == 1


def test_another_forward_or_another_module_in_its_place_is_obeyed(small: Any) -> None:
    before, own = follows(small), small[0].forward
    small[0].forward = lambda x: own(x) * 0
    assert not torch.allclose(follows(small), before)
    del small[0].forward
    small[0].act = nn.ReLU()
    assert not torch.allclose(follows(small), before)
    small[0] = nn.Linear(8, 16)
    assert not torch.allclose(follows(small), before)


def test_ours_wins_under_an_outer_compile_also_where_that_forbids_breaks(model: Any, prompt: Tensor) -> None:
    expected, calls = answer(model, prompt), model.optimization_report.calls
    outer = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(answer(outer, prompt), expected)
    assert model.optimization_report.calls == calls + 1


def test_a_function_around_the_model_is_compiled_as_a_whole_with_ours_as_backend(small: Any) -> None:
    expected, calls = follows(small), report_of(small).calls
    with torch.no_grad():
        torch._dynamo.reset()
        outer = torch.compile(lambda x: small(x) * 2, backend="eager", fullgraph=True)
        torch.testing.assert_close(outer(X), expected * 2)
        assert report_of(small).calls == calls  # the plain model was traced
        fxfuse.deoptimize(small)
        ours = torch.compile(lambda x: small(x) * 2, backend="fxfuse", options={"inner": "eager"})
        torch.testing.assert_close(ours(X), expected * 2)
    report = report_of(small)
    assert report.matched == 1 and report.calls == 1


def test_a_model_without_memory_runs_as_it_was_until_it_has_some(
    make_model: Make, prompt: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.device("meta"):
        model = make_model(layers=ONE).optimize(inner="eager")
    ids = prompt.to("meta")
    for _ in range(2):
        assert answer(model, ids).device.type == "meta"
    report = model.optimization_report
    assert report.calls == 0 and caplog.text.count("on the meta device") == 1
    plain = make_model(layers=ONE)
    fxfuse.load_state_dict(model, plain.state_dict())
    torch.testing.assert_close(answer(model, prompt), answer(plain, prompt), atol=1e-5, rtol=1e-4)
    assert report.calls == 1


def test_what_is_no_module_and_what_is_torchscript_is_refused() -> None:
    for given, named in ((None, "NoneType"), (torch.jit.script(nn.Linear(2, 2)), "TorchScript")):
        with pytest.raises(UnsupportedModelError, match=named):
            fxfuse.optimize(given)  # type: ignore[arg-type]


def test_a_call_that_the_plain_model_refuses_is_refused_in_its_words(
    hybrid: dict[str, Any], prompt: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    plain = LlamaForCausalLM(LlamaConfig(**{key: hybrid[key] for key in sizes})).eval()
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager")
    for wrong in (prompt[0], prompt[:, :0], prompt.tolist(), prompt + 10**6, prompt.float()):
        said = []
        for each in (plain, model):
            with pytest.raises(Exception) as caught:
                answer(each, wrong)
            said.append((type(caught.value), str(caught.value)))
        assert said[0] == said[1]
    assert "cannot capture" not in caplog.text
    torch.testing.assert_close(answer(model, prompt), answer(plain, prompt), atol=1e-5, rtol=1e-4)
    assert model.optimization_report.calls > 0


def test_tracing_sees_the_plain_model(model: Any, prompt: Tensor) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids, use_cache=False).logits

    expected = answer(model, prompt)
    with torch.no_grad():
        traced = torch.jit.trace(Logits(), (prompt,), check_trace=False)
        torch.testing.assert_close(traced(prompt), expected, atol=1e-5, rtol=1e-4)
    (note,) = model.optimization_report.notes
    assert "torch.jit.trace" in note


def test_make_fx_sees_the_plain_model(small: Any) -> None:
    assert torch.equal(make_fx(small)(X)(X), small.forward(X))
    assert "make_fx" in report_of(small).notes[-1]
