"""Operators that act on some values only, and what stands in their place where they do nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

# Operators that leave most values as they are, or tell them apart, by their names in ATen. The graphs are
# those before dispatch, where an alias has a name of its own.
BOUNDS = frozenset(["clamp", "clip", "hardtanh"])  # two, of which either may act
PAIRS = frozenset(["minimum", "maximum", "fmin", "fmax"])
PAIR_OVERLOADS = frozenset(["aten.min.other", "aten.max.other"])
LIMITS = frozenset(
    {"clamp_min", "clamp_max", "relu", "threshold", "nan_to_num", "softshrink", "hardshrink"}
    | {"fmod", "remainder", "leaky_relu", "rrelu", "prelu", "elu", "celu", "selu"}
)
ROUNDINGS = frozenset(["trunc", "fix", "round", "floor", "ceil", "div", "divide", "floor_divide"])
EXTREMES = frozenset(["amin", "amax"])  # over a dimension
CHOICES = {"where": 0, "masked_fill": 1}  # by the argument of that number
COMPARISONS = frozenset(
    {"gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal"}
    | {"isnan", "isinf", "isfinite", "isposinf", "isneginf", "signbit", "isclose"}
)
SIGNS = {"sign": (-1.0, 1.0), "sgn": (-1.0, 1.0), "heaviside": (0.0, 1.0)}
# Operators that do the same to all values, or move them. What is on no list is tried at other magnitudes.
_STEADY = """
    add sub subtract rsub mul multiply div divide true_divide neg negative pow square sqrt rsqrt
    reciprocal exp exp2 expm1 log log1p log2 abs absolute sigmoid special_expit tanh silu gelu mish
    softplus log_sigmoid logaddexp sin cos erf lerp addcmul addcdiv float_power special_log1p sum mean
    cumsum matmul mm bmm mv dot vdot inner outer addmm addbmm baddbmm addmv linear einsum tensordot
    linalg_vecdot conv1d convolution softmax log_softmax logsumexp norm linalg_vector_norm var std
    var_mean rms_norm layer_norm scaled_dot_product_attention complex view_as_complex view_as_real view
    _unsafe_view reshape flatten unflatten view_as reshape_as ravel squeeze unsqueeze permute transpose
    t mT swapaxes swapdims movedim moveaxis adjoint numpy_T expand expand_as broadcast_to repeat tile
    repeat_interleave unfold slice select narrow split split_with_sizes tensor_split chunk unbind hsplit
    vsplit dsplit diagonal diag_embed as_strided cat concat concatenate stack hstack vstack dstack
    column_stack flip roll pad constant_pad_nd tril triu index index_select gather take_along_dim
    embedding one_hot index_copy index_put index_add slice_scatter select_scatter scatter copy fill zero
    clone contiguous to _to_copy type_as float double detach alias lift_fresh lift_fresh_copy dropout
    zeros ones full empty arange eye scalar_tensor zeros_like ones_like full_like empty_like new_zeros
    new_ones new_full new_empty sym_size sym_stride sym_numel logical_not logical_and logical_or
    bitwise_not bitwise_and bitwise_or
"""
STEADY = frozenset(_STEADY.split())
SOFTPLUS_THRESHOLD = 20  # beyond it nothing is left of what softplus adds


@dataclass(frozen=True)
class LeftOut:
    """An operator of a region without what it does to some values.

    Attributes:
        instead: from its arguments; None for a choice and a comparison that have one outcome throughout.
    """

    node: Node
    instead: Callable[..., Tensor] | None = None
    outcome: float = 0

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the operator would give; writes where it would write, and hands on no memory otherwise."""
        if self.instead is not None:
            found = self.instead(*args, **kwargs)
            return found if _writes(self.node) else found.clone()
        number = CHOICES.get(_operation(self.node))
        if number is None:
            return self.node.target(*args, **kwargs).fill_(self.outcome)  # type: ignore[operator]
        chosen = torch.full_like(args[number], self.outcome)
        return self.node.target(*args[:number], chosen, *args[number + 1 :], **kwargs)  # type: ignore[operator]

    def acts(self, values: Mapping[Node, Any], without: Mapping[Node, Any]) -> bool:
        """Whether the operator has done something to some value, of those with and without it."""
        if self.instead is not None:
            return bool((values[self.node] != without[self.node]).any())
        number = CHOICES.get(_operation(self.node))
        had = values[self.node if number is None else self.node.args[number]]  # type: ignore[index]
        return bool((had != self.outcome).any())


