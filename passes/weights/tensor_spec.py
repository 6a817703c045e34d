"""Name, shape and dtype of a tensor, without the tensor."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fxfuse.errors import PlanError

# what safetensors headers call the dtypes of torch
SAFETENSORS_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
    }
)


def dtype_name(dtype: object) -> str | None:
    """Torch's name of a dtype given as torch.dtype, its string or safetensors' string; None stays None."""
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    return SAFETENSORS_DTYPES.get(name, name)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and dtype ("bfloat16", "float32", ...; None: as in the source) of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if not self.name or any(size < 0 for size in self.shape):
            raise PlanError(
                f"{self.name!r} of shape {list(self.shape)}: a tensor has a name and no negative size"
            )

    @property
    def rows(self) -> int:
        """Number of rows: all dimensions but the last flattened, a one-dimensional tensor by element."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements per row."""
        return self.shape[-1] if len(self.shape) > 1 else 1

    def to_data(self) -> dict[str, Any]:
        """The spec as JSON values."""
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_data(cls, data: object) -> "TensorSpec":
        """The spec that `to_data` wrote; raises PlanError for anything else."""
        if not isinstance(data, dict) or data.keys() != {"name", "shape", "dtype"}:
            raise PlanError("a tensor is written as an object of name, shape and dtype")
        name, shape, dtype = data["name"], data["shape"], data["dtype"]
        sizes_fit = isinstance(shape, list) and all(type(size) is int for size in shape)
        if not isinstance(name, str) or not sizes_fit or not isinstance(dtype, str | None):
            raise PlanError(
                f"tensor {name!r}: name is a string, shape a list of integers, dtype a string or null"
            )
        return cls(name, tuple(shape), dtype)

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)} {self.dtype or 'as source'}"
