"""State dicts and checkpoints in any layout loaded into a model in place, optimised or not."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fxfuse.errors import CheckpointError, PlanError, UnsupportedModelError
from fxfuse.passes.weights import TensorSpec, WeightPlan
from fxfuse.passes.weights.plan import DECODER_PREFIXES
from fxfuse.runtime.headers import read_plan, read_tensors
from fxfuse.runtime.plan import LAYOUTS, plan, plan_and_origin
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
    fused weights, a fused checkpoint goes straight into them.

    Args:
        model: a transformers model of a known family, its parameters in memory.
        path_or_dict: a checkpoint directory, or tensors by name; `model.` and `model.language_model.` are
        one. layout: what the tensors are in, of `fxfuse.plan`'s names; None finds out.

    Raises:
        CheckpointError: names every tensor that is missing, unexpected or of another shape; the model is then
            unchanged.
        PlanError: an unknown layout, or one that cannot be told.
        UnsupportedModelError: an unknown family, or parameters without memory.
    """
    own = model.state_dict(keep_vars=True)
    meta = [name for name, tensor in own.items() if tensor.is_meta]
    if meta:
        raise UnsupportedModelError(
            f"{meta[0]}: on the meta device ({len(meta)} in all), where nothing can be copied to; "
            "give the model memory first, as from_pretrained does"
        )
    if isinstance(path_or_dict, Mapping):
        specs = {name: TensorSpec(name, tuple(t.shape), str(t.dtype)) for name, t in path_or_dict.items()}
        back = _back(model, own, specs, layout)
        _load(model, own, _FromDict(back.apply(path_or_dict)))
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
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements) of a tensor."""
        yield 0, self._tensors[name].detach().reshape(-1)


class _FromFiles:
    """Tensors in files."""

    def __init__(self, tensors: PlannedTensors, files: Files) -> None:
        self._tensors, self._files = tensors, files
        self.shapes = {name: tensors.describe(name).spec.shape for name in tensors.names}

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
        there = plan(model, layout)
        return _as_given(there).inverse().bind(given) if len(there) else there
    names = {_bare(name) for name in given}
    for candidate in LAYOUTS:
        try:
            there = plan(model, candidate)
        except PlanError:  # a layout that this model cannot be in
            continue
        read, made = ({_bare(spec.name) for spec in specs} for specs in (there.sources, there.targets))
        # all names: qwen3_next and sglang call different rows in_proj_qkvz
        if (_layers(own) - read) | made <= names:
            return _as_given(there).inverse().bind(given) if made else there
    # what is missing, and what is not known, is said tensor by tensor
    return WeightPlan()


def _layers(own: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of the decoder's layers' tensors, by which a layout is told."""
    return {bare for name in own if (bare := _bare(name)).startswith("layers.")}


def _as_given(there: WeightPlan) -> WeightPlan:
    """The same plan for tensors of any dtype."""
    return WeightPlan(
        tuple(replace(source, dtype=None) for source in there.sources),
        tuple(replace(t, target=replace(t.target, dtype=None)) for t in there.transforms),
        there.usages,
    )


def _load(model: torch.nn.Module, own: Mapping[str, torch.Tensor], tensors: "_FromDict | _FromFiles") -> None:
    """Check everything, and copy only then."""
    homes = {_bare(name): name for name in own}
    ignored = [re.compile(p) for p in (*_IGNORED, *(getattr(model, _UNEXPECTED, None) or ()))]
    found: dict[str, str] = {}
    faults = []
    for name, shape in tensors.shapes.items():
        home = homes.get(_bare(name))
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
    with torch.no_grad():
        for home, name in found.items():
            into = own[home]
            flat = into.view(-1) if into.is_contiguous() else torch.empty(into.numel(), dtype=into.dtype)
            for at, elements in tensors.parts(name):
                flat[at : at + len(elements)].copy_(elements)
            if not into.is_contiguous():
                into.copy_(flat.view(into.shape))


def _bare(name: str) -> str:
    return next(name.removeprefix(p) for p in DECODER_PREFIXES if name.startswith(p))
