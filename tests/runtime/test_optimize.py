"""optimize() and deoptimize(): the same model, the same answers, and everything back as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import fxfuse
from fxfuse.errors import OptionError, UnsupportedModelError
from fxfuse.runtime import live_weights
from fxfuse.runtime.optimize import is_optimized

Make = Callable[..., Any]


class Gated(nn.Module):
    """An MLP after a norm: two linears over one input and one over another, fast to capture."""

    def __init__(self, width: int = 8, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, 2 * width, bias=bias)
        self.up = nn.Linear(width, 2 * width, bias=bias)
        self.down = nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture()
def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must not differ after optimize() and deoptimize()."""
    return {
        "objects": [id(p) for p in model.parameters()],
        "state": copy.deepcopy(model.state_dict()),
        "layout": [(p.dtype, p.shape, p.stride(), p.requires_grad) for p in model.parameters()],
        "call": model._compiled_call_impl,
        "attributes": {
            name: sorted(vars(module).keys() - {"_compiled_call_impl"})
            for name, module in model.named_modules()
        },
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    states = now.pop("state"), (before := dict(before)).pop("state")
    assert now == before
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def run(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model without gradients; fails where its compiled graph did not run."""
    calls = model.optimization_report.calls if hasattr(model, "optimization_report") else None
    with torch.no_grad():
        out = model(*args, **kwargs)
    if calls is not None:
        assert model.optimization_report.calls > calls
    return out


def report_of(model: nn.Module) -> fxfuse.Report:
    from fxfuse.runtime.optimize import optimization_report

    report = optimization_report(model)
    assert report is not None
    return report


# The same object, there and back.


def test_optimize_returns_the_same_object_and_changes_nothing_before_the_first_call() -> None:
    model = Gated()
    before = snapshot(model)
    assert fxfuse.optimize(model, inner="eager") is model
    assert live_weights.packed_bytes(model.parameters()) == 0
    assert "no graph yet" in str(report_of(model))
    before["call"] = model._compiled_call_impl
    assert_same(model, before)


def test_state_dict_keeps_keys_shapes_dtypes_and_bits_and_deoptimize_gives_everything_back(
    make_model: Make, prompt: Tensor, plain_logits: Callable[..., Tensor]
) -> None:
    model = make_model()
    before, forward, config = snapshot(model), model.forward, model.generation_config.to_dict()
    assert model.optimize(inner="eager") is model
    expected = plain_logits(model, prompt)
    torch.testing.assert_close(run(model, prompt).logits, expected, atol=1e-5, rtol=1e-4)
    assert live_weights.packed_bytes(model.parameters()) == model.optimization_report.packed_bytes > 0
    assert_same(model, {**before, "call": model._compiled_call_impl})
    assert model.deoptimize() is model
    assert_same(model, before)
    assert model.forward == forward and model.generation_config.to_dict() == config
    assert model.optimization_report is None
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert not live_weights.is_packed(parameter)
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, expected)


def test_deoptimize_of_a_plain_model_does_nothing() -> None:
    model = Gated()
    before = snapshot(model)
    assert fxfuse.deoptimize(model) is model
    assert_same(model, before)


def test_optimize_twice_is_once_and_other_options_start_anew(x: Tensor) -> None:
    model = fxfuse.optimize(Gated(), inner="eager")
    expected = run(model, x)
    first, entry = report_of(model), model._compiled_call_impl
    fxfuse.optimize(model, inner="eager")
    assert model._compiled_call_impl is entry and report_of(model) is first
    fxfuse.optimize(model, inner="aot_eager")
    assert report_of(model) is not first and not report_of(model).graphs
    assert torch.equal(run(model, x), expected)
    assert report_of(model).graphs[0].inner == "aot_eager" and first.calls == 1
    fxfuse.deoptimize(model)
    assert model._compiled_call_impl is None


def test_the_context_manager_undoes_also_after_an_exception(x: Tensor) -> None:
    model = Gated()
    before = snapshot(model)
    with pytest.raises(KeyError), fxfuse.optimized(model, inner="eager") as inside:
        assert inside is model and live_weights.packed_bytes(model.parameters()) == 0
        run(model, x)
        assert live_weights.packed_bytes(model.parameters()) > 0
        raise KeyError
    assert_same(model, before)


def test_a_compiled_call_of_before_comes_back(x: Tensor) -> None:
    model = Gated()
    model.compile(backend="eager")
    own = model._compiled_call_impl
    with fxfuse.optimized(model, inner="eager"):
        assert model._compiled_call_impl is not own
    assert model._compiled_call_impl is own


def test_a_call_that_the_caller_compiles_since_is_not_taken_for_ours(x: Tensor) -> None:
    model = fxfuse.optimize(Gated(), inner="eager")
    model.compile(backend="eager")
    theirs = model._compiled_call_impl
    assert not is_optimized(model)
    fxfuse.optimize(model, inner="eager")
    assert is_optimized(model) and model._compiled_call_impl is not theirs
    run(model, x)
    assert report_of(model).calls == 1
    fxfuse.deoptimize(model)
    assert model._compiled_call_impl is theirs and not is_optimized(model)
    fxfuse.optimize(model, inner="eager")
    model.compile(backend="eager")
    theirs = model._compiled_call_impl
    fxfuse.deoptimize(model)
    assert model._compiled_call_impl is theirs


def test_a_list_of_default_alone_is_the_default(x: Tensor) -> None:
    model = fxfuse.optimize(Gated(), inner="eager", passes=["default"])
    entry = model._compiled_call_impl
    assert fxfuse.optimize(model, inner="eager")._compiled_call_impl is entry
    run(model, x)
    assert report_of(model).matched == 1


# Bad use.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"passes": ["same_input_linear"]}, ["'same_input_linear'", "'same_input_linears'", "'default'"]),
        ({"passes": "everything"}, ["'everything'", "'same_input_linears'"]),
        ({"passes": 3}, ["passes=3"]),
        ({"passes": [3]}, ["passes=[3]"]),
        ({"inner": "nvfuser"}, ["'nvfuser'", "'inductor'", "'aot_eager'", "'eager'"]),
        ({"weights": "steal"}, ["'steal'", "'auto'", "'copy'"]),
        ({"mode": "fastest"}, ["'fastest'", "'reduce-overhead'"]),
        ({"strict": "yes"}, ["'yes'", "True"]),
        ({"report": "html"}, ["'html'", "'off'"]),
        ({"mode": "max-autotune", "inner": "eager"}, ["'max-autotune'", "inner='inductor'", "'eager'"]),
        ({"dynamic": "maybe"}, ["'maybe'", "None"]),
        ({"fuse_everything": True}, ["'fuse_everything'", "passes", "weights", "inner"]),
    ],
)
def test_an_unknown_option_is_named_beside_the_known_ones(options: dict[str, Any], named: list[str]) -> None:
    model = Gated()
    before = snapshot(model)
    with pytest.raises(OptionError) as caught:
        fxfuse.optimize(model, **options)
    assert all(name in str(caught.value) for name in named)
    assert_same(model, before)


def test_a_failed_call_leaves_an_optimised_model_optimised(x: Tensor) -> None:
    model = fxfuse.optimize(Gated(), inner="eager")
    run(model, x)
    entry = model._compiled_call_impl
    with pytest.raises(OptionError):
        fxfuse.optimize(model, inner="nvfuser")
    with pytest.raises(OptionError):
        fxfuse.optimize(model, inner="eager", passes=["nothing"], strict=True)
    assert model._compiled_call_impl is entry and live_weights.packed_bytes(model.parameters()) > 0
    run(model, x)


def test_what_is_no_module_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="not a dict"):
        fxfuse.optimize({}, inner="eager")  # type: ignore[arg-type]


def test_strict_raises_with_the_module_and_the_reason_and_leaves_the_model_untouched(
    make_model: Make, prompt: Tensor
) -> None:
    model = make_model()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj.*not contiguous"):
        model.optimize(inner="eager", strict=True)
    assert_same(model, before)
    assert model.optimization_report is None


def test_strict_raises_our_own_error_at_a_call_that_the_dry_run_did_not_foresee(
    make_model: Make, prompt: Tensor
) -> None:
    model = make_model(layers=("full_attention",)).optimize(inner="eager", strict=True)
    run(model, prompt)
    with pytest.raises(UnsupportedModelError, match="grad mode is on"):
        model(prompt)


def test_strict_asks_what_is_no_language_model_at_its_first_call(x: Tensor) -> None:
    run(fxfuse.optimize(Gated(), inner="eager", strict=True), x)
    model = Gated()
    model.up.register_forward_hook(lambda module, args, out: out * 2)
    fxfuse.optimize(model, inner="eager", strict=True)
    with pytest.raises(UnsupportedModelError, match="forward hook"), torch.no_grad():
        model(x)
    with pytest.raises(UnsupportedModelError, match=r"nothing to rewrite.*strict=False"), torch.no_grad():
        fxfuse.optimize(Chain(), inner="eager", strict=True)(torch.randn(3, 4))


class Chain(nn.Module):
    """Linears of which no two read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Excluded(nn.Module):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Chain, "nothing matched in a"),
        (Excluded, "captured no graph"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "nothing matched in a"),
    ],
)
def test_a_model_with_nothing_to_match_answers_as_before_with_a_warning(
    make: Callable[[], nn.Module], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = make(), torch.randn(3, 4)
    before = snapshot(model)
    with torch.no_grad():
        expected = model(x)
        fxfuse.optimize(model, inner="eager")
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)
    assert caplog.text.count(said) == 1 and "runs as it was" in caplog.text
    assert report_of(model).matched == 0 and report_of(model).packed_bytes == 0
    fxfuse.deoptimize(model)
    assert_same(model, before)


