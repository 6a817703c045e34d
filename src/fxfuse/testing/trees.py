"""Nested outputs and inputs as a flat mapping from path to leaf, caches included."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Opaque", "cache_tensors", "cast_floating", "flatten"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, slice)


@dataclasses.dataclass(frozen=True)
class Opaque:
    """A leaf that cannot be looked into; two of one type compare equal."""

    type_name: str


def _is_cache(value: object) -> bool:
    """A transformers Cache by its shape, so that nothing here imports transformers."""
    return hasattr(value, "get_seq_length") and (
        isinstance(getattr(value, "layers", None), list) or hasattr(value, "self_attention_cache")
    )


def _cache_parts(cache: Any) -> list[tuple[str, Any]]:
    if hasattr(cache, "self_attention_cache"):  # encoder and decoder in one
        return [(name, getattr(cache, name)) for name in ("self_attention_cache", "cross_attention_cache")]
    return [(f"layers[{index}]", layer) for index, layer in enumerate(cache.layers)]


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a container, or None for a leaf."""
    if isinstance(value, Mapping):
        return [(str(key) if isinstance(key, str) else f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return [(f"[{index}]", part) for index, part in enumerate(value)]
    if _is_cache(value):
        return _cache_parts(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None


def _layer_state(layer: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and counters of one cache layer: keys, conv_states[0], cumulative_length and the like."""
    for name, value in sorted(vars(layer).items()):
        if isinstance(value, (Tensor, bool, int)):
            yield name, value
        elif isinstance(value, dict):
            yield from (
                (f"{name}[{key!r}]", part)
                for key, part in value.items()
                if isinstance(part, (Tensor, bool, int))
            )


def _join(prefix: str, name: str) -> str:
    return name if not prefix else prefix + name if name.startswith("[") else f"{prefix}.{name}"


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of `tree` by path: tensors, plain values, and `Opaque` for what cannot be looked into.

    Knows mappings (transformers' ModelOutput is one), sequences, named tuples, dataclasses and caches. A
    cache gives its layers' tensors and counters; two paths may lead to one tensor.
    """
    if isinstance(tree, (Tensor, *_PLAIN)):
        return {prefix or "output": tree}
    leaves: dict[str, Any] = {}
    if _is_cache(tree) and not hasattr(tree, "self_attention_cache"):
        for name, layer in _cache_parts(tree):
            leaves |= {_join(_join(prefix, name), key): value for key, value in _layer_state(layer)}
        return leaves
    children = _children(tree)
    if children is None:
        kind = type(tree)
        return {prefix or "output": Opaque(f"{kind.__module__}.{kind.__qualname__}")}
    for name, part in children:
        leaves |= flatten(part, _join(prefix, name))
    return leaves


def cache_tensors(cache: Any) -> dict[str, Tensor]:
    """The tensors of a transformers Cache by path: `layers[0].keys`, `layers[1].conv_states[0]`, ...

    The tensors are the cache's own, not copies. A layer that has not been used yet has none.
    """
    return {path: leaf for path, leaf in flatten(cache).items() if isinstance(leaf, Tensor)}


def cast_floating(tree: Any, dtype: torch.dtype, memo: dict[int, Any] | None = None) -> Any:
    """`tree` with every floating tensor cast to `dtype`.

    Containers are rebuilt; caches are changed in place, so pass a copy. One tensor met twice is cast once,
    but tensors that were views of each other are not afterwards.
    """
    memo = {} if memo is None else memo
    if id(tree) in memo:
        return memo[id(tree)]
    result = tree
    if isinstance(tree, Tensor):
        result = tree.to(dtype) if tree.is_floating_point() else tree
    elif _is_cache(tree):
        for _, part in _cache_parts(tree):
            if _is_cache(part):
                cast_floating(part, dtype, memo)
            else:
                _cast_layer(part, dtype, memo)
    elif isinstance(tree, Mapping):
        cast = {key: cast_floating(part, dtype, memo) for key, part in tree.items()}
        result = cast if type(tree) is dict else type(tree)(**cast)
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        result = type(tree)(*(cast_floating(part, dtype, memo) for part in tree))
    elif isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
        result = type(tree)(cast_floating(part, dtype, memo) for part in tree)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree) if field.init]
        result = dataclasses.replace(
            tree, **{name: cast_floating(getattr(tree, name), dtype, memo) for name in names}
        )
    memo[id(tree)] = result
    return result


def _cast_layer(layer: Any, dtype: torch.dtype, memo: dict[int, Any]) -> None:
    for name, value in vars(layer).items():
        if isinstance(value, (Tensor, dict)):
            setattr(layer, name, cast_floating(value, dtype, memo))
        elif isinstance(value, torch.dtype) and value.is_floating_point:
            setattr(layer, name, dtype)
