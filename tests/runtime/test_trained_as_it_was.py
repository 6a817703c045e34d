"""Training where nothing matches: compiled, our own embeddings, the gradients of the plain model."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfuse.runtime import inner
from fxfuse.runtime.sessions import report_of

IDS = torch.tensor([[3, 1, 6, 3], [0, 3, 6, 1]])


class Tied(nn.Module):
    """A table that is the head as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, **options)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Inductor would be given; it runs as it is."""
    found: list[Any] = []
    torch.compiler.reset()  # there is a limit to the graphs of one forward

    def compile_graph(name: str, mode: Any, graph: Any, inputs: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(inner, "compile_graph", compile_graph)
    return found


def gradient(model: Callable[[Tensor], Tensor], table: nn.Embedding) -> Tensor:
    table.weight.grad = None
    model(IDS).square().sum().backward()
    assert table.weight.grad is not None
    return table.weight.grad.to_dense()


def calls(graph: Any) -> set[str]:
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("padding", [None, 0, 3, -1])
def test_embeddings_have_the_gradient_of_the_plain_model(graphs: list[Any], padding: int | None) -> None:
    model = Tied(padding_idx=padding).double()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="fxfuse")
    torch.testing.assert_close(gradient(compiled, model.table), gradient(twin, twin.table))
    assert len(graphs) == 1 and "fxfuse.embedding.default" in calls(graphs[0])


def test_a_frozen_table_and_its_module_stay(graphs: list[Any]) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4)).double()
    model[0].requires_grad_(False)
    torch.compile(model, backend="fxfuse")(IDS).sum().backward()
    assert len(graphs) == 1 and "fxfuse.embedding.default" not in calls(graphs[0])


def test_aotautograd_reads_the_same_of_the_copy(graphs: list[Any]) -> None:
    model = Tied().double()
    torch.compile(model, backend="fxfuse")(IDS)
    inputs = graphs[0].graph.find_nodes(op="placeholder")
    assert all(node._dynamo_source is not None for node in inputs)


def test_what_is_compiled_is_verified_where_asked_for(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(name: str, mode: Any, graph: Any, inputs: Any) -> Callable[..., Any]:
        return lambda *args: tuple(y + 1 for y in graph.forward(*args))

    monkeypatch.setattr(inner, "compile_graph", wrong)
    model = Tied().double()
    compiled = torch.compile(model, backend="fxfuse", options={"verify": True})
    torch.testing.assert_close(compiled(IDS), model(IDS))
    report = report_of(model.parameters())
    assert report is not None and any("does not reproduce" in note for note in report.notes)


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str
)
def test_other_embeddings_stay(graphs: list[Any], options: dict[str, Any]) -> None:
    model = nn.Embedding(7, 4, **options).double()
    twin = copy.deepcopy(model)
    got = gradient(torch.compile(model, backend="fxfuse"), model)
    torch.testing.assert_close(got, gradient(twin, twin))
    assert not any("fxfuse.embedding.default" in calls(graph) for graph in graphs)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_a_whole_model_under_inductor(make_model: Any, checkpointing: bool) -> None:
    plain = make_model().train()
    twin = copy.deepcopy(plain)
    if checkpointing:
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
    model = plain.optimize(dynamic=False, report="off")
    for each in (model, twin):
        each(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    report = model.optimization_report
    assert report.calls and not report.failures
    assert any("it is compiled as it is" in note for note in report.notes)