# What may not be moved stays, with a reason, and the answer is the plain model's.


def _hook(model: Gated) -> None:
    model.up.register_forward_hook(lambda module, args, out: out * 2)


def _pre_hook(model: Gated) -> None:
    model.up.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _tied_to_the_gate(model: Gated) -> None:
    model.up.weight = model.gate.weight


def _tied_storage(model: Gated) -> None:
    model.up.weight.data = model.gate.weight.data


def _not_contiguous(model: Gated) -> None:
    model.up.weight.data = model.up.weight.data.t().contiguous().t()


def _slice_of_larger_memory(model: Gated) -> None:
    whole = torch.randn(64, 8)
    model.up.weight.data = whole[3:19]


def _made_under_inference_mode(model: Gated) -> None:
    with torch.inference_mode():
        model.up.weight = nn.Parameter(torch.randn(16, 8), requires_grad=False)


def _between_processes(model: Gated) -> None:
    model.up.weight.data = model.up.weight.data.clone().share_memory_()


def _bias_on_one(model: Gated) -> None:
    model.up.bias = nn.Parameter(torch.randn(16))


class EightBits(nn.Module):
    """A weight-only quantised linear: the weight is computed at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Buffer(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.codes = nn.Buffer((linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) * self.scale)


def _half_quantised(model: Gated) -> None:
    model.up = EightBits(model.up)  # type: ignore[assignment]


def _parametrised(model: Gated) -> None:
    nn.utils.parametrizations.weight_norm(model.up)


class Scaled(Tensor):
    """A tensor subclass such as quantisation libraries put into Parameters."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scaled":
        return nn.Parameter(self.detach().clone().as_subclass(Scaled), self.requires_grad)  # type: ignore


