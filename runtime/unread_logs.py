"""What Dynamo writes for logs that nobody reads is not written while it captures a model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch._dynamo.config

_POLICY = "side_effect_replay_policy"
_config: Any = torch._dynamo.config
_trace = logging.getLogger("torch.__trace")
_side_effects = logging.getLogger("torch._dynamo.side_effects.__side_effects")


@contextmanager
def unwritten() -> Iterator[None]:
    """Within it, Dynamo makes no text of the attributes that a graph sets, unless a log of torch's wants it.

    For every attribute of a cache that a prompt sets, torch 2.13 otherwise writes the caller's stack. The
    setting is one of this thread; a user's own stays.
    """
    if not _of_one_thread() or getattr(_config, _POLICY) != "info" or _read():
        yield
        return
    setattr(_config, _POLICY, "silent")
    try:
        yield
    finally:
        setattr(_config, _POLICY, "info")


def _of_one_thread() -> bool:
    """Whether the setting can be made for this thread alone; with torch 2.11 others would compile with it."""
    entry = getattr(_config, "_config", {}).get(_POLICY)
    return isinstance(getattr(entry, "user_override", None), ContextVar)


def _read() -> bool:
    """Whether TORCH_LOGS asks for side effects, or torch's structured trace goes anywhere."""
    # torch's own handler of the trace has no folder unless somebody names one, and goes at the first use
    written = any(getattr(handler, "root_dir", "") is not None for handler in _trace.handlers)
    return written or _side_effects.isEnabledFor(logging.DEBUG)
