"""A graph cut at its layers computes what it computed, and equal layers are compiled once."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fxfuse
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.pipeline import Pass
from fxfuse.runtime import inner, outline

LAYERS = 8


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model((("linear_attention",) * 3 + ("full_attention",)) * (LAYERS // 4))


class Recorder:
    """Outlines every graph with pieces that run as they are, and counts the pieces it was given."""

    def __init__(self) -> None:
        self.graphs: list[tuple[int, int]] = []

    def __call__(self, name: str, mode: Any, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        distinct = 0

        def as_it_is(piece: GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
            nonlocal distinct
            distinct += 1
            assert len(values) == len(piece.graph.find_nodes(op="placeholder"))
            return piece

        run = outline.outlined(graph, as_it_is)
        self.graphs.append((len(outline.segments(graph.graph)), distinct))
        return run


@pytest.mark.parametrize("cache", [None, "static"])
def test_pieces_give_the_same_tokens_and_equal_layers_are_one_compilation(
    model: Any, cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after the passes, where one of them looks at the whole graph."""
    recorder = Recorder()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    prompts = [torch.randint(1, 300, (1, length)) for length in (9, 17)]
    expected = [model.generate(prompt, **options) for prompt in prompts]
    monkeypatch.setattr(inner, "compile_graph", recorder)
    wide = Pass("wide", lambda program: Outcome())
    with fxfuse.optimized(model, inner="eager", passes=["default", wide]):
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert torch.equal(model.generate(prompt, **options), tokens)
        assert model.optimization_report.calls == 8
    assert recorder.graphs
    for segments, distinct in recorder.graphs:
        assert segments == LAYERS + 2
        assert distinct == 4  # before the layers, two kinds of layers, after them


def graph_of(function: Callable[..., Any], *inputs: torch.Tensor, tracing_mode: str = "fake") -> GraphModule:
    traced = make_fx(function, tracing_mode=tracing_mode, pre_dispatch=True)(*inputs)
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    for i, node in enumerate(calls):
        node.meta["nn_module_stack"] = {"": (f"L['self'].layers.{i * 3 // len(calls)}", None)}
    return traced


