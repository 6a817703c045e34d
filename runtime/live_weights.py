"""Fused weights that share memory with the parameters they are made of, and are never stale.

A packed weight owns one tensor; each parameter becomes a view of its rows with a storage object of its own
(through DLPack), so that names, values, `state_dict` and every way of saving stay what they were. What breaks
the sharing (`.to()`, `load_state_dict(assign=True)`, `param.data = …`, another Parameter object) moves a data
pointer; the caller of a compiled graph compares the pointers and packs again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakTensorKeyDictionary

from fxfuse.errors import UnsupportedModelError
from fxfuse.passes.program import FusedWeight

_lock = RLock()

# How often a graph may take weights away from another graph's packing before it runs as it was.
MOST_TAKEN = 3
TAKEN = "another graph packs {} in another group: memory is laid out one way only"
TWICE = "one parameter is now in two places of what was merged, and its memory can be in one only"


class Refused(UnsupportedModelError):
    """Weights that may not be packed, or not any more."""


class Packed:
    """Where the members of one fused weight lie; the memory is theirs and goes with the last of them."""

    def __init__(self, members: Sequence[Tensor], tensor: Tensor) -> None:
        self.tensor = weakref.ref(tensor)
        self._kind = _kind(members)
        self._rows = [m.shape[0] for m in members]
        self._pointers = tuple(part.data_ptr() for part in tensor.split(self._rows))
        self._aliases: list[StorageWeakRef | None] = [None] * len(members)

    @classmethod
    def empty(cls, members: Sequence[Tensor]) -> tuple[Packed, Tensor]:
        """Fresh memory for these members, and a strong reference to it until they have taken it."""
        first, rows = members[0], sum(m.shape[0] for m in members)
        tensor = torch.empty((rows, *first.shape[1:]), dtype=first.dtype, device=first.device)
        return cls(members, tensor), tensor

    def holds(self, members: Sequence[Tensor]) -> bool:
        """Whether exactly these members lie here, in this order."""
        return self.fits(members) and tuple(m.data_ptr() for m in members) == self._pointers

    def fits(self, members: Sequence[Tensor]) -> bool:
        return self.tensor() is not None and _kind(members) == self._kind

    def may_overwrite(self, members: Sequence[Tensor]) -> bool:
        """Whether nobody but these members sees the rows that would be written."""
        return all(
            member.data_ptr() == pointer or alias is None or alias.expired()
            for member, pointer, alias in zip(members, self._pointers, self._aliases, strict=True)
        )

    def take(self, members: Sequence[Tensor], tensor: Tensor) -> None:
        """Copy in the members that live elsewhere, one at a time, and make each a view of its rows."""
        for i, (member, part) in enumerate(zip(members, tensor.split(self._rows), strict=True)):
            if member.data_ptr() != part.data_ptr():
                part.copy_(member.detach())
                alias = torch.from_dlpack(part)
                self._own(i, alias, tensor)
                member.data = alias

    def adopt(self, members: Sequence[Tensor], tensor: Tensor) -> None:
        """Take for packed the members that were made over the rows of `tensor`."""
        for i, member in enumerate(members):
            self._own(i, member, tensor)

    def _own(self, i: int, alias: Tensor, tensor: Tensor) -> None:
        """The storage of a member keeps the fused memory alive, and knows where it belongs."""
        storage = alias.untyped_storage()
        storage.fused, storage.packed = tensor, self  # type: ignore[attr-defined]
        self._aliases[i] = StorageWeakRef(storage)

    def contains(self, parameter: Tensor) -> bool:
        return self.tensor() is not None and parameter.data_ptr() in self._pointers


def _kind(members: Sequence[Tensor]) -> tuple[object, ...]:
    return members[0].dtype, members[0].device, tuple(m.shape for m in members)


def _owner(parameter: Tensor) -> Packed | None:
    """The packing that a parameter lies in.

    Its memory knows: a parameter that is referred to weakly cannot be swapped (`torch.utils.swap_tensors`).
    """
    try:
        storage = parameter.untyped_storage()
    except NotImplementedError:  # a subclass around other tensors has none
        return None
    return getattr(storage, "packed", None)


def packed_parameters(
    members: Sequence[Tensor], device: torch.device | str | None = None
) -> list[nn.Parameter]:
    """Parameters like these, which may be on the meta device, over one fresh fused weight in this order.

    Nothing is written to them: what is loaded into them is packed from the start.
    """
    first, rows = members[0], [m.shape[0] for m in members]
    with _lock, torch.inference_mode(False), torch.no_grad():
        tensor = torch.empty((sum(rows), *first.shape[1:]), dtype=first.dtype, device=device)
        made = [
            nn.Parameter(torch.from_dlpack(part), requires_grad=member.requires_grad)
            for member, part in zip(members, tensor.split(rows), strict=True)
        ]
        packed = Packed(made, tensor)
        packed.adopt(made, tensor)
    return made


class SharedSlot:
    """One fused input of a compiled graph, filled with memory that its members share."""

    def __init__(self) -> None:
        self._packed: Packed | None = None
        self.taken = 0

    def fill(self, members: Sequence[Tensor]) -> Callable[[], Tensor | None]:
        """Gets the fused weight; packs the members, in this order, where they are not packed so already."""
        found = self.found(members)
        if found is None:
            self.taken += any(is_packed(m) and _owner(m) is not self._packed for m in members)
            found, tensor = self._packed, None
            if found is not None and found.fits(members) and found.may_overwrite(members):
                tensor = found.tensor()
            if found is None or tensor is None:
                found, tensor = Packed.empty(members)
            try:
                found.take(members, tensor)
            except Exception:
                with suppress(
                    Exception
                ):  # there may be no memory for that either, and what is packed is right
                    unpack(members)
                raise
        self._packed = found
        return found.tensor

    def found(self, members: Sequence[Tensor]) -> Packed | None:
        """Where these members lie packed in this order."""
        owners = map(_owner, members)
        return next((owner for owner in owners if owner is not None and owner.holds(members)), None)

    def refusal(self, members: Sequence[Tensor], reasons: Sequence[str | None]) -> str | None:
        """Why these members may not be packed now, though they could when the graph was compiled."""
        if self.found(members) is not None:
            return None
        if self.taken >= MOST_TAKEN:
            other = next((i for i, m in enumerate(members) if is_packed(m)), None)
            if other is not None and _owner(members[other]) is not self._packed:
                return TAKEN.format("some of its weights")
        return next(filter(None, reasons), None)


class Copy:
    """Rows of some parameters in another order; the first of them holds it, graphs only look at it."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.generation = 0
        self._state: list[int] = []
        self._storages: list[StorageWeakRef] = []

    @property
    def nbytes(self) -> int:
        return 0 if self.tensor is None else self.tensor.nbytes

    def renew(self, members: Sequence[Tensor], order: Sequence[tuple[int, int, int]]) -> Tensor:
        """The rows as they are now; the tensor keeps its address where its kind stays."""
        state = _state(members)
        if self.tensor is None or state != self._state:
            rows = torch.cat([members[i].detach()[start:stop] for i, start, stop in order])
            if self.tensor is None or _kind([self.tensor]) != _kind([rows]):
                self.tensor = rows
            else:
                self.tensor.copy_(rows)  # where a recorded device graph expects it
            # A storage that somebody refers to, weakly too, never gives its identity to another.
            self._storages = [StorageWeakRef(m.untyped_storage()) for m in members]
            self._state = state
            self.generation += 1
        return self.tensor


