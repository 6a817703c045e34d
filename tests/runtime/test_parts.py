"""A graph rewritten layer by layer becomes what it becomes as a whole; what cannot be cut stays whole."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxfuse
from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.pipeline import Pass
from fxfuse.runtime import backend, capture, inner
from fxfuse.runtime.optimize import optimization_report
from fxfuse.runtime.parts import Rewriting
from fxfuse.runtime.sessions import Session, report_of

LAYERS = ("linear_attention", "linear_attention", "full_attention") * 2


class Captured:
    """A backend that rewrites each graph by layer and as a whole, and runs it by layer, in eager mode."""

    def __init__(self, model: nn.Module | None = None, copy_weights: bool = False) -> None:
        self.model, self.copy_weights = model, copy_weights
        self.by_layer: list[Rewriting] = []
        self.whole: list[Rewriting] = []

    def __call__(self, graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        weights = backend._weights(graph_module, list(inputs), Session(model=self.model))
        passes = pipeline.selected("default", "inductor")
        for found, by_layer in ((self.whole, False), (self.by_layer, True)):
            found.append(
                Rewriting(
                    graph_module,
                    inputs,
                    weights,
                    passes,
                    copy_weights=self.copy_weights,
                    by_layer=by_layer,
                )
            )
        rewriting = self.by_layer[-1]
        run = rewriting.compiled(lambda graph, values: graph)
        at = {node: i for i, node in enumerate(capture.placeholders(graph_module))}

        def call(*args: Any) -> Any:
            stacks = [
                torch.cat([args[at[member]].detach() for member in filled.members])
                for filled in rewriting.filled
            ]
            return run(*args, *stacks)

        return call

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(function, backend=self, **options)


def matches(rewriting: Rewriting) -> Counter[Any]:
    return Counter(
        (name, match.rule, match.where, match.members, match.detail)
        for name, outcome in rewriting.outcomes().items()
        if name != "output_layout"  # between layers too, where only strides differ
        for match in outcome.matches
    )


def misses(rewriting: Rewriting) -> Counter[Any]:
    return Counter(
        (name, miss.rule, miss.where, miss.reason)
        for name, outcome in rewriting.outcomes().items()
        for miss in outcome.misses
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_names_counts_and_plan_are_those_of_the_whole_graph(
    make_model: Callable[..., Any], prompt: Tensor, dynamic: bool
) -> None:
    model = make_model(LAYERS)
    captured = Captured(model)
    run = captured.compile(model, dynamic=dynamic)
    with torch.no_grad():
        out = run(prompt, use_cache=True)
        run(prompt[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert len(captured.whole) >= 2
    for by_layer, whole in zip(captured.by_layer, captured.whole, strict=True):
        assert len(by_layer.uses) == len(LAYERS) + 2 and len(whole.uses) == 1
        # with symbols the first layer may be the one where a size turns out to be a number
        assert len(by_layer.parts()) in ((4, 5) if dynamic else (4,))
        assert matches(by_layer) == matches(whole)
        assert misses(by_layer) == misses(whole)
        assert by_layer.plan().digest == whole.plan().digest
        assert by_layer.phase() == whole.phase()
        assert {f.members for f in by_layer.filled} == {f.members for f in whole.filled}


class Stack(nn.Module):
    """Layers that `step` describes, over one input."""

    def __init__(self, step: Callable[[nn.Module, Tensor, Any], Any], depth: int = 3) -> None:
        super().__init__()
        self.step = step
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.last = nn.ReLU()

    def forward(self, x: Tensor, state: Any = None) -> Any:
        for layer in self.layers:
            x, state = layer(x, state, self.step)
        return self.last(x), state


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor, state: Any, step: Callable[..., Any]) -> Any:
        return step(self, x, state)


def plain(layer: Any, x: Tensor, state: Any) -> Any:
    return x + layer.down(torch.sigmoid(layer.gate(x)) * layer.up(x)), state


def integers(stack: Stack) -> Stack:
    """Weights that make every product exact."""
    for i, parameter in enumerate(stack.parameters()):
        nn.init.constant_(parameter, float(i % 3 - 1))
        parameter.data[0, i % 4] = 2.0
    return stack


def compared(stack: Stack, x: Tensor, state: Any = None, grad: bool = False) -> Captured:
    """What was captured, after outputs and the state that was written to were found the same."""
    captured = Captured(stack)
    run = captured.compile(stack)
    states = [copy.deepcopy(state) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        expected = stack(x.clone(), states[0])
        got = run(x.clone(), states[1])
    values = [v for pair in zip(got, expected, strict=True) for v in (pair,) if isinstance(v[0], Tensor)]
    assert values and all(torch.equal(a, b) and a.stride() == b.stride() for a, b in values)
    if isinstance(state, Tensor):
        assert torch.equal(*states)
    return captured


def gated(layer: Any, x: Tensor, state: Any) -> Any:
    return x + layer.down(layer.gate(x) * layer.up(x)), state


def test_each_distinct_layer_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    trace = capture.trace
    monkeypatch.setattr(capture, "trace", lambda *args: traced.append(1) or trace(*args))
    captured = compared(integers(Stack(gated, 5)), torch.arange(8.0).reshape(2, 4))
    assert len(captured.by_layer[0].uses) == 6
    assert len(traced) == 2 + 1  # the layers, what follows them, and the whole to compare with


def state_and_its_view(layer: Any, x: Tensor, state: Any) -> Any:
    full, row = state if isinstance(state, tuple) else (state, state[:1])
    row.add_(1)
    return gated(layer, x + full, None)[0], (full, full[:1])


def computed_and_its_view(layer: Any, x: Tensor, state: Any) -> Any:
    whole, turned = state if isinstance(state, tuple) else (x * 2, (x * 2).t())
    whole.add_(1)
    y = gated(layer, whole + 1, None)[0]
    return y + turned.t(), (y, y.t())


@pytest.mark.parametrize("step", [state_and_its_view, computed_and_its_view])
def test_views_that_cross_beside_what_they_show_keep_the_graph_whole(step: Callable[..., Any]) -> None:
    captured = compared(integers(Stack(step, 5)), torch.arange(8.0).reshape(2, 4), torch.zeros(2, 4))
    assert len(captured.by_layer[0].uses) == 1


def test_a_view_of_the_state_crosses_into_the_next_layer_which_writes_to_it() -> None:
    def step(layer: Any, x: Tensor, state: Any) -> Any:
        row = state[0]
        state.add_(1)
        return gated(layer, x + row, None)[0], state.view(2, 4)

    captured = compared(integers(Stack(step, 5)), torch.arange(8.0).reshape(2, 4), torch.zeros(2, 4))
    assert len(captured.by_layer[0].uses) == 6


def test_a_view_crosses_alone() -> None:
    def step(layer: Any, x: Tensor, state: Any) -> Any:
        return gated(layer, x.t(), None)[0].t(), state

    stack = integers(Stack(step, 5))
    captured = compared(stack, torch.arange(8.0).reshape(2, 4).t())
    assert len(captured.by_layer[0].uses) == 6 and len(captured.by_layer[0].parts()) == 2


@pytest.mark.inductor
@pytest.mark.parametrize("across_layers", [False, True])
def test_a_state_that_layers_write_to_by_a_view_is_right_under_inductor(across_layers: bool) -> None:
    stack = integers(Stack(state_and_its_view, 3)).requires_grad_(False)
    x, states = torch.arange(8.0).reshape(2, 4), [torch.ones(2, 4) for _ in range(2)]
    with torch.no_grad():
        expected = stack(x, states[0])
        wide = [Pass("wide", lambda program: Outcome())] if across_layers else []
        fxfuse.optimize(stack, report="off", passes=["default", *wide])
        got = stack(x, states[1])
    assert torch.equal(got[0], expected[0]) and torch.equal(*states)


def test_a_layer_of_another_structure_is_a_part_of_its_own() -> None:
    def step(layer: Any, x: Tensor, state: Any) -> Any:
        state = (state or 0) + 1
        return gated(layer, x * state if state == 2 else x, None)[0], state

    captured = compared(integers(Stack(step, 4)), torch.arange(8.0).reshape(2, 4))
    assert len(captured.by_layer[0].uses) == 5 and len(captured.by_layer[0].parts()) == 3


def test_a_refused_or_trainable_parameter_keeps_its_layer_apart() -> None:
    stack = integers(Stack(gated, 4)).requires_grad_(False)
    stack.layers[2].up.register_forward_hook(lambda module, args, out: None)
    captured = compared(stack, torch.arange(8.0).reshape(2, 4))
    (by_layer,), (whole,) = captured.by_layer, captured.whole
    assert len(by_layer.uses) == 5 and len(by_layer.parts()) == 3
    assert matches(by_layer) == matches(whole) and misses(by_layer) == misses(whole)
    assert len(by_layer.filled) == 3


def no_grad_inside(layer: Any, x: Tensor, state: Any) -> Any:
    with torch.no_grad():
        scale = x.mean()
    return gated(layer, x * scale, None)[0], state


def turned_in_place(layer: Any, x: Tensor, state: Any) -> Any:
    y = x + 1
    y.t_()
    return gated(layer, y.t(), None)[0], state


def merged_across(layer: Any, x: Tensor, state: Any) -> Any:
    """The same input of every layer's linears: one product for all of them is worth more than one layer."""
    return x + layer.down(layer.gate(state) * layer.up(state)), state