def _tensor_subclass(model: Gated) -> None:
    model.up.weight = nn.Parameter(model.up.weight.detach().as_subclass(Scaled))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_hook, "has a forward hook"),
        (_pre_hook, "no other linear"),
        (_tied_to_the_gate, "shared with another linear"),
        (_tied_storage, "shares memory with"),
        (_not_contiguous, "not contiguous"),
        (_slice_of_larger_memory, "slice of larger memory"),
        (_made_under_inference_mode, "inference_mode"),
        (_between_processes, "between processes"),
        (_bias_on_one, "bias"),
        (_half_quantised, "computed by"),
        (_parametrised, "computed by"),
        (_tensor_subclass, "Scaled"),
    ],
)
def test_a_spoilt_linear_is_left_alone_with_a_reason_and_the_answer_stays(
    spoil: Callable[[Gated], None], reason: str, x: Tensor
) -> None:
    model = Gated()
    spoil(model)
    plain = copy.deepcopy(model)
    before = snapshot(model)
    fxfuse.optimize(model, inner="eager")
    with torch.no_grad():
        expected, got = plain(x), model(x)
    assert torch.equal(got, expected)
    report = report_of(model)
    assert report.calls == 1 and report.matched == 0
    if spoil is not _pre_hook:  # then the two read different values: no candidate at all
        assert any(reason in miss.reason for miss in report.misses), [m.reason for m in report.misses]
        assert reason in str(report).replace("\n", " ")
    fxfuse.deoptimize(model)
    assert_same(model, before)


