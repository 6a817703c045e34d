"""The weight plan: what becomes of the parameters, as data that checks, inverts, binds and applies itself.

Before: the tensors named as sources.    After: the targets, each row a row of some source.
A plan names only what it changes; every other tensor of a state dict is carried through as it is.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from fxfuse.errors import PlanError
from fxfuse.passes.weights.check import check_plan
from fxfuse.passes.weights.describe import describe_transforms
from fxfuse.passes.weights.inverse import invert
from fxfuse.passes.weights.tensor_spec import TensorSpec, dtype_name
from fxfuse.passes.weights.transform import Transform, filled_target
from fxfuse.passes.weights.usage import Usage

FORMAT = "fxfuse.weight_plan"
VERSION = 1

# where programs put one and the same decoder: text part of a two-part model, text model, their bodies alone
DECODER_PREFIXES = ("model.language_model.", "model.", "language_model.", "")


@dataclass(frozen=True)
class WeightPlan:
    """Sources, and transforms that use each of their rows exactly once; raises PlanError if they do not.

    `usages` declares the exceptions: what is replicated or broadcast, what is left to others, and why.
    """

    sources: tuple[TensorSpec, ...] = ()
    transforms: tuple[Transform, ...] = ()
    usages: tuple[Usage, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        dtypes = {source.name: source.dtype for source in self.sources}
        resolved = (
            t
            if t.target.dtype or not dtypes.get(t.rows.sources[0])
            else replace(t, target=replace(t.target, dtype=dtypes[t.rows.sources[0]]))
            for t in self.transforms
        )
        object.__setattr__(self, "transforms", tuple(resolved))
        object.__setattr__(self, "usages", tuple(sorted(self.usages, key=_by_content)))
        check_plan(self.sources, [(t.target, t.panels) for t in self.transforms], self.usages)

    @property
    def targets(self) -> tuple[TensorSpec, ...]:
        """What the plan makes, in the order of its transforms."""
        return tuple(transform.target for transform in self.transforms)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the plan's content, whatever the order of its transforms and sources."""
        data = self._to_data()
        data["sources"].sort(key=lambda source: source["name"])
        data["transforms"].sort(key=lambda transform: transform["target"]["name"])
        return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def inverse(self) -> "WeightPlan":
        """The plan that gives every source back, bit for bit, in the order of `sources`.

        Of what this plan repeats, the first copy is taken. Raises PlanError when this plan leaves rows out.
        """
        transforms, usages = invert(self.sources, self.transforms, self.usages)
        return WeightPlan(self.targets, transforms, usages)

    def renamed(self, renamed: Callable[[str], str]) -> "WeightPlan":
        """The same plan over other names: those of another layer, say."""
        names = {source.name: renamed(source.name) for source in self.sources}
        return WeightPlan(
            tuple(replace(source, name=names[source.name]) for source in self.sources),
            tuple(
                Transform(
                    replace(t.target, name=renamed(t.target.name)),
                    t.rows.renamed(names),
                    tuple(panel.renamed(names) for panel in t.beside),
                )
                for t in self.transforms
            ),
            tuple(replace(usage, source=names.get(usage.source, usage.source)) for usage in self.usages),
        )

    def bind(self, headers: Mapping[str, Any]) -> "WeightPlan":
        """This plan fitted to named tensors (anything with .shape and .dtype): dtypes, prefix and presence.

        A dtype of None becomes the tensor's, names follow the prefix that the decoder has there, a scalar of
        a template takes the shape that it is stored in ([1] or [1, 1], say), and a transform none of whose
        sources is there is dropped. Raises PlanError, listing every fault, when the sources of a transform
        are there in part, a shape or dtype differs, or a target's name is taken; and when no source of the
        plan is there at all.
        """
        if not self.transforms:
            return self
        plan = self._with_prefix_of(headers)
        kept = [t for t in plan.transforms if any(name in headers for name in t.sources)]
        if not kept:
            state = (
                "are there already"
                if any(t.name in headers for t in plan.targets)
                else "are not there either"
            )
            raise PlanError(
                f"none of the plan's {len(plan.sources)} sources is among the {len(headers)} tensors given, "
                f"first {plan.sources[0]}; its targets {state}: check whose tensors these are"
            )
        used = {name for t in kept for name in t.sources}
        # what no transform reads (every row of it a copy) is used up with the rest
        used |= {source.name for source in plan.sources if source.name in headers} - {
            name for t in plan.transforms for name in t.sources
        }
        sources = [source for source in plan.sources if source.name in used]
        faults = [fault for source in sources if (fault := _misfit(source, headers.get(source.name)))]
        faults += [
            f"{t.target.name}: the name is taken by a tensor that the plan does not change; rename or drop it"
            for t in kept
            if t.target.name in headers and t.target.name not in used
        ]
        if faults:
            raise PlanError("the plan does not fit these tensors:\n  " + "\n  ".join(faults))
        shapes = {s.name: tuple(headers[s.name].shape) for s in sources if s.dtype is None and s.shape == ()}
        return WeightPlan(
            tuple(
                replace(s, shape=shapes.get(s.name, s.shape), dtype=dtype_name(headers[s.name].dtype))
                for s in sources
            ),
            tuple(
                replace(t, target=replace(t.target, shape=shapes[t.sources[0]]))
                if t.target.shape == () and t.sources[0] in shapes
                else t
                for t in kept
            ),
            tuple(usage for usage in plan.usages if usage.source in used),
        )

    def apply(self, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A new dict: the targets, in memory of their own, in place of the sources, and the rest as it is.

        Binds first. A target stands where the first of its sources stood; the dict given and its tensors stay
        as they are. Raises PlanError as `bind` does, and when the sources of a target are on several devices.
        """
        plan = self.bind(state_dict)
        sources = {source.name for source in plan.sources}
        places = {name: place for place, name in enumerate(state_dict)}
        made: dict[str, list[TensorSpec]] = {}
        for transform in plan.transforms:
            made.setdefault(min(transform.sources, key=places.__getitem__), []).append(transform.target)
        filled = {t.target.name: filled_target(t, state_dict) for t in plan.transforms}
        result: dict[str, torch.Tensor] = {}
        for name, tensor in state_dict.items():
            result.update({target.name: filled[target.name] for target in made.get(name, ())})
            if name not in sources:
                result[name] = tensor
        return result

    def to_json(self) -> str:
        """The plan as JSON text, which `from_json` reads back to an equal plan."""
        return json.dumps(self._to_data(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "WeightPlan":
        """The plan that `to_json` wrote; raises PlanError for any other text, version or faulty plan."""
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(f"not the JSON of a weight plan: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"not a weight plan: its format field must be {FORMAT!r}")
        if data.get("version") != VERSION:
            raise PlanError(
                f"weight plan version {data.get('version')!r} is not known; this program reads {VERSION}"
            )
        if data.keys() - {"usages"} != {"format", "version", "sources", "transforms"}:
            raise PlanError(
                f"a weight plan has sources, transforms, usages and no other fields, not {sorted(data)}"
            )
        sources, transforms, usages = data["sources"], data["transforms"], data.get("usages", [])
        if not all(isinstance(field, list) for field in (sources, transforms, usages)):
            raise PlanError("sources, transforms and usages of a weight plan are lists")
        return cls(
            tuple(map(TensorSpec.from_data, sources)),
            tuple(map(Transform.from_data, transforms)),
            tuple(map(Usage.from_data, usages)),
        )

    def _to_data(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "sources": [source.to_data() for source in self.sources],
            "transforms": [transform.to_data() for transform in self.transforms],
        }
        return data | ({"usages": [usage.to_data() for usage in self.usages]} if self.usages else {})

    def _with_prefix_of(self, headers: Mapping[str, Any]) -> "WeightPlan":
        """This plan under the decoder prefix that finds most of its sources, its own if none finds more."""
        names = [spec.name for spec in (*self.sources, *self.targets)]
        own = next(p for p in DECODER_PREFIXES if all(name.startswith(p) for name in names))

        def found(prefix: str) -> int:
            return sum(prefix + source.name.removeprefix(own) in headers for source in self.sources)

        best = max((own, *DECODER_PREFIXES), key=found)
        if best == own:
            return self
        new = {name: best + name.removeprefix(own) for name in names}
        return WeightPlan(
            tuple(replace(source, name=new[source.name]) for source in self.sources),
            tuple(t.renamed(new) for t in self.transforms),
            tuple(replace(usage, source=new[usage.source]) for usage in self.usages),
        )

    def __len__(self) -> int:
        return len(self.transforms)

    def __str__(self) -> str:
        head = f"WeightPlan: {len(self.sources)} tensors to {len(self.transforms)}, digest {self.digest[:12]}"
        return "\n  ".join([head, *describe_transforms([(t.target, t.panels) for t in self.transforms])])


def _by_content(usage: Usage) -> tuple[str, str, str]:
    return usage.source, usage.how, usage.role


def _misfit(source: TensorSpec, header: Any) -> str | None:
    """Why the tensor found under a source's name is not that source, or None."""
    if header is None:
        return f"{source.name}: missing, while tensors that it merges with are there"
    scalar = source.shape == () and source.dtype is None and set(header.shape) <= {1}
    if tuple(header.shape) != source.shape and not scalar:
        return f"{source.name}: shape {list(header.shape)}, the plan needs {list(source.shape)}"
    dtype = dtype_name(header.dtype)
    if source.dtype is not None and dtype != source.dtype:
        return f"{source.name}: dtype {dtype}, the plan needs {source.dtype}"
    return None