def left_out(node: Node) -> list[LeftOut]:
    """The ways in which an operator may do nothing: none for one that always does something."""
    name = _operation(node)
    if name in BOUNDS:
        bounds = [bound for bound in (*node.args[1:3], *node.kwargs.values()) if bound is not None]
        ways = [_as_it_is, _bound] if len(bounds) == 1 else [_without_least, _without_most, _least, _most]
        return [LeftOut(node, way) for way in ways]
    if name in PAIRS or str(node.target) in PAIR_OVERLOADS:
        return [LeftOut(node, _first), LeftOut(node, _second)]
    if name == "relu6":
        return [LeftOut(node, lambda x: x.clamp(max=6)), LeftOut(node, torch.relu)]
    if name == "softplus" and _threshold(node) != SOFTPLUS_THRESHOLD:
        return [LeftOut(node, _exact_softplus)]
    if name in EXTREMES:
        return [LeftOut(node, _some_of_it)]
    if name in ROUNDINGS and (not name.startswith("div") or node.kwargs.get("rounding_mode")):
        return [LeftOut(node, _nothing)]
    if name in LIMITS:
        return [LeftOut(node, way) for way in (_as_it_is, *_THROUGHOUT.get(name, ()))]
    if name in SIGNS:
        return [LeftOut(node, outcome=outcome) for outcome in SIGNS[name]]
    compares = name in COMPARISONS and node.args[0].meta["val"].is_floating_point()  # type: ignore[union-attr]
    if name in CHOICES or (compares and not all(_is_choice(user, node) for user in node.users)):
        return [LeftOut(node, outcome=outcome) for outcome in (False, True)]
    return []


def is_unknown(node: Node) -> bool:
    """Whether an ATen operator is on no list: it may act on some values only."""
    name = _operation(node)
    listed = name in STEADY or name in COMPARISONS or name in CHOICES or not name
    return not listed and not left_out(node)


def _is_choice(user: Node, condition: Node) -> bool:
    """Whether all that a call does with a comparison is to choose by it: the choice then shows it."""
    number = CHOICES.get(_operation(user))
    return number is not None and [i for i, x in enumerate(user.args) if x is condition] == [number]


def _as_it_is(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _without_least(x: Tensor, min: Any = None, max: Any = None, **_: Any) -> Tensor:
    return x if max is None else x.clamp(max=max)


def _without_most(x: Tensor, min: Any = None, max: Any = None, **_: Any) -> Tensor:
    return x if min is None else x.clamp(min=min)


def _nothing(x: Any, *others: Any, **_: Any) -> Tensor:
    """What is left of small numbers that are rounded."""
    return sum((other * 0 for other in others), x * 0)  # type: ignore[no-any-return]


def _least(x: Tensor, min: Any = -1, max: Any = 1, **_: Any) -> Tensor:
    return torch.zeros_like(x) + min


def _most(x: Tensor, min: Any = -1, max: Any = 1, **_: Any) -> Tensor:
    return torch.zeros_like(x) + max


def _bound(x: Tensor, min: Any = None, max: Any = None, **_: Any) -> Tensor:
    """The one that is given."""
    return _most(x, max=max) if min is None else _least(x, min=min)


# Of those with one limit, what they do where they act, which may be throughout.
_THROUGHOUT: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "relu": (torch.zeros_like,),
    "clamp_min": (_bound,),
    "clamp_max": (_bound,),
    "threshold": (lambda x, threshold, value: torch.full_like(x, value),),
    "leaky_relu": (lambda x, negative_slope=0.01: x * negative_slope,),
}


def _first(x: Tensor, other: Tensor) -> Tensor:
    return torch.broadcast_tensors(x, other)[0]


def _second(x: Tensor, other: Tensor) -> Tensor:
    return torch.broadcast_tensors(x, other)[1]


def _some_of_it(x: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The first along each dimension."""
    dims = [dim] if isinstance(dim, int) else list(dim) or list(range(x.dim()))
    for each in sorted((d % max(x.dim(), 1) for d in dims), reverse=True):
        x = x.narrow(each, 0, 1) if keepdim else x.select(each, 0)
    return x


def _exact_softplus(x: Tensor, beta: float = 1, threshold: float = SOFTPLUS_THRESHOLD) -> Tensor:
    return torch.logaddexp(x * beta, torch.zeros((), dtype=x.dtype)) / beta


def _threshold(node: Node) -> Any:
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("threshold")
    return SOFTPLUS_THRESHOLD if given is None else given


def _operation(node: Node) -> str:
    """The name of an ATen operator without overload and the mark of writing in place."""
    namespace, _, name = str(node.target).partition(".")
    return name.partition(".")[0].removesuffix("_") if namespace == "aten" else ""


def _writes(node: Node) -> bool:
    return str(node.target).partition(".")[2].partition(".")[0].endswith("_")