@pytest.mark.parametrize(
    ("step", "rewritten"), [(no_grad_inside, True), (turned_in_place, False), (merged_across, True)]
)
def test_what_cannot_be_cut_is_rewritten_as_a_whole_or_left_alone(
    step: Callable[..., Any], rewritten: bool
) -> None:
    stack = integers(Stack(step)).requires_grad_(False)
    captured = compared(stack, torch.arange(8.0).reshape(2, 4), torch.ones(2, 4), grad=True)
    assert len(captured.by_layer[0].uses) == 1
    assert bool(captured.by_layer[0].filled) == rewritten


def test_layers_that_claim_one_parameter_for_different_stacks_are_rewritten_together() -> None:
    stack = integers(Stack(gated))
    stack.layers[1].up.weight = stack.layers[0].gate.weight
    captured = compared(stack, torch.arange(8.0).reshape(2, 4))
    (by_layer,), (whole,) = captured.by_layer, captured.whole
    assert len(by_layer.uses) == 1
    assert matches(by_layer) == matches(whole)


def test_layers_with_the_same_parameters_share_one_stack() -> None:
    stack = integers(Stack(gated))
    stack.layers[2].up.weight = stack.layers[0].up.weight
    stack.layers[2].gate.weight = stack.layers[0].gate.weight
    captured = compared(stack, torch.arange(8.0).reshape(2, 4))
    (by_layer,), (whole,) = captured.by_layer, captured.whole
    assert len(by_layer.uses) == 4 and len(by_layer.filled) == len(whole.filled) == 2
    assert by_layer.plan().digest == whole.plan().digest


