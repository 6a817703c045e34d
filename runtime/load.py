"""State dicts and checkpoints in any layout loaded into a model in place, optimised or not."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from fxfuse.errors import CheckpointError
from fxfuse.passes.weights import TensorSpec, WeightPlan
from fxfuse.passes.weights.transform import filled_target
from fxfuse.runtime.decoder_stack import inner_model, plain_tensors
from fxfuse.runtime.headers import read_plan, read_tensors
from fxfuse.runtime.materialise import Materialised
from fxfuse.runtime.plan import LAYOUTS, plan, plan_and_origin, plan_of_tensors
from fxfuse.runtime.recognise import back_through, bare, way_back
from fxfuse.runtime.streaming import Files, PlannedTensors

# tensors of which a model has no parameter unless it says so: transformers leaves them out on load, too
_IGNORED = (r"^mtp\.",)
_UNEXPECTED = "_keys_to_ignore_on_load_unexpected"


def load_state_dict(
    model: torch.nn.Module,
    path_or_dict: "str | os.PathLike[str] | Mapping[str, torch.Tensor]",
    *,
    layout: str | None = None,
) -> None:
    """Copy weights into the parameters and buffers of `model`, which keep their memory, dtypes and devices.

    A directory is read a piece at a time. Since parameters of an optimised model share the memory of the
    fused weights, a fused checkpoint goes straight into them. What is on the meta device gets memory on
    torch's default device, the members of fused weights packed already: there is never a second copy, and
    the parameters are new objects. Of a wrapped model (PEFT, DDP, ...) the transformers model inside is
    loaded, and adapters stay.

    Args:
        model: a transformers model of a known family.
        path_or_dict: a checkpoint directory, or tensors by name; `model.` and `model.language_model.` are
            one.
        layout: what the tensors are in, of `fxfuse.plan`'s names; None finds out.

    Raises:
        CheckpointError: names every tensor that is missing, unexpected, doubled or of another shape; the
            model is then unchanged.
        PlanError: an unknown layout, or one that cannot be told.
        UnsupportedModelError: an unknown family, or a buffer on the meta device that no file has and
            transformers does not compute.
    """
    model = inner_model(model)
    own = plain_tensors(model, buffers=True)
    if isinstance(path_or_dict, Mapping):
        specs = {name: TensorSpec(name, tuple(t.shape), str(t.dtype)) for name, t in path_or_dict.items()}
        _load(model, own, _FromDict(path_or_dict, _back(model, own, specs, layout)))
        return
    directory = Path(path_or_dict)
    entries = read_tensors(directory)
    if read_plan(directory) is not None:
        back = plan_and_origin(directory, "hf")[0]
    else:
        back = _back(model, own, {name: entry.spec for name, entry in entries.items()}, layout)
    with Files() as files:
        _load(model, own, _FromFiles(PlannedTensors(entries, back), files))


class _FromDict:
    """What a plan makes of tensors in memory, one at a time."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], back: WeightPlan) -> None:
        self._tensors = tensors
        self._made = {transform.target.name: transform for transform in back.transforms}
        used = {source.name for source in back.sources}
        kept = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in used}
        # a list: a name that is both kept and made comes twice
        made = [(target.name, target.shape) for target in back.targets]
        self.shapes = [*kept.items(), *made]

    def parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements) of a tensor."""
        made = self._made.get(name)
        tensor = self._tensors[name] if made is None else filled_target(made, self._tensors)
        yield 0, tensor.detach().reshape(-1)


class _FromFiles:
    """What a plan makes of tensors in files, piece by piece."""

    def __init__(self, tensors: PlannedTensors, files: Files) -> None:
        self._tensors, self._files = tensors, files
        self.shapes = [(name, tensors.describe(name).spec.shape) for name in tensors.names]

    def parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements) of a tensor, piece by piece."""
        dtype = getattr(torch, self._tensors.describe(name).spec.dtype or "")
        at = 0
        for piece in self._tensors.pieces(name, self._files):
            elements = torch.frombuffer(piece, dtype=dtype)
            yield at, elements
            at += len(elements)


def _back(
    model: torch.nn.Module,
    own: Mapping[str, torch.Tensor],
    given: Mapping[str, TensorSpec],
    layout: str | None,
) -> WeightPlan:
    """The plan from the layout that the given tensors are in to the model's own."""
    if layout is not None:
        return back_through(plan(model, layout), given)
    found = way_back(lambda known: plan(model, known), LAYOUTS, own, given)
    if found is None:
        # what is missing and what is not known is said tensor by tensor
        return WeightPlan()
    # names are transformers' own, where experts may still be turned: their shapes tell
    return found if len(found) else plan_of_tensors(model.config, given, "hf")


def _load(model: torch.nn.Module, own: Mapping[str, torch.Tensor], tensors: "_FromDict | _FromFiles") -> None:
    """Check everything, and copy only then."""
    homes = {bare(name): name for name in own}
    ignored = [re.compile(p) for p in (*_IGNORED, *(getattr(model, _UNEXPECTED, None) or ()))]
    found: dict[str, str] = {}
    faults = []
    for name, shape in tensors.shapes:
        home = homes.get(bare(name))
        if home is None:
            if not any(pattern.search(name) for pattern in ignored):
                faults.append(f"{name}: unexpected; the model has no such tensor")
        elif home in found:
            faults.append(f"{name}: comes twice, as {found[home]} as well")
        else:
            found[home] = name
            if shape != tuple(own[home].shape):
                faults.append(f"{name}: shape {list(shape)}, the model needs {list(own[home].shape)}")
    there = {id(own[home]) for home in found}
    # a tied tensor is there under any of its names
    faults += [f"{name}: missing" for name, tensor in own.items() if id(tensor) not in there]
    if faults:
        raise CheckpointError("these tensors do not fit; the model is unchanged:\n  " + "\n  ".join(faults))
    with Materialised(model, own) as given_memory, torch.no_grad():
        for home, name in found.items():
            into = given_memory.tensor(own[home])
            flat = into.view(-1) if into.is_contiguous() else torch.empty(into.numel(), dtype=into.dtype)
            for at, elements in tensors.parts(name):
                flat[at : at + len(elements)].copy_(elements)
            if not into.is_contiguous():
                into.copy_(flat.view(into.shape))
