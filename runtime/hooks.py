"""Which hooks a model's modules have: asked at every call, looked for where one may have come or gone."""

from collections.abc import Iterator
from itertools import chain
from typing import Any
from weakref import ref

from torch import nn
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
Present = frozenset[tuple[int, int]]


class Hooks:
    """The hooks of a model, of all modules together.

    Dynamo puts no guards on hooks: a graph compiled before one was added would go on without it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._newest = -1
        self._parents: list[dict[str, nn.Module | None]] = []
        self._children: list[nn.Module | None] = []  # held, so that no other takes the address of one
        self._found: Present = frozenset()

    def present(self) -> Present:
        """Which module, by its place, has which hook; the same as long as none is added, moved or removed.

        Every hook takes its number from one counter of torch, so that a model without hooks is searched again
        only after some hook was added somewhere, or after a module, which may bring one, took another place.
        """
        newest = RemovableHandle.next_id
        if self._found or newest != self._newest or _inside(self._parents) != self._children:
            self._newest = newest
            model = self._model()
            own = [module.__dict__ for module in model.modules()] if model is not None else []
            self._parents = [given for each in own if isinstance(given := each.get("_modules"), dict)]
            self._children = _inside(self._parents)
            self._found = frozenset(_search(own))
        return self._found


def _inside(parents: list[dict[str, nn.Module | None]]) -> list[nn.Module | None]:
    return [*chain.from_iterable(map(dict.values, parents))]


def _search(own: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    for kind in _KINDS:
        yield from ((-1, hook) for hook in getattr(modules, f"_global{kind}"))
        for place, attributes in enumerate(own):
            yield from ((place, hook) for hook in attributes.get(kind) or ())
