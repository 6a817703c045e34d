"""Dynamo makes no text of what a graph sets, unless a log of torch's wants it."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.side_effects import SideEffects

import fxfuse
from fxfuse.runtime import unread_logs


class Counting(nn.Module):
    """Two linears over one input, and an attribute that every call sets."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x * 2
        return self.first(x) * self.second(x)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Dynamo makes of the attributes that graphs set."""
    texts: list[str] = []
    made = SideEffects._format_side_effect_message

    def spy(self: SideEffects, var: object) -> str:
        texts.append(made(self, var))  # type: ignore[arg-type]
        return texts[-1]

    monkeypatch.setattr(SideEffects, "_format_side_effect_message", spy)
    return texts


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    assert torch._dynamo.config.side_effect_replay_policy == "info"
    torch._logging.set_logs()


def called(model: nn.Module) -> None:
    """One call, which sets the attribute."""
    x = torch.randn(2, 4)
    with torch.no_grad():
        fxfuse.optimize(model, inner="eager")(x)
    assert isinstance(model.seen, Tensor) and torch.equal(model.seen, x * 2)


def test_nothing_is_written_where_nobody_reads(told: list[str]) -> None:
    called(Counting())
    assert bool(told) != unread_logs._of_one_thread()  # torch 2.11 has one setting for all threads
    told.clear()
    torch.compile(Counting(), backend="eager")(torch.randn(2, 4))
    assert "Mutating object of type Counting" in told[0]  # what others compile is as before


def test_the_log_of_torch_is_as_before_for_who_reads_it(told: list[str]) -> None:
    torch._logging.set_logs(side_effects=True)
    called(Counting())
    assert "Mutating object of type Counting" in told[0]


def test_the_structured_trace_is_as_before_for_who_reads_it(told: list[str]) -> None:
    handler = logging.NullHandler()
    trace = logging.getLogger("torch.__trace")
    trace.addHandler(handler)
    try:
        called(Counting())
    finally:
        trace.removeHandler(handler)
    assert told


def test_a_policy_of_the_users_own_stays() -> None:
    with (
        torch._dynamo.config.patch(side_effect_replay_policy="warn"),
        pytest.warns(UserWarning, match="side effects happened"),
    ):
        called(Counting())
        assert torch._dynamo.config.side_effect_replay_policy == "warn"
