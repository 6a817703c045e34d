"""Near misses: a graph with one change, after which a pattern may match something that only looks alike.

    mutant = near_miss(module, inputs, random.Random(0))
    print(mutant.change)            # "cat: parts 0 and 2 exchanged"

A mutant runs on the same inputs. What it computes does not matter: a rewrite of it has to
give what it gives.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.overrides import TorchFunctionMode

from fxfuse.runtime.capture import ObeyedAutocast
from fxfuse.testing.changes import CHANGES, ImpossibleError

__all__ = ["CHANGES", "Mutant", "near_miss", "values_of"]

# Of each kind, before another one is tried.
ATTEMPTS = 6


@dataclass(frozen=True)
class Mutant:
    """A changed graph, the kind of the change, and what it was in words."""

    module: GraphModule
    kind: str
    change: str


def near_miss(
    module: GraphModule,
    inputs: Sequence[Tensor],
    rng: random.Random,
    kinds: Sequence[str] = (),
    values: dict[str, Any] | None = None,
) -> Mutant:
    """One change of the graph that leaves it able to run; the module stays as it is.

    Args:
        module, inputs: a graph, and what it runs on; the inputs are not written to.
        rng: decides everything.
        kinds: names in `CHANGES`, in the order in which they are tried; in random order all of them.
        values: what `values_of` gives, where many mutants are drawn of one graph.

    Raises:
        ValueError: no change was found that the graph survives.
    """
    values = values_of(module, inputs) if values is None else values
    mutant = copy.deepcopy(module)
    for kind in kinds or rng.sample(list(CHANGES), len(CHANGES)):
        for _ in range(ATTEMPTS):
            try:
                change = CHANGES[kind](mutant, dict(values), rng)
                mutant.graph.lint()
                mutant.recompile()
                # a call of the module itself would print what fails
                with torch.no_grad(), ObeyedAutocast(), _AttentionOverItsKeys():
                    type(mutant).forward(mutant, *copy.deepcopy(list(inputs)))
            except ImpossibleError:
                break
            except Exception:  # the changed graph does not run: another one
                mutant = copy.deepcopy(module)
                continue
            return Mutant(mutant, kind, change)
    raise ValueError("no change was found that this graph survives")


class _AttentionOverItsKeys(TorchFunctionMode):
    """On a CPU attention with more or fewer values than keys raises nothing, and reads past the end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product_attention" in str(func):
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            if named["key"].shape[-2] != named["value"].shape[-2]:
                raise ValueError("attention needs as many keys as values")
        return func(*args, **(kwargs or {}))


class _Recorder(Interpreter):
    def run_node(self, n: Node) -> Any:
        self.found: dict[str, Any]
        value = super().run_node(n)
        self.found[n.name] = value
        return value


def values_of(module: GraphModule, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """What each node of the graph is on these inputs, by name."""
    recorder = _Recorder(copy.deepcopy(module))
    recorder.garbage_collect_values = False
    recorder.found = {}
    with torch.no_grad():
        recorder.run(*copy.deepcopy(list(inputs)))
    return recorder.found