def compile_counting(compiled: list[GraphModule]) -> outline.Compile:
    def compile_piece(piece: GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(piece)
        return piece

    return compile_piece


def test_equal_layers_over_other_weights_share_and_another_literal_does_not() -> None:
    def same(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = torch.ops.aten.mul.Tensor(x, weight)
        return x

    def other(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for i, weight in enumerate(weights):
            x = torch.ops.aten.add.Tensor(x, weight, alpha=1 + (i == 2))
        return x

    inputs = [torch.randn(3, 4) for _ in range(4)]
    for function, distinct in ((same, 1), (other, 2)):
        compiled: list[GraphModule] = []
        run = outline.outlined(graph_of(function, *inputs), compile_counting(compiled))
        assert torch.equal(run(*inputs), function(*inputs))
        assert len(compiled) == distinct


def test_layers_whose_inputs_differ_in_strides_do_not_share() -> None:
    def scaled(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x * a * b * c

    inputs = [torch.randn(4, 4) for _ in range(4)]
    inputs[2] = inputs[2].t()
    compiled: list[GraphModule] = []
    run = outline.outlined(graph_of(scaled, *inputs), compile_counting(compiled))
    assert torch.equal(run(*inputs), scaled(*inputs))
    assert len(compiled) == 2


def test_a_write_in_one_layer_is_read_in_the_next() -> None:
    def writes(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        y = x + 1
        state.copy_(y)
        return state * 2

    def run_with(function: Callable[..., Any]) -> list[torch.Tensor]:
        x, state = torch.ones(2, 2), torch.zeros(2, 2)
        return [function(x, state), state]

    run = outline.outlined(graph_of(writes, torch.ones(2, 2), torch.zeros(2, 2)), lambda piece, values: piece)
    assert all(torch.equal(a, b) for a, b in zip(run_with(run), run_with(writes), strict=True))


def test_a_reshape_that_copies_is_not_moved_before_a_write() -> None:
    """It is read in two runs and its source is an input, but the layer before it writes to that."""

    def function(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = (x + 1) * 2
        state.copy_(y)
        row = torch.ops.aten.reshape.default(state, [-1])
        return (row * 2) * 3, row

    x = torch.arange(6.0).reshape(3, 2)
    traced = graph_of(function, x, torch.zeros(2, 3).t())
    (row,) = traced.graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default)
    # As Dynamo writes it: what is read is the buffer, not the result of the write.
    row.args = (traced.graph.find_nodes(op="placeholder")[1], [-1])
    run = outline.outlined(traced, lambda piece, values: piece)
    got, expected = run(x, torch.zeros(2, 3).t()), function(x, torch.zeros(2, 3).t())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("length", [8, 9])
def test_layers_of_other_lengths_share_what_was_compiled_where_its_guards_hold(length: int) -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * 2).sum() + (b * 2).sum()

    compiled = []

    def for_even_lengths(piece: GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        if values[0].dim() == 1:
            compiled.append((values[0].shape[0], values[0].shape[0] % 2 == 0))
            bool(compiled[-1][1])  # a guard, as a compiler's that writes code for even lengths
        return piece

    a, b = torch.arange(6.0), torch.arange(float(length))
    traced = graph_of(function, a, b, tracing_mode="symbolic")
    run = outline.outlined(traced, for_even_lengths)
    assert torch.equal(run(a, b), function(a, b))
    assert len(compiled) == (1 if length % 2 == 0 else 2)
    size = traced.graph.find_nodes(op="placeholder")[1].meta["val"].shape[0].node
    guarded = [g.expr for g in size.shape_env.guards if size.expr in g.expr.free_symbols]
    assert any("Mod" in str(expression) for expression in guarded)


def test_lengths_of_another_range_share_nothing() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * 2).sum() + (b * 2).sum()

    compiled = []

    def recorded(piece: GraphModule, values: Sequence[Any]) -> Callable[..., Any]:
        compiled.append(piece)
        return piece

    traced = graph_of(function, torch.ones(6), torch.ones(8), tracing_mode="symbolic")
    size = traced.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    torch._check(size <= 100)
    outline.outlined(traced, recorded)
    assert len(compiled) == 3


def test_a_list_that_would_cross_a_boundary_keeps_the_graph_whole() -> None:
    def splits(x: torch.Tensor) -> torch.Tensor:
        parts = torch.ops.aten.split.Tensor(x, 2)
        return parts[0] + parts[1]

    x = torch.randn(4, 3)
    compiled: list[GraphModule] = []
    run = outline.outlined(graph_of(splits, x), compile_counting(compiled))
    assert torch.equal(run(x), splits(x))
    assert len(compiled) == 1


def test_names_and_constants_of_a_graph_cannot_clash_with_the_code_around_it() -> None:
    def same(x: torch.Tensor) -> list[Any]:
        return [(x * 2) * 2, float("inf"), torch.float32, None]

    x = torch.randn(2, 3)
    traced = graph_of(lambda x: (x * 2) * 2, x)
    [output] = traced.graph.find_nodes(op="output")
    output.args = ([output.args[0], float("inf"), torch.float32, None],)
    for i, node in enumerate(traced.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)):
        node.name = f"call_{i}"
    run = outline.outlined(traced, lambda piece, values: piece)
    ours, theirs = run(x), same(x)
    assert torch.equal(ours[0], theirs[0]) and ours[1:] == theirs[1:]


def test_two_stacks_of_layers_are_cut_one_after_the_other() -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = x * 2
        return x

    x = torch.randn(2, 3)
    traced = graph_of(scaled, x)
    paths = ["visual.blocks.0", "visual.blocks.1", "visual.blocks.2", "layers.0", "layers.1", "norm"]
    for node, path in zip(
        traced.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor), paths, strict=True
    ):
        node.meta["nn_module_stack"] = {"": (f"L['self'].{path}", None)}
    assert [len(run) for run in outline.segments(traced.graph)] == [1] * 6
    compiled: list[GraphModule] = []
    assert torch.equal(outline.outlined(traced, compile_counting(compiled))(x), scaled(x))
    assert len(compiled) == 1


@pytest.mark.inductor
@pytest.mark.slow
def test_inductor_compiles_four_or_five_pieces_for_eight_layers(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import compile_fx

    calls = []
    original = compile_fx.compile_fx
    monkeypatch.setattr(compile_fx, "compile_fx", lambda *a, **k: calls.append(1) or original(*a, **k))
    prompt = torch.randint(1, 300, (1, 9))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(prompt, **options)
    with fxfuse.optimized(model):
        assert torch.equal(model.generate(prompt, **options), expected)
        assert len(model.optimization_report.graphs) == 2
    assert len(calls) <= 12
