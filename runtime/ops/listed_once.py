"""Operators of many arguments, listed once: the fields of a named tuple are the schema's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch.library import CustomOpDef


def operator(
    name: str,
    given: type[Any],
    run: Callable[[Any], Any],
    fake: Callable[[Any], Any],
    mutates: Iterable[str],
) -> CustomOpDef:
    """The operator `fxfuse::name` on the fields of `given`, in their order and with their defaults.

    Args:
        given: a NamedTuple with annotated fields; a call's arguments reach `run` and `fake` as one of it.
        run: computes; its return annotation is the operator's. fake: the same on tensors without memory.
        mutates: the fields that `run` writes to.
    """
    hints = get_type_hints(given)
    defaults = given._field_defaults
    parameters = [
        inspect.Parameter(
            field,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=hints[field],
            default=defaults.get(field, inspect.Parameter.empty),
        )
        for field in given._fields
    ]

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(given(*args, **kwargs))

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        parameters, return_annotation=get_type_hints(run)["return"]
    )
    call.__doc__, call.__name__, call.__qualname__ = run.__doc__, name, name
    registered = torch.library.custom_op(f"fxfuse::{name}", call, mutates_args=tuple(mutates))
    registered.register_fake(lambda *args, **kwargs: fake(given(*args, **kwargs)))
    return registered
