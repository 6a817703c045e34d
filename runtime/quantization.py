"""How a checkpoint's weights are quantised, by its config; what is no scale beside whole rows is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fxfuse.errors import PlanError

_STRATEGIES = ("tensor", "channel", "block")


@dataclass(frozen=True)
class Scheme:
    """FP8 weights with scales of their own.

    `strategy` is what one scale is for: a whole "tensor", an output "channel", or a "block" of `block` rows
    and columns. The name of a format in words goes into messages. `plain` lists modules that are left as they
    are, by their names or the last parts of them; None where only the files say.
    """

    name: str
    strategy: str
    block: tuple[int, int] = (1, 1)
    plain: tuple[str, ...] | None = None


def scheme_of(config: Any) -> Scheme | None:
    """The scheme of a config, None for plain weights; raises PlanError that names any other format.

    `config` is a transformers config, or a namespace with the fields of a config.json.
    """
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        text = getattr(config, "text_config", None)
        fields = text.get("quantization_config") if isinstance(text, dict) else None
    if fields is None:
        return None
    fields = fields if isinstance(fields, Mapping) else vars(fields)
    method = fields.get("quant_method", "")
    method = str(getattr(method, "value", method)).lower()  # transformers' configs hold an enum
    if method == "fp8":
        plain = fields.get("modules_to_not_convert") or ()
        scheme = _of_blocks("fp8", fields.get("weight_block_size"), "tensor")
        return replace(scheme, plain=tuple(map(str, plain)))
    if method == "compressed-tensors":
        return _of_compressed_tensors(fields)
    name = str(fields.get("quant_algo") or method or fields.get("gguf_file") or "an unknown method")
    raise PlanError(f"weights quantised with {name}: {_REASON}")


_REASON = (
    "its packed values and scales are no whole rows, and merging would quantise anew; "
    "take the unquantised or the FP8 checkpoint"
)


def _of_compressed_tensors(fields: Mapping[str, Any]) -> Scheme:
    groups = fields.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    kinds = {(w.get("type"), w.get("num_bits"), w.get("strategy")) for w in weights}
    name = f"compressed-tensors {fields.get('format', '')}".strip()
    if len(kinds) != 1:
        raise PlanError(f"weights quantised with {name}: {len(kinds)} kinds of weights; one can be merged")
    ((kind, bits, strategy),) = kinds
    if (kind, bits) != ("float", 8) or strategy not in _STRATEGIES:
        raise PlanError(f"weights quantised with {name} ({kind} of {bits} bits by {strategy}): {_REASON}")
    block = weights[0].get("block_structure") if strategy == "block" else None
    return _of_blocks(name, block, strategy)


def _of_blocks(name: str, block: Any, otherwise: str) -> Scheme:
    if block is None:
        if otherwise == "block":
            raise PlanError(f"weights quantised with {name}: by blocks, without their size")
        return Scheme(name, otherwise)
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise PlanError(f"weights quantised with {name}: {block!r} is no block of rows and columns")
    return Scheme(name, "block", (sizes[0], sizes[1]))
