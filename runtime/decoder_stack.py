"""The decoder stack of a model, and the transformers model around it, found through whatever wraps them.

Wrappers keep what they wrap under a few names: torch.compile in `_orig_mod`, DistributedDataParallel in
`module`, PEFT in `base_model` and then `model`, TRL's value heads in `pretrained_model`; transformers' own
models keep the stack in `model`, those of two parts in `model.language_model`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.jit import ScriptModule

from fxfuse.errors import UnsupportedModelError

ATTRIBUTES = ("_orig_mod", "module", "base_model", "pretrained_model", "model", "language_model", "decoder")

# PEFT puts an adapted layer in the place of a layer, which it keeps under this name
_ADAPTED = "base_layer"


@dataclass(frozen=True)
class Found:
    """`stack` has the `layers`; `model` is the outermost transformers model on the way to it.

    `model` is the module that was searched where nothing on the way is one of transformers.
    """

    model: nn.Module
    stack: nn.Module


def find_decoder(model: nn.Module) -> Found:
    """The nearest module with a ModuleList `layers`, through submodules named in `ATTRIBUTES`.

    Raises UnsupportedModelError that lists the attributes tried and the types visited.
    """
    visited = []
    for way in _ways(model):
        visited.append(type(way[-1]).__name__)
        if isinstance(getattr(way[-1], "layers", None), nn.ModuleList):
            return Found(_outermost(way), way[-1])
    raise UnsupportedModelError(
        f"no decoder stack, a module with `layers`, in {', '.join(dict.fromkeys(visited))}; tried were the "
        f"attributes {', '.join(ATTRIBUTES)}: give the language model itself"
    )


def inner_model(model: nn.Module) -> nn.Module:
    """The transformers model inside of wrappers, or the module itself where there is no decoder stack."""
    try:
        return find_decoder(model).model
    except UnsupportedModelError:
        return model


def plain_tensors(model: nn.Module, *, buffers: bool = False) -> dict[str, Tensor]:
    """Parameters, and the buffers of a state dict if asked, by the names that the model's files have.

    An adapted layer goes by the name of the layer that it holds, and what was added to it is left out. Tied
    tensors come under each of their names.
    """
    named = model.state_dict(keep_vars=True) if buffers else model.named_parameters(remove_duplicate=False)
    adapted = [name.removesuffix(_ADAPTED) for name, _ in model.named_modules() if _is_adapted(name)]
    tensors: dict[str, Tensor] = {}
    for name, tensor in dict(named).items():
        outer = next((prefix for prefix in adapted if name.startswith(prefix)), None)
        if outer is None:
            tensors[name] = tensor
        elif name.startswith(inner := f"{outer}{_ADAPTED}."):
            tensors[outer + name.removeprefix(inner)] = tensor
    return tensors


def _ways(model: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules from `model` to each that can be reached, nearest first, none twice."""
    waiting, seen = deque([[model]]), {id(model)}
    while waiting:
        way = waiting.popleft()
        yield way
        if isinstance(way[-1], ScriptModule):  # whose children are no modules of Python
            continue
        for attribute in ATTRIBUTES:
            inner = way[-1]._modules.get(attribute)
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append([*way, inner])


def _outermost(way: list[nn.Module]) -> nn.Module:
    from transformers import PreTrainedModel

    return next((module for module in way if isinstance(module, PreTrainedModel)), way[0])


def _is_adapted(name: str) -> bool:
    return name.rpartition(".")[2] == _ADAPTED
