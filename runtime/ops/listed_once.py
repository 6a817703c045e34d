"""Operators of many arguments, listed once: the fields of named tuples are the schema's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch.library import CustomOpDef


def operator(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *groups: type[Any],
    mutates: Iterable[str] = (),
) -> CustomOpDef:
    """The operator `fxfuse::name` on the fields of `groups`, in their order and with their defaults.

    Args:
        run: computes, of one argument for each group; its return annotation is the operator's.
        fake: the same on tensors without memory.
        groups: NamedTuples with annotated fields.
        mutates: the fields that `run` writes to.
    """
    parameters = [parameter for group in groups for parameter in _parameters(group)]
    signature = inspect.Signature(parameters, return_annotation=get_type_hints(run)["return"])

    def grouped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*(group(*(bound.arguments[f] for f in group._fields)) for group in groups))

        return call

    called = grouped(run)
    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__doc__, called.__name__, called.__qualname__ = run.__doc__, name, name
    # Any strides will do: Inductor need not turn a value into the layout it has without a compiler.
    tags = () if mutates else (torch.Tag.flexible_layout,)
    registered = torch.library.custom_op(f"fxfuse::{name}", called, mutates_args=tuple(mutates), tags=tags)
    registered.register_fake(grouped(fake))
    return registered


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints, defaults = get_type_hints(group), group._field_defaults
    return [
        inspect.Parameter(
            field,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=hints[field],
            default=defaults.get(field, inspect.Parameter.empty),
        )
        for field in group._fields
    ]
