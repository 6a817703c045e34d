"""Writes an fx graph call by call, each operation in one of the ways in which people write it.

    speller = Speller(random.Random(0))
    x = speller.input(torch.ones(2, 3, 8))
    y = speller.silu(speller.linear(x, 16))
    module = speller.module(y)      # a torch.fx.GraphModule; print(module.code) to read it

The graph is one that torch.fx.symbolic_trace would give: functions, methods, operators, keywords and modules
as somebody wrote them, before any tracer has made them one. Every value is computed while it is written, so
that shapes are known and what cannot run is never written.
"""

import operator
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxfuse.testing import spellings
from fxfuse.testing.tensors import integer_tensor

__all__ = ["Speller"]


class Speller:
    """Builds one graph; every operation is spelled anew at each use.

    Args:
        rng: decides everything; Hypothesis' `st.randoms(use_true_random=False)` makes examples shrink.
        extra: how likely a value is wrapped in an operation that changes nothing, such as `+ 0`.
        only: names of spellings by operation, which then are always used: {"silu": "x * sigmoid(x)"}.
        plain: use the first spelling of each operation, and wrap nothing.
        dynamic: write leading sizes as `x.size(0)`, never as numbers.
        seed: decides the values of parameters, together with their names.
        dtype: of floating inputs and parameters.

    Attributes:
        prefix: of the names of parameters; under the same prefix blocks share their weights.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        extra: float = 0.1,
        only: Mapping[str, str] | None = None,
        plain: bool = False,
        dynamic: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rng = rng
        self.root = nn.Module()
        self.graph = Graph()
        self.inputs: list[Tensor] = []
        self.used: list[tuple[str, str]] = []
        self.dynamic = dynamic
        self.plain = plain
        self.seed = seed
        self.dtype = dtype
        self.prefix = ""
        self._only = dict(only or {})
        self._extra = 0.0 if plain else extra
        self._values: dict[Node, Any] = {}

    # Building

    def input(self, value: Tensor, dtype: torch.dtype | None = None) -> Node:
        """A new input of the graph, with the value that it is built on; floating ones in the own dtype."""
        value = value.to(dtype or self.dtype) if value.is_floating_point() else value
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(first) if first is not None else nullcontext():
            node = self.graph.placeholder(f"x{len(self.inputs)}")
        self.inputs.append(value.clone())
        self._values[node] = value.clone()
        return node

    def parameter(self, name: str, value: Tensor) -> Node:
        """A parameter of the module; the same name gives the same parameter, in the own dtype."""
        name = self.prefix + name
        path, _, leaf = name.rpartition(".")
        if path and not hasattr(self.root, path):
            self.root.add_module(path, nn.Module())
        owner = getattr(self.root, path) if path else self.root
        if not hasattr(owner, leaf):
            owner.register_parameter(leaf, nn.Parameter(value.to(self.dtype), requires_grad=False))
        return self._noted(self.graph.get_attr(name), getattr(owner, leaf).detach())

    def owned(self, name: str) -> Any:
        """The submodule of that name, under the prefix of the block at hand."""
        return getattr(self.root, self.prefix + name)

    def own(self, name: str, make: Callable[[], nn.Module]) -> None:
        """A submodule with small integers as weights; the same name gives the same one."""
        name = self.prefix + name
        if not hasattr(self.root, name):
            made = make().requires_grad_(False).to(self.dtype)
            for leaf, tensor in made.named_parameters():
                tensor.copy_(integer_tensor(tensor.shape, self.seed_of(f"{name}.{leaf}"), dtype=self.dtype))
            self.root.add_module(name, made)

    def seed_of(self, name: str) -> int:
        """A seed for the values of the parameter of that name."""
        return zlib.crc32(f"{self.seed} {name}".encode())

    def call(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of a function, or of the method of that name."""
        value = self._run(target, args, kwargs)
        if isinstance(target, str):
            return self._noted(self.graph.call_method(target, args, kwargs), value)
        return self._noted(self.graph.call_function(target, args, kwargs), value)

    def call_module(self, name: str, module: nn.Module | None, *args: Any) -> Node:
        """A call of a submodule, which is added where it is not there yet."""
        if module is not None and not hasattr(self.root, name):
            self.root.add_module(name, module)
        value = self._run(getattr(self.root, name), args, {})
        return self._noted(self.graph.call_module(name, args), value)

    def parts(self, made: Node, count: int) -> list[Node]:
        """The results of a call that has several."""
        return [self.call(operator.getitem, made, i) for i in range(count)]

    def value(self, node: Any) -> Any:
        """The value of a node; anything else is its own value."""
        return self._values[node] if isinstance(node, Node) else node

    def shape(self, node: Node) -> tuple[int, ...]:
        return tuple(self.value(node).shape)

    def module(self, *outputs: Node) -> GraphModule:
        """The graph so far with these outputs."""
        self.graph.output(tuple(outputs))
        made = GraphModule(self.root, self.graph).eval()
        made.graph.lint()
        return made

    def _run(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = map_arg((args, kwargs), self.value)
        with torch.no_grad():
            if isinstance(target, str):
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)

    def _noted(self, node: Node, value: Any) -> Node:
        self._values[node] = value
        return node

    # Choosing

    def maybe(self, probability: float) -> bool:
        return not self.plain and self.rng.random() < probability

    def spell(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """The operation in one of its spellings, of which those that do not apply are passed over."""
        variants = spellings.TABLE[operation]
        names = list(variants)
        if operation in self._only:
            names = [self._only[operation], *names]
        elif not self.plain:
            self.rng.shuffle(names)
        for name in names:
            try:
                made = variants[name](self, *args, **kwargs)
            except spellings.DoesNotApply:
                continue
            self.used.append((operation, name))
            return made
        raise ValueError(f"no spelling of {operation} applies to {args}")

    def size(self, x: Node, dim: int) -> Any:
        """One size: as a number, or asked of the tensor."""
        return self.spell("size", x, dim)

    def sizes(self, x: Node, count: int) -> list[Any]:
        """The first sizes."""
        return [self.size(x, dim) for dim in range(count)]

    # Operations

    def same(self, x: Node) -> Node:
        """The value itself, now and then through an operation that changes nothing."""
        if "identity" in self._only or self.maybe(self._extra):
            return self.spell("identity", x)
        return x

    def linear(self, x: Node, outputs: int, *, bias: bool = False, name: str | None = None) -> Node:
        """x·Wᵀ + b over the last dimension, with parameters `name.weight` and `name.bias`."""
        x = self.same(x)
        name = name or f"linear{sum(1 for n, _ in self.root.named_children() if 'linear' in n)}"
        features = self.shape(x)[-1]
        self.own(name, lambda: nn.Linear(features, outputs, bias))
        return self.same(self.spell("linear", x, name))

    def reshape(self, x: Node, *shape: Any) -> Node:
        """The elements in another shape; entries are numbers or nodes that `size` gave."""
        return self.same(self.spell("reshape", x, list(shape)))

    def split(self, x: Node, sizes: Sequence[int], dim: int = -1) -> list[Node]:
        """Consecutive parts of the given sizes along a dimension counted from the end."""
        return [self.same(part) for part in self.spell("split", x, list(sizes), dim)]

    def cat(self, parts: Sequence[Node], dim: int = -1) -> Node:
        return self.same(self.spell("cat", list(parts), dim))

    def unsqueeze(self, x: Node, dim: int) -> Node:
        """A new dimension of size 1, counted from the front."""
        return self.same(self.spell("unsqueeze", x, dim))

    def transpose(self, x: Node, a: int, b: int) -> Node:
        """Two dimensions, counted from the front, exchanged."""
        return self.same(self.spell("transpose", x, a, b))

    def cast(self, x: Node, dtype: torch.dtype, like: Node | None = None) -> Node:
        """x in another dtype, which `like` has where it is given."""
        return self.spell("cast", x, dtype, like)

    def add(self, a: Any, b: Any) -> Node:
        return self.same(self.spell("add", a, b))

    def sub(self, a: Any, b: Any) -> Node:
        return self.same(self.spell("sub", a, b))

    def mul(self, a: Any, b: Any) -> Node:
        return self.same(self.spell("mul", a, b))

    def neg(self, x: Node) -> Node:
        return self.same(self.spell("neg", x))

    def square(self, x: Node) -> Node:
        return self.same(self.spell("square", x))

    def rsqrt(self, x: Node) -> Node:
        return self.same(self.spell("rsqrt", x))

    def exp(self, x: Node) -> Node:
        return self.same(self.spell("exp", x))

    def mean(self, x: Node) -> Node:
        """The mean over the last dimension, which stays with size 1."""
        return self.same(self.spell("mean", x))

    def sum(self, x: Node) -> Node:
        """The sum over the last dimension, which stays with size 1."""
        return self.same(self.spell("sum", x))

    def sigmoid(self, x: Node) -> Node:
        return self.same(self.spell("sigmoid", x))

    def silu(self, x: Node) -> Node:
        return self.same(self.spell("silu", x))

    def softplus(self, x: Node) -> Node:
        return self.same(self.spell("softplus", x))

    def convolution(
        self, x: Node, name: str, taps: int, *, causal: bool, bias: bool = False, by_hand: bool = False
    ) -> Node:
        """Each channel of [B, C, T] with `taps` weights of its own; as long as x where it is causal.

        With `by_hand` it may be a sum of products; one that is not causal is then of `taps` columns.
        """
        channels, padding = self.shape(x)[1], taps - 1 if causal else 0
        self.own(name, lambda: nn.Conv1d(channels, channels, taps, 1, padding, groups=channels, bias=bias))
        operation = ("depthwise", "window", "causal", "causal_or_by_hand")[2 * causal + by_hand]
        return self.same(self.spell(operation, self.same(x), name))

    def attend(
        self,
        q: Node,
        k: Node,
        v: Node,
        mask: Node | None = None,
        causal: bool = False,
        by_hand: bool = False,
    ) -> Node:
        """Scaled dot product attention over [B, H, T, D]; with `by_hand` it may be products and a softmax."""
        return self.same(self.spell("attend_or_by_hand" if by_hand else "attend", q, k, v, mask, causal))

    def rotate(self, x: Node, cos: Node, sin: Node) -> Node:
        """x · cos + (−b, a) · sin for x = (a, b)."""
        return self.same(self.spell("rotate", x, cos, sin))

    def repeat_heads(self, x: Node, times: int) -> Node:
        """[B, H, T, D] with each head `times` times in a row: [B, H·times, T, D]."""
        return self.same(self.spell("repeat_heads", x, times))
