"""State dicts and checkpoints in any layout loaded into a model in place, optimised or not."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from fxfuse.errors import CheckpointError
from fxfuse.passes.weights import TensorSpec, WeightPlan
from fxfuse.passes.weights.tensor_spec import dtype_name
from fxfuse.passes.weights.transform import filled_target
from fxfuse.runtime.decoder_stack import inner_model, plain_tensors
from fxfuse.runtime.faults import check_scales, is_scale
from fxfuse.runtime.headers import read_plan, read_tensors
from fxfuse.runtime.materialise import Materialised
from fxfuse.runtime.plan import LAYOUTS, check_layout, plan, plan_and_origin, plan_of_tensors
from fxfuse.runtime.recognise import back_through, bare, way_back
from fxfuse.runtime.safetensors_file import read_entries
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
        path_or_dict: a checkpoint directory, one safetensors file, or tensors by name; `model.` and
            `model.language_model.` are one.
        layout: what the tensors are in, of `fxfuse.plan`'s names; None finds out. The plan that
            `fxfuse.convert` left in a directory goes before it.

    Raises:
        CheckpointError: names every tensor that is missing, unexpected, doubled, of another shape or without
            values, and those that the model ties and whose values differ; the model is then unchanged, as it
            is for files that are damaged. Where a file cannot be read to its end though it was all there, a
            model in memory is partly written, and the message says so.
        PlanError: an unknown layout, or one that cannot be told.
        UnsupportedModelError: an unknown family, or a buffer on the meta device that no file has and
            transformers does not compute.
        OptionError: a model on the meta device while torch's default device is meta, too.
    """
    if layout is not None:
        check_layout(layout)
    model = inner_model(model)
    own = plain_tensors(model, buffers=True)
    if isinstance(path_or_dict, Mapping):
        nameless = [repr(name) for name in path_or_dict if not isinstance(name, str)]
        if nameless:
            raise CheckpointError(f"{', '.join(nameless)}: names that are no strings; give tensors by name")
        others = [name for name, tensor in path_or_dict.items() if not isinstance(tensor, torch.Tensor)]
        if others:
            raise CheckpointError(f"{', '.join(others)}: no tensors; give tensors by name")
        specs = {name: TensorSpec(name, tuple(t.shape), str(t.dtype)) for name, t in path_or_dict.items()}
        _load(model, own, _FromDict(path_or_dict, _back(model, own, specs, layout)))
        return
    directory = Path(path_or_dict)
    is_file = os.path.isfile(directory)
    entries = {e.spec.name: e for e in read_entries(directory)} if is_file else read_tensors(directory)
    check_scales(entries)
    if not is_file and read_plan(directory) is not None:
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
        kept = [TensorSpec(n, tuple(t.shape), str(t.dtype)) for n, t in tensors.items() if n not in used]
        # a list: a name that is both kept and made comes twice
        self.specs = [*kept, *back.targets]

    def faults(self, names: Iterable[str]) -> list[str]:
        """In words, those of the named tensors whose values cannot be had."""
        faults = []
        for name in names:
            sources = self._made[name].sources if name in self._made else (name,)
            devices = {source: self._tensors[source].device.type for source in sources}
            faults += [f"{s}: on the meta device, without values" for s, d in devices.items() if d == "meta"]
            if len(devices) > 1 and len({self._tensors[source].device for source in sources}) > 1:
                where = ", ".join(f"{s} on {self._tensors[s].device}" for s in sources)
                faults.append(f"{name}: its parts are on several devices ({where})")
            scales = (s for s, d in devices.items() if is_scale(s) and d != "meta")
            faults += [f"{s}: holds NaN" for s in scales if bool(self._tensors[s].float().isnan().any())]
        return faults

    def place(self, name: str) -> str:
        """Where a tensor is, for messages: a dict says no more than its name."""
        return ""

    def parts(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, elements) of a tensor."""
        made = self._made.get(name)
        tensor = self._tensors[name] if made is None else filled_target(made, self._tensors)
        yield 0, tensor.detach().reshape(-1)


class _FromFiles:
    """What a plan makes of tensors in files, piece by piece."""

    def __init__(self, tensors: PlannedTensors, files: Files) -> None:
        self._tensors, self._files = tensors, files
        self.specs = [tensors.describe(name).spec for name in tensors.names]

    def faults(self, names: Iterable[str]) -> list[str]:
        """In words, those of the named tensors whose values cannot be had.

        Raises CheckpointError for a file of which bytes are missing.
        """
        self._files.check(self._tensors.entries.values())
        dtypes = {name: self._tensors.describe(name).spec.dtype or "" for name in names}
        return [
            f"{name}: dtype {dtype}, which torch has not"
            for name, dtype in dtypes.items()
            if not isinstance(getattr(torch, dtype, None), torch.dtype)
        ]

    def place(self, name: str) -> str:
        """Where a tensor is, for messages: the file of its first part."""
        return f" (in {self._tensors.describe(name).file})"

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
    found, faults = _homes(model, own, tensors)
    faults += tensors.faults(found.values())
    faults = faults or _contradictions(own, found, tensors)
    if faults:
        raise CheckpointError("these tensors do not fit; the model is unchanged:\n  " + "\n  ".join(faults))
    in_use = any(not own[home].is_meta for home in found)
    written = 0
    with Materialised(model, own) as given_memory, torch.no_grad():
        for home, name in found.items():
            into = given_memory.tensor(own[home])
            # on the tensor's own device: torch's default device may be meta
            flat = into.view(-1) if into.is_contiguous() else into.new_empty(into.numel())
            try:
                for at, elements in tensors.parts(name):
                    flat[at : at + len(elements)].copy_(elements)
            except CheckpointError as error:
                if not in_use:
                    raise
                raise CheckpointError(
                    f"{error}; the model is partly written ({written} of {len(found)} tensors, and {home} in "
                    "part): load it again, from files that can be read, before it is used"
                ) from error
            if not into.is_contiguous():
                into.copy_(flat.view(into.shape))
            written += 1


def _homes(
    model: torch.nn.Module, own: Mapping[str, torch.Tensor], tensors: "_FromDict | _FromFiles"
) -> tuple[dict[str, str], list[str]]:
    """For each of the model's tensors the name of the one that goes there, and in words what does not fit."""
    homes = {bare(name): name for name in own}
    ignored = [re.compile(p) for p in (*_IGNORED, *(getattr(model, _UNEXPECTED, None) or ()))]
    found: dict[str, str] = {}
    faults = []
    for spec in tensors.specs:
        name, there = spec.name, tensors.place(spec.name)
        home = homes.get(bare(name))
        if home is None:
            if not any(pattern.search(name) for pattern in ignored):
                faults.append(f"{name}: unexpected; the model has no such tensor{there}")
        elif home in found:
            faults.append(f"{name}: comes twice, as {found[home]} as well{there}")
        else:
            found[home] = name
            needed = own[home]
            shape, dtype = list(needed.shape), dtype_name(needed.dtype)
            if list(spec.shape) != shape:
                faults.append(f"{name}: shape {list(spec.shape)}, the model needs {shape}{there}")
            if _kind(getattr(torch, spec.dtype or "", None)) not in (None, _kind(needed.dtype)):
                faults.append(f"{name}: dtype {spec.dtype}, the model needs {dtype}{there}")
    given = {id(own[home]) for home in found}
    # a tied tensor is there under any of its names
    return found, faults + [f"{name}: missing" for name, tensor in own.items() if id(tensor) not in given]


def _contradictions(
    own: Mapping[str, torch.Tensor], found: Mapping[str, str], tensors: "_FromDict | _FromFiles"
) -> list[str]:
    """In words, the tied tensors that are there under several names with different values."""
    homes: dict[int, list[str]] = {}
    for home in found:
        homes.setdefault(id(own[home]), []).append(home)
    faults = []
    for first, *others in homes.values():
        values = _digest(tensors, found[first], own[first].dtype) if others else b""
        faults += [
            f"{found[other]}: differs from {found[first]}, and the model has one tensor for both"
            for other in others
            if _digest(tensors, found[other], own[first].dtype) != values
        ]
    return faults


def _digest(tensors: "_FromDict | _FromFiles", name: str, dtype: torch.dtype) -> bytes:
    """Of a tensor's values in a dtype, piece by piece."""
    digest = hashlib.blake2b()
    for _, elements in tensors.parts(name):
        digest.update(elements.to("cpu", dtype).contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _kind(dtype: object) -> str | None:
    """What values of a dtype are; those of one kind are rounded to one another."""
    if not isinstance(dtype, torch.dtype):
        return None
    return "floats" if dtype.is_floating_point else "complex" if dtype.is_complex else "integers"
