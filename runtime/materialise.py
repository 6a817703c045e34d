"""Memory for what a model has on the meta device, the members of each fused weight side by side."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.errors import OptionError, PlanError, UnsupportedModelError
from fxfuse.runtime.layouts.scales import SCALES
from fxfuse.runtime.live_weights import packed_parameters
from fxfuse.runtime.plan import plan


class Materialised:
    """A context in which tensors of a model get memory, which the model takes over if nothing is raised.

    Tensors that have memory stay as they are. Buffers that no state dict holds (rotary frequencies) are
    computed by transformers, as it does after loading. Raises UnsupportedModelError for those that it does
    not compute, and OptionError where torch's default device is meta: values there would be lost.
    """

    def __init__(self, model: nn.Module, own: Mapping[str, Tensor]) -> None:
        self._model = model
        self._own = own
        self._made: dict[int, Tensor] = {}

    def tensor(self, own: Tensor) -> Tensor:
        """Where the values of one of the model's tensors belong."""
        return self._made.get(id(own), own)

    def __enter__(self) -> "Materialised":
        on_meta = {name: tensor for name, tensor in self._own.items() if tensor.is_meta}
        if not on_meta:
            return self
        device = torch.get_default_device()
        if device.type == "meta":
            raise OptionError(
                f"{next(iter(on_meta))}: gets its memory on torch's default device, which is meta; load "
                'outside of `with torch.device("meta")`, or inside of one with the device that is meant'
            )
        names = Counter(map(id, self._own.values()))
        for group in _groups(self._model):
            members = [self._own[name] for name in group]
            if all(_may_be_packed(m) and names[id(m)] == 1 for m in members):
                made = packed_parameters(members, device)
                self._made.update(zip(map(id, members), made, strict=True))
        for tensor in on_meta.values():
            if id(tensor) not in self._made:
                empty = torch.empty_like(tensor, device=device)
                is_parameter = isinstance(tensor, nn.Parameter)
                self._made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        for tensor in on_meta.values():
            self._made[id(tensor)].__dict__.update(tensor.__dict__)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            return
        _compute_buffers(self._model)
        for module in self._model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) in self._made:
                        tensors[name] = self._made[id(tensor)]  # type: ignore[assignment]


def _groups(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of the parameters that the fused weights consist of, in the order of their rows."""
    try:
        groups = [transform.sources for transform in plan(model, "fused").transforms]
    except PlanError:  # nothing to merge
        return []
    return [group for group in groups if not group[0].endswith(SCALES)]


def _may_be_packed(tensor: Tensor) -> bool:
    """Linears in FP8 are no operation of a captured graph that is merged."""
    is_plain = type(tensor) is nn.Parameter and tensor.dtype.itemsize > 1
    return is_plain and tensor.is_meta and tensor.is_contiguous()


def _compute_buffers(model: nn.Module) -> None:
    """Give the buffers that are in no file their values; the model is as it was where that fails."""
    before: list[tuple[nn.Module, str, Tensor]] = []
    owner: dict[int, Any] = {}
    for module in model.modules():
        for child in module.modules() if hasattr(module, "_init_weights") else ():
            owner[id(child)] = module
        before += [
            (module, name, buffer)
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
        ]
    try:
        for module, name, buffer in before:
            module._buffers[name] = torch.full_like(buffer, torch.nan, device=torch.get_default_device())
        for module in {id(module): module for module, _, _ in before}.values():
            if id(module) in owner and not module._parameters:
                owner[id(module)]._init_weights(module)
        unknown = [name for module, name, _ in before if _is_unset(module._buffers[name])]
        if unknown:
            raise UnsupportedModelError(
                f"{unknown[0]}: a buffer on the meta device that no checkpoint has ({len(unknown)} in all); "
                "make the model with its buffers in memory"
            )
    except BaseException:
        for module, name, buffer in before:
            module._buffers[name] = buffer
        raise


def _is_unset(buffer: Tensor | None) -> bool:
    return buffer is not None and bool(buffer.isnan().any())
