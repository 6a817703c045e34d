"""The tensors that a config describes, as its family's files have them, without dtypes: no weight is made."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxfuse.errors import CheckpointError
from fxfuse.passes.weights import Draft, TensorSpec
from fxfuse.passes.weights.plan import DECODER_PREFIXES
from fxfuse.runtime.families import Family
from fxfuse.runtime.layouts.decoder import Decoder
from fxfuse.runtime.layouts.experts import to_single
from fxfuse.runtime.layouts.geometry import Geometry, text_config
from fxfuse.runtime.layouts.scales import is_stack, scale_name
from fxfuse.runtime.quantization import Scheme
from fxfuse.runtime.recognise import bare

FP8 = "float8_e4m3fn"
_UNFIT = "config.json describes no model that transformers can build"


def load_config(fields: Mapping[str, Any]) -> Any:
    """transformers' config object for the fields of a config.json; CheckpointError where it makes none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(dict(fields)))
    except ImportError:  # a package is broken, not the config
        raise
    except Exception as error:
        raise CheckpointError(f"{_UNFIT} ({error})") from error


def decoder_on_meta(config: Any) -> nn.Module:
    """The decoder that a config describes, without memory; CheckpointError where transformers makes none."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            decoder: nn.Module = AutoModel.from_config(text_config(config))
    except ImportError:
        raise
    except Exception as error:
        raise CheckpointError(f"{_UNFIT} ({error})") from error
    return decoder


def template(config: Any, family: Family, scheme: Scheme | None) -> dict[str, TensorSpec]:
    """Name and shape of every parameter of a config's decoder.

    Of FP8 checkpoints, which have their experts one by one, the linears that the config does not except are
    float8, with scales beside them.
    """
    decoder = decoder_on_meta(config)
    composite = config.model_type in family.composite_model_types
    prefix = family.prefixes[0] if composite else "model."
    tensors = {
        prefix + name: TensorSpec(prefix + name, tuple(parameter.shape))
        for name, parameter in decoder.named_parameters(remove_duplicate=False)
    }
    if scheme is None:
        return tensors
    linears = {f"{prefix}{name}.weight" for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    linears |= {name for name in tensors if is_stack(name)}
    quantised = {
        name: TensorSpec(name, spec.shape, FP8) if name in linears and not _is_plain(name, scheme) else spec
        for name, spec in tensors.items()
    }
    apart = Draft(quantised).then(to_single(Decoder(family, Geometry(), quantised))).tensors
    scales = [s for spec in apart.values() if spec.dtype == FP8 for s in _scales(spec, scheme)]
    return apart | {scale.name: scale for scale in scales}


def _is_plain(weight: str, scheme: Scheme) -> bool:
    """Whether the module of a weight is excepted, under whatever prefix the decoder has there."""
    module = bare(weight.removesuffix(".weight"))
    return scheme.excepts(prefix + module for prefix in DECODER_PREFIXES)


def _scales(weight: TensorSpec, scheme: Scheme) -> list[TensorSpec]:
    if scheme.strategy == "block":
        rows, columns = (-(-size // block) for size, block in zip(weight.shape, scheme.block, strict=True))
        return [TensorSpec(scale_name(weight.name, scheme.table), (rows, columns))]
    shape = (weight.rows, 1) if scheme.strategy == "channel" else ()
    # what is not in the files is dropped when the plan is bound
    return [
        TensorSpec(scale_name(weight.name, "weight_scale"), shape),
        TensorSpec(scale_name(weight.name, "input_scale"), ()),
    ]