def low_rank(layer: Any, x: Tensor, state: Any) -> Any:
    return plain(layer, x, state)[0] + (x @ layer.a.t()) @ layer.b.t(), state


@pytest.mark.parametrize("across_layers", [False, True])
@pytest.mark.parametrize(
    "inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_gradients_cross_from_layer_to_layer(inner: str, across_layers: bool) -> None:
    """Of adapters beside frozen linears, which are merged, and of the input."""
    stack = Stack(low_rank).double().requires_grad_(False)
    for layer in stack.layers:
        layer.a = nn.Parameter(torch.randn(2, 4, dtype=torch.float64))
        layer.b = nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
    own = copy.deepcopy(stack)
    x = torch.randn(3, 4, dtype=torch.float64)
    wide = [Pass("wide", lambda program: Outcome())] if across_layers else []
    fxfuse.optimize(own, inner=inner, report="off", passes=["default", *wide])
    gradients = []
    for model in (stack, own):
        given = x.clone().requires_grad_()
        model(given)[0].square().sum().backward()
        adapters = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(adapters) == 6
        gradients.append([given.grad, *adapters])
    for got, expected in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    report = optimization_report(own)
    assert report is not None and report.calls == 1 and report.matched == 3 and not report.failures


def test_layers_of_caches_of_other_lengths_share_a_part_and_stay_right() -> None:
    class Lengths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))
            self.last = nn.ReLU()

        def forward(self, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
            for layer, memory in zip(self.layers, (a, b, c), strict=True):
                x, _ = layer(x + memory.sum(0), None, gated)
            return self.last(x), None

    model = integers(Lengths())  # type: ignore[arg-type]
    captured = Captured(model)
    run = captured.compile(model, dynamic=True)
    for lengths in ((5, 6, 7), (6, 7, 9), (12, 8, 10)):
        memories = [torch.arange(4.0 * n).reshape(n, 4) for n in lengths]
        with torch.no_grad():
            assert torch.equal(run(torch.ones(2, 4), *memories)[0], model(torch.ones(2, 4), *memories)[0])
    assert len(captured.by_layer) == 1
    assert len(captured.by_layer[0].parts()) < len(captured.by_layer[0].uses)


@pytest.mark.inductor
def test_kernels_that_do_not_compile_leave_the_original_and_waiting_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import LambdaFuture

    wait = AsyncCompile.wait

    def failing(self: Any, argtypes: Any, source: str) -> Any:
        def result() -> Any:
            raise RuntimeError("the compiler said no")

        return LambdaFuture(result)

    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", failing)
    stack, x = Stack(plain), torch.randn(2, 4)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        expected = stack(x)[0]
        fxfuse.optimize(stack, report="off")
        torch.testing.assert_close(stack(x)[0], expected)
    assert AsyncCompile.wait is wait
    report = optimization_report(stack)
    assert report is not None and any("the compiler said no" in note for note in report.notes)


def test_other_threads_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from torch._inductor.async_compile import AsyncCompile

    waited: list[str] = []
    monkeypatch.setattr(AsyncCompile, "wait", lambda self, scope: waited.append(scope["name"]))
    with inner.kernels_compiled_beside():
        AsyncCompile().wait({"name": "ours"})
        thread = threading.Thread(target=lambda: AsyncCompile().wait({"name": "theirs"}))
        thread.start()
        thread.join()
        assert waited == ["theirs"]
    assert waited == ["theirs", "ours"]


def test_what_does_not_compile_is_not_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hide an error of the compilation itself, or keep what comes after it waiting."""
    import types

    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache

    waited = []

    def wait(self: Any, scope: dict[str, Any]) -> None:
        waited.append(scope["__name__"])
        if scope["__name__"] == "broken":
            raise RuntimeError("the compiler said no")

    monkeypatch.setattr(AsyncCompile, "wait", wait)
    modules = {name: types.ModuleType(name) for name in ("broken", "fine")}
    monkeypatch.setattr(PyCodeCache, "modules_no_attr", dict(modules))
    with pytest.raises(KeyError, match="own"), inner.kernels_compiled_beside():
        for module in modules.values():
            AsyncCompile().wait(vars(module))
        raise KeyError("own")
    assert waited == ["broken", "fine"] and list(PyCodeCache.modules_no_attr) == ["fine"]


def test_a_detached_alias_is_another_value_where_gradients_are_on() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            fixed = x.detach()
            return x + torch.sigmoid(self.gate(fixed)) * self.up(fixed)

    model = Detached().requires_grad_(False)
    own, gradients = copy.deepcopy(model), []
    fxfuse.optimize(own, inner="eager", report="off")
    for each in (model, own):
        x = torch.ones(2, 8, requires_grad=True)
        each(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
    report = optimization_report(own)
    assert report is not None and report.matched == 1


def test_a_transform_of_torch_func_around_layers_says_that_it_cannot_be_traced() -> None:
    stack = Stack(plain).requires_grad_(False)
    run = torch.compile(
        lambda rows: torch.vmap(lambda row: stack(row)[0])(rows), backend="fxfuse", options={"inner": "eager"}
    )
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(run(x), torch.vmap(lambda row: stack(row)[0])(x))
    report = report_of(stack.parameters())
    assert report is not None and any("torch.func" in note for note in report.notes)
