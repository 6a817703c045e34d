"""Which hooks a model's modules have: asked at every call, looked for where one may have come or gone."""

from weakref import ref

from torch import nn
from torch.nn.modules import module as modules
from torch.utils.hooks import RemovableHandle

_KINDS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Hooks:
    """The hooks of a model, of all modules together.

    Dynamo puts no guards on hooks: a graph compiled before one was added would go on without it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._newest = -1
        self._found: frozenset[int] = frozenset()

    def present(self) -> frozenset[int]:
        """A number for each hook, the same ones as long as none is added or removed.

        Every hook takes its number from one counter of torch, so that a model without hooks is searched again
        only after some hook was added somewhere.
        """
        newest = RemovableHandle.next_id
        if self._found or newest != self._newest:
            self._newest = newest
            self._found = frozenset(self._search())
        return self._found

    def _search(self) -> list[int]:
        found = [*modules._global_forward_pre_hooks, *modules._global_forward_hooks]
        model = self._model()
        for module in () if model is None else model.modules():
            for kind in _KINDS:
                if hooks := module.__dict__.get(kind):
                    found += hooks
        return found
