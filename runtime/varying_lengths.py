"""Which sizes of a call are lengths, said to Dynamo before its first graph."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def varying(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
    """Say that lengths vary before the first graph, which saves compiling one for the first length only.

    Nothing of it stays on the caller's tensors: another compilation would take it for its own.
    """
    marked: list[tuple[torch.Tensor, set[str]]] = []
    for tensor, dim in _lengths(args, kwargs):
        before = set(vars(tensor))
        if not any(map(_is_mark, before)):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
            marked.append((tensor, before))
    try:
        with _cache_length(args, kwargs):
            yield
    finally:
        for tensor, before in marked:
            for name in filter(_is_mark, vars(tensor).keys() - before):
                vars(tensor).pop(name, None)


def _is_mark(attribute: str) -> bool:
    return attribute.startswith(("_dynamo_", "_has_dynamo_"))


def _lengths(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[torch.Tensor, int]]:
    """Where a call's tensors have the length of a sequence as a size."""
    for value in (*args, *kwargs.values()):
        if not isinstance(value, torch.Tensor) or value.is_floating_point():
            continue
        if value.dim() >= 2 and value.shape[-1] > 1:
            yield value, value.dim() - 1
    for layer in getattr(kwargs.get("past_key_values"), "layers", ()):
        if type(layer).__name__ != "DynamicLayer":
            continue
        for tensor in (layer.keys, layer.values):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tensor.shape[2] > 1:
                yield tensor, 2


@contextmanager
def _cache_length(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
    """Lets the length of a static cache vary in a prompt's graph: generate() makes a larger one when needed.

    Not for a decoded token, where this would cost more time than the second graph that it saves.
    """
    tokens = next((kwargs[k] for k in ("input_ids", "inputs_embeds") if kwargs.get(k) is not None), None)
    tokens = args[0] if tokens is None and args else tokens
    is_prompt = isinstance(tokens, torch.Tensor) and tokens.dim() > 1 and tokens.shape[1] > 1
    layers = getattr(kwargs.get("past_key_values"), "layers", ()) if is_prompt else ()
    static = [layer for layer in layers if type(layer).__name__ == "StaticLayer"]
    if not static:
        yield
        return
    config: Any = torch.compiler.config
    try:
        with config.patch(dynamic_sources=r".*\.max_cache_len$"):
            yield
    finally:
        for layer in static:  # Dynamo marks what such a prompt has made: the token's graph would vary, too
            for tensor in (layer.keys, layer.values):
                if isinstance(tensor, torch.Tensor):
                    vars(tensor).pop("_dynamo_propagated_dynamic_indices", None)
