"""For whom Dynamo's graphs are compiled, and the report that they go to."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxfuse.runtime.report import Report


@dataclass
class Session:
    """For whom a graph is compiled: the model if it is known, and the report that its graphs go to."""

    report: Report = field(default_factory=Report)
    model: nn.Module | None = None
    dry_run: bool = False
    refusals: dict[str, str] | None = None
    anonymous: bool = False


_current: ContextVar[Session | None] = ContextVar("fxfuse_session", default=None)
_reports: Any = WeakTensorKeyDictionary()


@contextmanager
def compiling_for(session: Session) -> Iterator[None]:
    """What Dynamo hands to the backend meanwhile is this session's."""
    token = _current.set(session)
    try:
        yield
    finally:
        _current.reset(token)


def session_of(inputs: Sequence[Any]) -> Session:
    """That of the call; without one, graphs of the same parameters share a report."""
    return _current.get() or _anonymous(inputs)


def _anonymous(inputs: Sequence[Any]) -> Session:
    report = report_of(value for value in inputs if isinstance(value, nn.Parameter)) or Report()
    remember(report, inputs)
    return Session(report, _root_module(), anonymous=True)


def _root_module() -> nn.Module | None:
    """The module whose forward Dynamo is tracing, if it is one."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    found = InstructionTranslator.current_tx().output.local_scope.get("self")
    return found if isinstance(found, nn.Module) else None


def remember(report: Report, inputs: Iterable[Any]) -> None:
    """From now on `report_of` the parameters among these inputs is this one."""
    for value in inputs:
        if isinstance(value, nn.Parameter):
            _reports[value] = report


def report_of(parameters: Iterable[Tensor]) -> Report | None:
    """The report of graphs that were compiled over these parameters without optimize()."""
    return next((found for p in parameters if (found := _reports.get(p)) is not None), None)