def _state(members: Iterable[Tensor]) -> list[int]:
    """A write that autograd sees moves the version; an exchange moves the storage, or the place in it."""
    return [mark for m in members for mark in (m.untyped_storage()._cdata, m.data_ptr(), m._version)]


_copies: Any = WeakTensorKeyDictionary()


class CopiedSlot:
    """One fused input with rows in another order than its members': a copy, renewed when a member changes."""

    def __init__(self, fused: FusedWeight, names: Sequence[str]) -> None:
        index = {name: i for i, name in enumerate(names)}
        self._order = tuple((index[s.source], s.start, s.stop) for s in fused.transform.rows.segments)
        self._copy: Callable[[], Copy | None] = lambda: None

    @property
    def copy(self) -> Copy | None:
        return self._copy()

    def marks(self, members: Iterable[Tensor]) -> list[int]:
        """What changes when a member does, or when another graph has renewed the copy."""
        copy = self._copy()
        return [*_state(members), -1 if copy is None else copy.generation]

    def fill(self, members: Sequence[Tensor]) -> Callable[[], Tensor | None]:
        held = _copies.setdefault(members[0], {})
        copy = held.setdefault((self._order, *map(id, members)), Copy())
        copy.renew(members, self._order)
        self._copy = found = weakref.ref(copy)
        return lambda: None if (copy := found()) is None else copy.tensor


