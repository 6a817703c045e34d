"""The widths of the published Qwen3.5 text models, as keyword arguments of `Qwen3_5TextConfig`.

Demonstrations, benchmarks and tests build models with random weights from this one table. The names are
those of the published checkpoints; `small` has the widths of `0.8b` with 4 layers and a vocabulary of 8,192,
so that it is built and compiled in seconds while every matrix product has its real shape.
"""

import copy
from typing import TYPE_CHECKING, Any

from fxfuse.errors import OptionError

if TYPE_CHECKING:
    from transformers import Qwen3_5TextConfig

__all__ = ["SIZES", "text_config"]

# The same at every published size. By transformers' default every fourth layer is full attention.
_COMMON: dict[str, Any] = {
    "vocab_size": 248320,
    "max_position_embeddings": 262144,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}


def _size(
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    value_heads: int,
    intermediate: int,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    return {
        **_COMMON,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "linear_num_value_heads": value_heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
        **more,
    }


SIZES: dict[str, dict[str, Any]] = {
    "small": _size(1024, 4, (8, 2), 16, 3584, True, vocab_size=8192),
    "0.8b": _size(1024, 24, (8, 2), 16, 3584, True),
    "2b": _size(2048, 24, (8, 2), 16, 6144, True),
    "4b": _size(2560, 32, (16, 4), 32, 9216, True),
    "9b": _size(4096, 32, (16, 4), 32, 12288, False),
    "27b": _size(5120, 64, (24, 4), 48, 17408, False),
}


def text_config(size: str, **overrides: Any) -> "Qwen3_5TextConfig":
    """The transformers configuration of one of `SIZES`, with single fields replaced by `overrides`.

    `num_hidden_layers` may be overridden alone: transformers derives `layer_types` from it.

    Raises:
        OptionError: `size` is not a key of `SIZES`.
    """
    from transformers import Qwen3_5TextConfig

    if size not in SIZES:
        raise OptionError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    # The configuration keeps the objects it is given, and callers edit rope_parameters.
    return Qwen3_5TextConfig(**copy.deepcopy({**SIZES[size], **overrides}))