def test_two_dtypes_in_one_group_are_not_mixed(x: Tensor) -> None:
    class Mixed(Gated):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return self.gate(x) + self.up(x.to(torch.bfloat16)).float()

    model = Mixed()
    model.up.to(torch.bfloat16)
    plain = copy.deepcopy(model)
    fxfuse.optimize(model, inner="eager")
    assert torch.equal(run(model, x), plain(x)) and report_of(model).matched == 0


def test_linears_on_two_devices_are_not_mixed_and_weights_without_memory_do_not_crash(x: Tensor) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = Gated(), Gated().to("meta")

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.near(x), self.far(x.to("meta"))

    model = Split()
    plain = copy.deepcopy(model)
    fxfuse.optimize(model, inner="eager")
    with torch.no_grad():
        (near, far), expected = model(x), plain(x)
    assert torch.allclose(near, expected[0]) and far.is_meta and far.shape == expected[1].shape
    assert any("meta" in m.reason for m in report_of(model).misses) or report_of(model).notes


def test_packing_that_fails_leaves_the_original_computation(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(*args: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    model = Gated()
    plain = copy.deepcopy(model)
    monkeypatch.setattr(live_weights.Packed, "empty", no_memory)
    fxfuse.optimize(model, inner="eager")
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert "packing failed: OutOfMemoryError" in caplog.text
    assert "packing failed" in str(report_of(model)) and report_of(model).calls == 0
    monkeypatch.undo()
    assert torch.allclose(run(model, x), plain(x)) and report_of(model).calls == 1


def test_an_inner_compiler_that_fails_leaves_the_original_computation(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fxfuse.runtime import inner

    def broken(*args: Any) -> Any:
        raise RuntimeError("internal compiler error")

    model = Gated()
    plain = copy.deepcopy(model)
    monkeypatch.setattr(inner, "compile_graph", broken)
    fxfuse.optimize(model, inner="eager")
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert "internal compiler error" in caplog.text and "internal compiler error" in str(report_of(model))
    assert report_of(model).matched == 0 and live_weights.packed_bytes(model.parameters()) == 0
    assert "captured no graph" not in caplog.text and len(report_of(model).notes) == 1


def test_verify_draws_the_same_random_numbers_for_both(x: Tensor) -> None:
    class Dropping(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(super().forward(x), 0.5, training=True)

    model = fxfuse.optimize(Dropping(), inner="eager", verify=True)
    run(model, x)
    run(model, x)
    assert not report_of(model).notes and report_of(model).calls == 2


def test_verify_takes_another_number_of_outputs_for_a_difference(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxfuse.runtime import inner

    compile_graph = inner.compile_graph
    monkeypatch.setattr(inner, "compile_graph", lambda *a: lambda *b: (*compile_graph(*a)(*b), None))
    model = Gated()
    plain = copy.deepcopy(model)
    fxfuse.optimize(model, inner="eager", verify=True)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))
    assert any("does not reproduce" in note for note in report_of(model).notes)


@pytest.mark.parametrize("good", [True, False])
def test_verify_keeps_the_original_where_the_compiled_graph_differs(
    x: Tensor, good: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fxfuse.runtime import inner

    if not good:
        compile_graph = inner.compile_graph

        def wrong(*args: Any) -> Any:
            run = compile_graph(*args)
            return lambda *inputs: tuple(out + 0.1 for out in run(*inputs))

        monkeypatch.setattr(inner, "compile_graph", wrong)
    model = Gated()
    plain = copy.deepcopy(model)
    fxfuse.optimize(model, inner="eager", verify=True)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(x), plain(x))
    assert ("does not reproduce the original" in caplog.text) is not good
    assert bool(report_of(model).notes) is not good
    assert report_of(model).calls == (2 if good else 1)


def _slice_again(model: Gated) -> list[Tensor]:
    whole = torch.randn(32, 8)
    model.up.weight.data = whole[:16]
    return [whole]


def _share_again(model: Gated) -> list[Tensor]:
    model.share_memory()
    return []


def _tie_again(model: Gated) -> list[Tensor]:
    model.up.weight.data = model.gate.weight.data
    return [model.gate.weight]


def _tie_as_one_parameter(model: Gated) -> list[Tensor]:
    model.up.weight = model.gate.weight
    return [model.gate.weight]


@pytest.mark.parametrize("spoil", [_slice_again, _share_again, _tie_again, _tie_as_one_parameter])
def test_a_weight_that_becomes_immovable_later_is_not_packed_again_until_it_may(
    spoil: Callable[[Gated], list[Tensor]], x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = fxfuse.optimize(Gated(), inner="eager")
    run(model, x)
    others = spoil(model)
    with torch.no_grad():
        for _ in range(3):
            pointers = [p.data_ptr() for p in model.parameters()]
            assert torch.equal(model(x), model.forward(x))
            assert [p.data_ptr() for p in model.parameters()] == pointers
            for other in others:
                other.mul_(2)
    assert others or model.up.weight.is_shared()
    if model.up.weight is model.gate.weight:
        model.up.weight = nn.Parameter(model.up.weight.detach())
    assert report_of(model).calls == 1 and len(report_of(model).notes) == 1
    assert caplog.text.count("runs as it was, because") == 1
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    torch.testing.assert_close(run(model, x), model.forward(x))
    assert live_weights.packed_bytes(model.parameters()) > 0


@pytest.mark.parametrize("taken", [True, False])
def test_the_report_says_so_where_tensors_taken_before_lose_their_link(taken: bool, x: Tensor) -> None:
    model = Gated()
    state = model.state_dict() if taken else None
    run(fxfuse.optimize(model, inner="eager"), x)
    assert any("no longer share" in note for note in report_of(model).notes) is taken
    assert (state is not None) is taken and live_weights.packed_bytes(model.parameters()) > 0


def test_two_graphs_that_want_one_weight_do_not_pack_at_every_call(x: Tensor) -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x) + self.k(x)
            torch._dynamo.graph_break()
            return y * (self.q(x) + self.v(x))

    model = fxfuse.optimize(Broken(), inner="eager")
    for _ in range(10):
        torch.testing.assert_close(run(model, x), model.forward(x).detach())
    assert sum(g.packs for g in report_of(model).graphs) < 10
    assert any("another graph packs" in note for note in report_of(model).notes)


class Blocks(nn.Module):
    """Heads split and put together in another order: a permutation that folds into a copy of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Linear(8, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.p(x).reshape(*x.shape[:2], 2, 12).split([4, 8], -1)
        return torch.cat([q.flatten(2), k.flatten(2)], -1).sin()


def test_a_copy_counts_once_for_all_graphs_and_is_gone_with_deoptimize(x: Tensor) -> None:
    model = fxfuse.optimize(Blocks(), inner="eager", weights="copy", dynamic=False)
    for length in (5, 4, 3):
        run(model, x[:, :length])
    report = report_of(model)
    assert len(report.graphs) == 3 and report.copied_bytes == model.p.weight.nbytes
    fxfuse.deoptimize(model)
    assert not list(report._copies)


# Many models, no leftovers.


def test_a_twentieth_model_in_one_process_still_runs_compiled(x: Tensor) -> None:
    for _ in range(20):
        model = fxfuse.optimize(Gated(), inner="eager")
        with torch.no_grad():
            model(x)
        assert report_of(model).matched == report_of(model).calls == 1


@pytest.mark.slow
def test_a_twentieth_language_model_in_one_process_still_runs_compiled(
    make_model: Make, prompt: Tensor
) -> None:
    for seed in range(20):
        model = make_model(layers=("full_attention",), seed=seed).optimize(inner="eager")
        run(model, prompt)
        assert model.optimization_report.matched == 2


def test_a_model_is_freed_with_its_last_reference(make_model: Make, prompt: Tensor) -> None:
    import gc
    import weakref

    model = make_model(layers=("full_attention",)).optimize(inner="eager")
    run(model, prompt)
    left = weakref.ref(model), weakref.ref(model.model.layers[0].mlp.up_proj.weight)
    del model
    gc.collect()
    assert [reference() for reference in left] == [None, None]


# generate(): the same greedy tokens, whatever the cache and the attention.

TOKENS = 8
GREEDY = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}


@pytest.fixture(scope="module")
def pairs(make_model: Make) -> dict[str, tuple[Any, Any]]:
    """By kind of attention: a plain model and an optimised one with the same weights."""
    found = {}
    for attention in ("sdpa", "eager"):
        plain = make_model(seed=3)
        plain.set_attn_implementation(attention)
        found[attention] = plain, copy.deepcopy(plain).optimize(inner="eager")
    return found


def both(pair: tuple[Any, Any], call: Callable[[Any], Tensor], at_least: int) -> Tensor:
    plain, model = pair
    assert plain.config._attn_implementation == model.config._attn_implementation
    calls = model.optimization_report.calls
    got, expected = call(model), call(plain)
    assert model.optimization_report.calls >= calls + at_least
    assert model.optimization_report.misses == []
    if expected.is_floating_point():
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    else:
        assert torch.equal(got, expected)
    return got


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("attention", "cache"),
    [
        ("sdpa", "static"),
        ("sdpa", "dynamic"),
        ("eager", None),
        pytest.param("eager", "static", marks=slow),
        pytest.param("eager", "dynamic", marks=slow),
        pytest.param("sdpa", None, marks=slow),
    ],
)
def test_greedy_tokens_are_those_of_the_plain_model(
    pairs: dict[str, tuple[Any, Any]], prompt: Tensor, attention: str, cache: str | None
) -> None:
    options = {"cache_implementation": cache} if cache else {"use_cache": False}
    tokens = both(pairs[attention], lambda m: m.generate(prompt, **GREEDY, **options), at_least=TOKENS)
    assert tokens.shape == (1, prompt.shape[1] + TOKENS)


@pytest.mark.parametrize(
    ("attention", "cache"),
    [
        ("sdpa", "dynamic"),
        ("eager", "static"),
        pytest.param("sdpa", "static", marks=slow),
        pytest.param("eager", "dynamic", marks=slow),
    ],
)
def test_two_prompts_with_padding_on_the_left(
    pairs: dict[str, tuple[Any, Any]], prompt: Tensor, attention: str, cache: str
) -> None:
    ids = prompt.repeat(2, 1)
    mask = torch.ones_like(ids)
    ids[1, :6], mask[1, :6] = 0, 0
    both(
        pairs[attention],
        lambda m: m.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY),
        at_least=TOKENS,
    )


@pytest.mark.parametrize(
    ("attention", "kind"),
    [
        ("sdpa", StaticCache),
        ("eager", DynamicCache),
        pytest.param("sdpa", DynamicCache, marks=slow),
        pytest.param("eager", StaticCache, marks=slow),
    ],
)
def test_several_tokens_into_a_filled_cache(
    pairs: dict[str, tuple[Any, Any]], prompt: Tensor, attention: str, kind: type
) -> None:
    def chunked(model: Any) -> Tensor:
        more = {"max_cache_len": 64} if kind is StaticCache else {}
        cache = kind(config=model.config, **more)
        with torch.no_grad():
            parts = [
                model(prompt[:, a:b], past_key_values=cache, use_cache=True).logits
                for a, b in ((0, 9), (9, 14), (14, 17))
            ]
        return torch.cat(parts, dim=1)

    got = both(pairs[attention], chunked, at_least=3)
    with torch.no_grad():
        whole = pairs[attention][0](prompt).logits
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-3)
