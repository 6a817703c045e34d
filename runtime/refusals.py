"""Why the memory of some parameters may not be rearranged."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn


def refusals_of(
    model: nn.Module | None,
    graph_parameters: Mapping[str, nn.Parameter] = MappingProxyType({}),
    graph_tensors: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, str]:
    """Why some parameters of the model or of its graph must stay where they are, by name."""
    parameters, others = dict(graph_parameters), dict(graph_tensors)
    hooked = {}
    if model is not None:
        parameters = {**dict(model.named_parameters()), **parameters}
        for path, module in model.named_modules():
            kept = {**module._buffers, **vars(module)}
            others |= {f"{path}.{name}".strip("."): x for name, x in kept.items() if isinstance(x, Tensor)}
            if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
                for name, _ in module.named_parameters(prefix=path, recurse=False):
                    hooked[name] = "its module has a forward hook"
    return {**hooked, **refusals(parameters, others)}


def refusals(
    tensors: Mapping[str, nn.Parameter], others: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, str]:
    """Why the memory of some of these named parameters may not be rearranged.

    `others` are tensors that are no parameters and may be views of some: they would keep the old memory.
    """
    plain = {name: t for name, t in others.items() if type(t) is Tensor and t.numel() and not t.is_meta}
    by_storage = {
        t.untyped_storage().data_ptr(): name for name, t in plain.items() if t.layout == torch.strided
    }
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor:
            found[name] = f"its weight is a {type(tensor).__name__} around {type(tensor.data).__name__}"
        elif tensor.device.type == "meta":
            continue
        elif not tensor.is_contiguous():
            found[name] = f"its weight is not contiguous (strides {tuple(tensor.stride())})"
        elif tensor.is_inference():
            found[name] = "its weight was made under inference_mode and cannot be given other memory"
        elif tensor.untyped_storage().nbytes() != tensor.nbytes:
            found[name] = "its weight is a slice of larger memory that others may share"
        elif tensor.device.type == "cpu" and tensor.is_shared():
            found[name] = "its weight is in memory shared between processes"
        else:
            other = by_storage.setdefault(tensor.untyped_storage().data_ptr(), name)
            if other != name:
                found[name] = f"its weight shares memory with {other}"
                if other in tensors:
                    found.setdefault(other, f"its weight shares memory with {name}")
    return found


def other_tensors(names: Iterable[str], inputs: Iterable[Any]) -> dict[str, Tensor]:
    """The inputs of a graph that are tensors and no parameters; some may be views of one."""
    named = zip(names, inputs, strict=True)
    return {n: x for n, x in named if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)}
