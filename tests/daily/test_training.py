"""Training with an optimised model: the original's gradients, and every step seen by the next answer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.runtime.optimize import optimization_report

Make = Callable[..., Any]


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "frozen", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["trained", "frozen base"]
)
@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_gives_the_gradients_of_the_plain_model(
    make_model: Make, prompt: Tensor, reentrant: bool, frozen: bool
) -> None:
    plain = make_model().train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(not frozen or "norm" in name or "embed" in name)
    expected = gradients(copy.deepcopy(plain), prompt)
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model = fxfuse.optimize(plain, inner="aot_eager")
    for _ in range(2):
        assert_close(gradients(model, prompt), expected)
    report = model.optimization_report
    assert report.calls >= 2 and not report.failures


def saved_bytes(model: Any, ids: Tensor) -> int:
    """What the forward keeps for the backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(ids, labels=ids, use_cache=False).loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in kept.items() if address not in weights)


@pytest.mark.slow
def test_gradient_checkpointing_still_saves_memory(make_model: Make, prompt: Tensor) -> None:
    """With a frozen base, which merges: the graph is rewritten, and still computes its layers again."""
    kept = {}
    for checkpointing in (False, True):
        model = make_model(layers=("full_attention",) * 2).train()
        model.model.requires_grad_(False)
        model.model.embed_tokens.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        fxfuse.optimize(model, inner="aot_eager")
        gradients(model, prompt)  # compiles
        kept[checkpointing] = saved_bytes(model, prompt)
        assert model.optimization_report.matched == 4
    assert kept[True] < 0.8 * kept[False]


def test_rollouts_and_steps_in_turns_are_those_of_the_plain_model(make_model: Make, prompt: Tensor) -> None:
    """As reinforcement learning has them: generate, score, backward, step, and again with the new weights."""
    plain = make_model()
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (plain, model)]
    graphs = []
    for _ in range(3):
        torch.manual_seed(7)
        expected = plain.generate(prompt, do_sample=True, max_new_tokens=4, min_new_tokens=4)
        torch.manual_seed(7)
        assert torch.equal(
            model.generate(prompt, do_sample=True, max_new_tokens=4, min_new_tokens=4), expected
        )
        losses = []
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            loss = each(expected, labels=expected, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(each.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        graphs.append(len(model.optimization_report.graphs))
    assert graphs[0] == graphs[2]
    assert all(graph.packs <= 1 for graph in model.optimization_report.graphs)


class Adapted(nn.Module):
    """Two frozen linears, with a small trained one over the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(2))
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * self.k(x) + self.up(self.down(x))


def test_what_is_frozen_merges_alike_with_and_without_grad_and_is_packed_once() -> None:
    model = fxfuse.optimize(Adapted(), inner="eager")
    x = torch.randn(3, 8)
    for _ in range(5):
        with torch.no_grad():
            torch.testing.assert_close(model(x), model.forward(x))
        model(x).sum().backward()
    report = optimization_report(model)
    assert report is not None and report.calls == 10
    assert [[m.members for m in g.outcomes["same_input_linears"].matches] for g in report.graphs] == [
        [("q.weight", "k.weight")]
    ] * 2
    assert [graph.packs for graph in report.graphs] == [1, 1] and not report.notes
    reasons = {miss.where: miss.reason for miss in report.graphs[0].outcomes["same_input_linears"].misses}
    assert reasons.keys() == {"down"} and "low-rank product" in reasons["down"]


@pytest.mark.parametrize(
    "inner", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.inductor])]
)
def test_gradients_reach_the_first_of_many_layers(make_model: Make, prompt: Tensor, inner: str) -> None:
    """Layers are compiled apart, each distinct one once: what crosses between them carries gradients."""
    plain = make_model(("linear_attention", "full_attention", "linear_attention") * 2).train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("norm" in name or "embed" in name)
    expected = gradients(copy.deepcopy(plain), prompt)
    assert any("layers.0." in name for name in expected) and any("embed" in name for name in expected)
    model = fxfuse.optimize(plain, inner=inner, report="off")
    for _ in range(2):
        assert_close(gradients(model, prompt), expected)
    report = model.optimization_report
    assert report.calls == 2 and report.matched and not report.failures
