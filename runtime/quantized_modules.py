"""What is said of modules whose weights are no plain floating-point tensors: they are left alone."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxfuse.runtime.grouped_names import grouped

WEIGHTS = ("weight", "qweight")


def notes(model: nn.Module) -> list[str]:
    """One line for each class of such modules, with the modules, layers grouped."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        kind = next((k for w in WEIGHTS if (k := _kind(getattr(module, w, None))) is not None), None)
        if kind is not None and not isinstance(module, nn.Embedding):
            found[f"{type(module).__name__} ({kind})"].append(name)
    return [
        f"quantised linears stay as they are: {', '.join(grouped(names))}: {kind} computes its weight at "
        "every call"
        for kind, names in found.items()
    ]


def _kind(weight: object) -> str | None:
    """What a weight is if it is quantised: its class for a tensor subclass, otherwise its dtype."""
    if not isinstance(weight, Tensor):
        return None
    if is_traceable_wrapper_subclass(weight):
        spread = type(weight).__module__.startswith("torch.distributed")  # over ranks, not quantised
        return None if spread else type(weight.data).__name__
    plain = torch.is_floating_point(weight) and weight.element_size() > 1
    return None if plain else str(weight.dtype)
