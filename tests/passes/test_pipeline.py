"""Passes are all or nothing, find nothing twice, and change no value of any graph made from these pieces."""

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxfuse import rewrite
from fxfuse.errors import OptionError
from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.pipeline import Pass
from fxfuse.passes.program import Program
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced
from fxfuse.testing.tensors import integer_like_, integer_tensor

HERE = ["same_input_linears", "layout_chains", "depthwise_convs", "one_query_attention", "one_row_linears"]
PASSES = pipeline.selected(HERE, "inductor")
NAMES = [each.name for each in PASSES]
X = integer_tensor((1, 8), seed=0)


class Block(nn.Module):
    """Something for every pass: linears on one input, a chain, one row, one query, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 12, bias=False)
        self.k = nn.Linear(8, 4, bias=False)
        self.gate = nn.Linear(8, 4)
        self.up = nn.Linear(8, 4)
        self.conv = nn.Conv1d(8, 8, 3, groups=8, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        one = x[:, None, None]  # attends to itself alone, which is exact
        seen = (
            F.scaled_dot_product_attention(one, one, one, scale=1.0)
            + self.conv(x[:, None].transpose(1, 2)).mT[:, None]
        )
        a, b, c = self.q(x).view(-1, 2, 6).split([2, 3, 1], dim=-1)
        rows = x.shape[0]
        mixed = torch.cat([a.reshape(rows, -1), b.reshape(rows, -1), c.reshape(rows, -1)], dim=-1)
        return [mixed + 1, self.k(x) * 2, self.gate(x + 1) * self.up(x + 1), seen]


def program_of(module: nn.Module, *inputs: Any) -> Program:
    return traced(module, dict(module.named_parameters()), inputs, Options())


def text(program: Program) -> str:
    return str(program.graph)


def test_every_pass_finds_something_once_and_nothing_twice() -> None:
    program, first = pipeline.apply(program_of(Block(), X), PASSES)
    assert all(first[name].matches for name in NAMES)
    again, second = pipeline.apply(program, PASSES)
    assert {name: second[name].matches for name in NAMES} == {name: [] for name in NAMES}
    assert text(again) == text(program)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_by_itself_finds_nothing_twice(name: str) -> None:
    passes = pipeline.selected(name, "inductor")
    program, first = pipeline.apply(program_of(Block(), X), passes)
    assert first[name].matches
    _, second = pipeline.apply(program, passes)
    assert second[name].matches == []


def test_the_program_given_is_not_changed() -> None:
    program = program_of(Block(), X)
    before, metas = text(program), {n.name: dict(n.meta) for n in program.graph.nodes}
    pipeline.apply(program, PASSES)
    assert text(program) == before
    assert program.fused == []
    assert {n.name: n.meta for n in program.graph.nodes} == metas


def broken_after(run: Any) -> Any:
    """The pass does its work and then raises."""

    def broken(program: Program) -> Outcome:
        run(program)
        raise ZeroDivisionError("a pass that fails")

    return broken


def unlinted(program: Program) -> Outcome:
    """A graph that reads a value before it is computed."""
    *_, last, _ = program.graph.nodes
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    first.args = (last, *first.args[1:])
    return Outcome(matches=[Match("unlinted", "here", (), "")])


def misshapen(program: Program) -> Outcome:
    """A graph whose shapes do not fit."""
    with program.graph.inserting_before(program.graph.find_nodes(op="output")[0]):
        weight, *_ = program.placeholders()
        program.graph.call_function(torch.ops.aten.mm.default, (weight, weight))
    return Outcome(matches=[Match("misshapen", "here", (), "")])


@pytest.mark.parametrize("position", range(len(PASSES)))
def test_a_pass_that_raises_is_undone_and_reported_and_the_others_run(position: int) -> None:
    program = program_of(Block(), X)
    name = NAMES[position]
    broken = replace(PASSES[position], run=broken_after(PASSES[position].run))
    passes = [*PASSES[:position], broken, *PASSES[position + 1 :]]
    without = [*PASSES[:position], *PASSES[position + 1 :]]
    got, outcomes = pipeline.apply(program, passes)
    expected, _ = pipeline.apply(program, without)
    assert text(got) == text(expected)
    assert got.plan() == expected.plan()
    assert outcomes[name].matches == []
    (miss,) = outcomes[name].misses
    assert miss.reason == "the pass failed and was undone: ZeroDivisionError: a pass that fails"
    assert list(outcomes) == NAMES


@pytest.mark.parametrize(
    ("run", "reason"), [(unlinted, "used before it has been defined"), (misshapen, "same reduction dim")]
)
def test_a_graph_that_does_not_hold_together_is_undone(run: Any, reason: str) -> None:
    program = program_of(Block(), X)
    normal, _ = pipeline.apply(program, [])
    got, outcomes = pipeline.apply(program, [Pass("bad", run)])
    assert text(got) == text(normal)
    assert outcomes["bad"].matches == []
    assert "was undone" in outcomes["bad"].misses[0].reason
    assert reason in outcomes["bad"].misses[0].reason


def test_a_normal_form_that_fails_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(program: Program) -> None:
        for node in program.calls("aten.mul.Tensor"):
            node.args = (node.args[0], node.args[0])
        raise ZeroDivisionError("no normal form")

    monkeypatch.setattr(pipeline, "normalise", broken)
    program = program_of(Block(), X)
    got, outcomes = pipeline.apply(program, PASSES)
    assert text(got) == text(program)
    assert outcomes["normalise"].misses[0].reason.endswith("ZeroDivisionError: no normal form")
    assert got.plan().transforms == ()


def test_an_unknown_pass_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"unknown pass 'same_imput'.*'default', 'same_input_linears'"):
        rewrite(Block(), [X], passes=("same_input_linears", "same_imput"))
    with pytest.raises(OptionError, match="unknown pass"):
        rewrite(Block(), [X], passes="nonsense")


def test_the_order_of_the_names_does_not_matter(rewrite_equal: Any) -> None:
    graphs = {
        str(rewrite_equal(Block(), [X], passes=order).graph_module.graph) for order in permutations(NAMES)
    }
    assert len(graphs) == 1


def test_passes_in_any_order_compute_the_same() -> None:
    module = integer_like_(Block(), seed=1)
    for order in permutations(PASSES):
        program, outcomes = pipeline.apply(program_of(module, X), order)
        assert not [
            miss for outcome in outcomes.values() for miss in outcome.misses if "undone" in miss.reason
        ]
        weights = program.plan().apply(module.state_dict())
        kept = dict(module.named_parameters())
        fused = [weights[f.transform.target.name] for f in program.fused]
        with torch.no_grad():
            got = program.graph_module(*kept.values(), X, *fused)
            assert all(map(torch.equal, got, module(X)))


def test_a_graph_without_the_idiom_comes_back_unchanged(rewrite_equal: Any) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.only(x).sigmoid() + x[:, :4]

    rewritten = rewrite_equal(Plain(), [integer_tensor((3, 8), 0)])
    unchanged = rewrite(Plain(), [integer_tensor((3, 8), 0)], passes=())
    assert str(rewritten.graph_module.graph) == str(unchanged.graph_module.graph)
    assert rewritten.plan.transforms == ()
    assert rewritten.report.matched == 0
    assert rewritten.report.misses == []


# Random graphs from small pieces: values, writes and memory of the outputs are compared bit for bit.

ROWS, WIDTH, LINEARS = 3, 4, 5
PURE = ["add", "alias", "flatten", "cat", "transpose", "clamp", "slice", "contiguous", "clone"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [*["linear"] * 6, *["raw_linear"] * 4, *PURE, "add_", "set_item", "select_copy", "out"]
        ),
        st.sampled_from([0, 0, 0, 1, 1, 2, 3, 4]),
        st.integers(0, 7),
    ),
    min_size=1,
    max_size=9,
)


class Random(nn.Module):
    """Runs the steps on a growing list of [ROWS, WIDTH] tensors; some of them leave as they are."""

    def __init__(self, steps: list[tuple[str, int, int]], leaving: set[int]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i > 2) for i in range(LINEARS))
        self.steps, self.leaving = steps, leaving

    def step(self, kind: str, a: Tensor, b: Tensor, number: int) -> list[Tensor]:
        linear = self.linears[number % LINEARS]
        if kind == "linear":
            return [linear(a).clamp(-4, 4)]
        if kind == "raw_linear":
            return [linear(a)]
        if kind == "add_":
            a.add_(1)
        elif kind == "set_item":
            a[0] = b[1]
        elif kind == "select_copy":
            a.select(1, number % WIDTH).copy_(b[:, 0].clone())
        elif kind == "out":
            torch.add(b.clone(), 1, out=a)
        else:
            return [self.pure(kind, a, b, number)]
        return []

    def pure(self, kind: str, a: Tensor, b: Tensor, number: int) -> Tensor:
        results = {
            "add": lambda: (a + b).clamp(-4, 4),
            "alias": lambda: a.reshape(-1).view(ROWS, WIDTH),
            "flatten": lambda: a.flatten().unflatten(0, (ROWS, WIDTH)),
            "cat": lambda: torch.cat([a, b], dim=-1).split([1, WIDTH, 3], dim=-1)[1],
            "transpose": lambda: a.reshape(WIDTH, ROWS).t(),
            "clamp": lambda: a.clamp(-2, 2),
            "slice": lambda: torch.cat([a[:, number % 3 :], a[:, : number % 3]], dim=1),
            "contiguous": lambda: a.contiguous().to(torch.float32),
            "clone": lambda: a.clone(),
        }
        return results[kind]()

    def forward(self, x: Tensor) -> list[Tensor]:
        pool = [x]
        for kind, i, j in self.steps:
            pool += self.step(kind, pool[i % len(pool)], pool[j % len(pool)], j)
        return [value if i in self.leaving else value * 1 for i, value in enumerate(pool)]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    steps=STEPS, leaving=st.sets(st.integers(0, 7), max_size=3), inner=st.sampled_from(["eager", "inductor"])
)
def test_random_graphs_keep_every_bit(
    rewrite_equal: Any, steps: list[tuple[str, int, int]], leaving: set[int], inner: str
) -> None:
    module = integer_like_(Random(steps, leaving), seed=1, low=-1, high=1)
    x = integer_tensor((ROWS, WIDTH), seed=0, low=-1, high=1)
    rewrite_equal(module, [x], inner=inner, fill=False)


def test_random_graphs_are_merged_often_enough_to_mean_something() -> None:
    """The strategy draws merges: else the test above would pass on nothing."""
    matched: list[int] = []

    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(steps=STEPS)
    def count(steps: list[tuple[str, int, int]]) -> None:
        x = integer_tensor((ROWS, WIDTH), seed=0)
        matched.append(rewrite(Random(steps, set()), [x]).report.matched)

    count()
    assert sum(map(bool, matched)) > 10
