"""How a checkpoint's weights are quantised, by its config; what is no scale beside whole rows is refused."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fxfuse.errors import PlanError
from fxfuse.passes.weights import TensorSpec
from fxfuse.runtime.layouts.scales import is_stack, scale_kind

_STRATEGIES = ("tensor", "channel", "block")


@dataclass(frozen=True)
class Scheme:
    """FP8 weights with scales of their own.

    `strategy` is what one scale is for: a whole "tensor", an output "channel", or a "block" of `block` rows
    and columns. The name of a format in words goes into messages. `plain` lists modules that are left as they
    are, by their names or the last parts of them, or by a regular expression after "re:" that a name begins
    with; None where only the files say. `powers_of_two`: scales are ue8m0, whose tables may have a row for
    each row of the weight. `table` is what the scales of blocks are called.
    """

    name: str
    strategy: str
    block: tuple[int, int] = (1, 1)
    plain: tuple[str, ...] | None = None
    powers_of_two: bool = False
    table: str = "weight_scale_inv"

    def excepts(self, names: Iterable[str]) -> bool:
        """Whether a module that goes by any of `names` is left as it is."""
        return any(_is_meant(name, pattern) for name in names for pattern in self.plain or ())


def scheme_of(config: Any) -> Scheme | None:
    """The scheme of a config, None for plain weights.

    Raises PlanError that names any other format, or the field that is not of its type.

    `config` is a transformers config, or a namespace with the fields of a config.json.
    """
    fields = fields_of(config)
    if fields is None:
        return None
    method = fields.get("quant_method", "")
    method = str(getattr(method, "value", method)).lower()  # transformers' configs hold an enum
    if method == "fp8":
        plain = fields.get("modules_to_not_convert") or ()
        scheme = _of_blocks("fp8", fields.get("weight_block_size"), "tensor")
        return replace(scheme, plain=tuple(plain), powers_of_two=fields.get("scale_fmt") == "ue8m0")
    if method == "compressed-tensors":
        return _of_compressed_tensors(fields)
    if method == "modelopt" and str(fields.get("quant_algo")).upper() == "FP8":
        # ModelOpt writes shell patterns, compressed-tensors' form of its config a list of the same
        plain = fields.get("exclude_modules") or fields.get("ignore") or ()
        return Scheme(
            "modelopt FP8", "tensor", plain=tuple("re:" + fnmatch.translate(name) for name in plain)
        )
    name = str(fields.get("quant_algo") or method or fields.get("gguf_file") or "an unknown method")
    raise PlanError(f"weights quantised with {name}: {_REASON}")


_REASON = (
    "its packed values and scales are no whole rows, and merging would quantise anew; "
    "take the unquantised or the FP8 checkpoint"
)

# what stands beside quantised weights alone, and whose it is: the surest first, FP8's scales last
_PACKED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_2": "NVFP4",
}
_SCALES = {
    "weight_scale_inv": "FP8",
    "weight_scale": "FP8 or INT8",
    "input_scale": "FP8",
    "activation_scale": "FP8",
}


def check_formats(tensors: Iterable[TensorSpec], scheme: Scheme | None) -> None:
    """Raises PlanError for the tensors of a decoder's layers that are quantised otherwise than by the scheme.

    Rows of packed values are no rows of weights, and rows of FP8 are lost without the scales that only a
    scheme moves along.
    """
    by_leaf: dict[str, str] = {}
    for spec in tensors:
        leaf = spec.name.rpartition(".")[2]
        by_leaf.setdefault(scale_kind(spec.name) or leaf, spec.name)
        if (leaf == "weight" or is_stack(spec.name)) and (spec.dtype or "").startswith(("int", "uint")):
            by_leaf.setdefault("integers", spec.name)
    marks = _PACKED | ({} if scheme is not None else {**_SCALES, "integers": "an unknown method"})
    for leaf, how in marks.items():
        if leaf in by_leaf:
            said = "no quantization_config" if scheme is None else scheme.name
            raise PlanError(
                f"{by_leaf[leaf]}: of weights quantised with {how}, while the config says {said}; fetch the "
                "checkpoint's config.json again, or take the unquantised or the FP8 checkpoint"
            )


def fields_of(config: Any) -> Mapping[str, Any] | None:
    """The fields of a config's quantization_config, or of that of its text part; None where it has none.

    Raises PlanError that names a field which is read further and is not of its type.
    """
    field = "quantization_config"
    found = getattr(config, field, None)
    if found is None:
        text = getattr(config, "text_config", None)
        found = text.get(field) if isinstance(text, dict) else getattr(text, field, None)
    if found is None:
        return None
    # transformers' configs hold an object
    fields = _object(field, found if isinstance(found, Mapping) else getattr(found, "__dict__", found))
    for name in _NAMES:
        _check_names(f"{field}.{name}", fields.get(name))
    groups = fields.get("config_groups")
    for name, group in _object(f"{field}.config_groups", {} if groups is None else groups).items():
        where = f"{field}.config_groups.{name}"
        weights = _object(where, group).get("weights")
        weights = _object(f"{where}.weights", {} if weights is None else weights)
        for key, (kind, said) in _OF_GROUPS.items():
            if not isinstance(weights.get(key), kind | None):
                raise _not(f"{where}.weights.{key}", weights[key], said)
    return fields


# lists of modules that are left as they are, and what is read of a group of compressed-tensors
_NAMES = ("modules_to_not_convert", "exclude_modules", "ignore")
_OF_GROUPS = {"type": (str, "string"), "num_bits": (int, "number"), "strategy": (str, "string")}


def _object(field: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _not(field, value, "object of fields")
    return value


def _check_names(field: str, value: Any) -> None:
    names = () if value is None else value
    # a string would be a list of its letters
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise _not(field, value, "list of names")
    for name in names:
        if not name.startswith("re:"):
            continue
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            raise _not(field, name, f"regular expression ({error})") from error


def _not(field: str, value: Any, said: str) -> PlanError:
    return PlanError(f"{field}: {value!r} is no {said}; fetch the checkpoint's config.json again")


def _is_meant(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.startswith(pattern + ".") or name.endswith("." + pattern)


def _of_compressed_tensors(fields: Mapping[str, Any]) -> Scheme:
    groups = list((fields.get("config_groups") or {}).values())
    weights = [group.get("weights") or {} for group in groups]
    kinds = {(w.get("type"), w.get("num_bits"), w.get("strategy")) for w in weights}
    name = f"compressed-tensors {fields.get('format', '')}".strip()
    if len(kinds) != 1:
        raise PlanError(f"weights quantised with {name}: {len(kinds)} kinds of weights; one can be merged")
    ((kind, bits, strategy),) = kinds
    if (kind, bits) != ("float", 8) or strategy not in _STRATEGIES:
        raise PlanError(f"weights quantised with {name} ({kind} of {bits} bits by {strategy}): {_REASON}")
    block = weights[0].get("block_structure") if strategy == "block" else None
    scheme = replace(_of_blocks(name, block, strategy), table="weight_scale")
    if all(group.get("targets") == ["Linear"] for group in groups):
        scheme = replace(scheme, plain=tuple(fields.get("ignore") or ()))
    return scheme


def _of_blocks(name: str, block: Any, otherwise: str) -> Scheme:
    if block is None:
        if otherwise == "block":
            raise PlanError(f"weights quantised with {name}: by blocks, without their size")
        return Scheme(name, otherwise)
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise PlanError(f"weights quantised with {name}: {block!r} is no block of rows and columns")
    return Scheme(name, "block", (sizes[0], sizes[1]))