class LiveWeights:
    """The fused inputs of one compiled graph: filled at the first call, compared at every call."""

    def __init__(
        self,
        slots: Sequence[SharedSlot | CopiedSlot],
        positions: Sequence[Sequence[int]],
        refused: Callable[[Sequence[Any]], Mapping[int, str]] = lambda args: {},
        watched: Sequence[int] = (),
    ) -> None:
        """`refused` says which arguments may not be moved; asked again when one of `watched` has moved."""
        self._slots = list(zip(slots, map(_getter, positions), strict=True))
        self._shared = _getter(
            [i for slot, at in zip(slots, positions, strict=True) if isinstance(slot, SharedSlot) for i in at]
        )
        self._copied = [(slot, members) for slot, members in self._slots if isinstance(slot, CopiedSlot)]
        self._refused, self._refusal = refused, ([0], "")
        self._watched = _getter(watched or [i for at in positions for i in at])
        self._positions = list(positions)
        self._filled: tuple[list[int], list[Callable[[], Tensor | None]]] | None = None
        self.packs = 0

    def fused(self, args: Sequence[Any]) -> list[Tensor | None]:
        """The fused inputs for a call with these arguments; packs first where a member has moved."""
        marks = self._marks(args)
        filled = self._filled
        if filled is not None and filled[0] == marks:
            tensors = [tensor() for tensor in filled[1]]
            # An allocator may give memory that was freed, addresses and all, to tensors that share nothing.
            if all(tensor is not None for tensor in tensors):
                return tensors
        return self._fill(args)

    def _marks(self, args: Sequence[Any]) -> list[int]:
        marks = [t.data_ptr() for t in self._shared(args)]
        for slot, members in self._copied:
            marks += slot.marks(members(args))
        return marks

    def _fill(self, args: Sequence[Any]) -> list[Tensor | None]:
        with _lock, torch.inference_mode(False), torch.no_grad():
            self._raise_on_refusal(args)
            getters = [slot.fill(members(args)) for slot, members in self._slots]
            self._filled = (self._marks(args), getters)
            self.packs += 1
            return [tensor() for tensor in getters]

    def _raise_on_refusal(self, args: Sequence[Any]) -> None:
        """Packing would cut a link that somebody has made since the graph was compiled."""
        if all(slot.found(at(args)) for slot, at in self._slots if isinstance(slot, SharedSlot)):
            return  # one graph may serve several modules, each packed long ago
        watched = [t.data_ptr() for t in self._watched(args)]
        if self._refusal[0] == watched:
            raise Refused(self._refusal[1])
        refused = self._refused(args)
        places: dict[int, object] = {}
        for (slot, members), at in zip(self._slots, self._positions, strict=True):
            if isinstance(slot, SharedSlot):
                group = tuple(map(id, members(args)))  # graphs may have one group twice, which has one place
                twice = any(places.setdefault(m, (group, i)) != (group, i) for i, m in enumerate(group))
                reason = TWICE if twice else slot.refusal(members(args), [refused.get(i) for i in at])
                slot.taken = 0 if reason is not None else slot.taken
                if reason is not None:
                    self._refusal = (watched, reason)
                    raise Refused(reason)
        self._refusal = ([0], "")

    @property
    def copies(self) -> list[Copy]:
        return [slot.copy for slot, _ in self._copied if slot.copy is not None]


def _getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """itemgetter that gives a tuple for one position and for none, too."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda args: tuple(args[i] for i in positions)


def is_packed(parameter: Tensor) -> bool:
    """Whether the parameter's memory is part of a fused weight."""
    packed = _owner(parameter)
    return packed is not None and packed.contains(parameter)


def packed_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of these parameters that are part of fused weights."""
    return sum(p.nbytes for p in parameters if is_packed(p))


def unpack(parameters: Iterable[Tensor]) -> int:
    """Give each packed parameter memory of its own again, same object, bits and strides; returns how many.

    Copies of their rows are dropped, too.
    """
    count = 0
    with _lock, torch.inference_mode(False), torch.no_grad():
        for parameter in parameters:
            if is_packed(parameter):
                parameter.data = parameter.detach().clone()
                count += 1
            _copies.pop(parameter, None)
    return count


def has_aliases(parameter: Tensor) -> bool:
    """Whether another tensor reads the parameter's memory; False where torch cannot say, and for numpy."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or parameter.is_meta:
        return False
    alone = torch.empty(1)
    return bool(count(parameter.untyped_storage()._cdata) > count(alone.untyped_storage()._cdata))
