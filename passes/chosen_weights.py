"""Products of weights chosen by number with a row for each of them, whatever their spelling.

    y = bmm(W[ids], unsqueeze(x, -1)), einsum("soi,si->so", W[ids], x), sum(W[ids] * unsqueeze(x, -2), -1)

A table of operators says where to look; run on random values, `Judge` says whether it is such a product.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxfuse.passes.judge import Judge
from fxfuse.passes.program import Program
from fxfuse.passes.regions import Guards, Refused, behind, written_out
from fxfuse.patterns import ops, readings

GATHERS = frozenset({ops.INDEX, ops.INDEX_SELECT, "aten.embedding.default", "aten.gather.default"})
_KEEP_ELEMENTS = ops.VIEWS | readings.CASTS | readings.CUTS
_SUM = "aten.sum.dim_IntList"
_PRODUCTS = (ops.MATMUL, ops.BMM, ops.EINSUM, "aten.linalg_vecdot.default", _SUM)
_AS_STRIDED = "aten.as_strided.default"

Call = Callable[..., Any]


@dataclass(frozen=True)
class ChosenProduct:
    """`node` is, in its own shape, the sum over the last dimension of chosen weights times their rows.

    Attributes:
        stored: the weights that `chosen` takes some of.
        turned: whether `chosen` [*lead, K, N] has to be transposed.
        lead: sizes of the chosen ones, all but those of a single matrix.
        rows: how many rows the vector is; each belongs to so many neighbours of the chosen ones.
    """

    node: Node
    stored: Node
    chosen: Node
    vector: Node
    turned: bool
    lead: tuple[int, ...]
    rows: int

    def region(self) -> list[Node]:
        return behind([self.node], {self.chosen, self.vector})

    def compute(self, call: Call, chosen: Any, vector: Any, own: torch.dtype, wide: torch.dtype) -> Any:
        """The product as a reduction in the wider of two dtypes, by way of `call`: of nodes, or of values."""
        aten, value = torch.ops.aten, self.node.meta["val"]
        first = next(i for i in range(len(self.lead) + 1) if prod(self.lead[:i]) == self.rows)
        width = self.chosen.meta["val"].shape[-2 if self.turned else -1]
        sizes = [*self.lead[:first], *[1] * (len(self.lead) - first + 1), width]

        def cast(x: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
            return x if given == wanted else call(aten.to.dtype, x, wanted)

        row = call(aten.to.dtype, call(aten.reshape.default, vector, sizes), wide, False, True)
        row = written_out(call, call(aten.contiguous.default, row), *sizes)  # once, as in `one_row_linears`
        weights = call(aten.transpose.int, chosen, -2, -1) if self.turned else chosen
        products = call(aten.mul.Tensor, cast(weights, own, wide), row)
        y = cast(call(aten.sum.dim_IntList, products, [-1]), wide, own)
        return call(aten.reshape.default, y, list(value.shape))


def chosen_products(program: Program, most_rows: int) -> list[ChosenProduct]:
    """What may be a product of at most so many chosen matrices, each with one row."""
    found = []
    for node in program.calls(*_PRODUCTS):
        a, b = _operands(node)
        product = _reading(program, node, a, b, most_rows) or _reading(program, node, b, a, most_rows)
        found += [product] if product is not None else []
    return found


def check(guards: Guards, judge: Judge, product: ChosenProduct) -> None:
    """Raises Refused where it is no such product, or may not be replaced."""
    region, node = product.region(), product.node
    reason = guards.reason(region, [node], {node.meta["val"].dtype})
    if reason is not None:
        raise Refused(*reason)

    def reduction(values: Mapping[Node, Any]) -> Sequence[Tensor]:
        given = (values[product.chosen], values[product.vector])
        return [product.compute(lambda f, *args: f(*args), *given, torch.float64, torch.float64)]

    if not judge.equal(region, [node], reduction, f"{product.turned} {product.rows}"):
        raise Refused(node, "run on random values it is no product of chosen weights with a row for each")


def _operands(node: Node) -> tuple[Any, Any]:
    """The factors of a product, or of one that is summed."""
    given: Any = node.args
    if str(node.target) == ops.EINSUM:
        given = given[1]
    elif str(node.target) == _SUM:
        given = given[0].args if str(given[0].target) == ops.MUL else ()
    return tuple(given) if len(given) == 2 else (None, None)  # type: ignore[return-value]


def _weights(program: Program, chosen: Any) -> Node | None:
    """The parameter that a value takes some matrices of, through views and casts."""
    node, gathers = chosen, 0
    while isinstance(node, Node) and node.op == "call_function" and node.args:
        gathers += str(node.target) in GATHERS
        if not (str(node.target) in GATHERS | _KEEP_ELEMENTS or node.target is operator.getitem):
            return None
        node = node.args[0]
    if gathers != 1 or not isinstance(node, Node):
        return None
    return node if node.name in program.weights or program.fused_as(node) is not None else None


def _reading(program: Program, node: Node, chosen: Any, vector: Any, most: int) -> ChosenProduct | None:
    stored = _weights(program, chosen)
    if stored is None or not isinstance(vector, Node) or str(vector.target) == _AS_STRIDED:
        return None  # the latter is what this makes of it
    y, matrices = node.meta["val"], chosen.meta["val"]
    dtypes = {n.meta["val"].dtype for n in (node, chosen, vector)}
    lead = tuple(matrices.shape[:-2])
    sizes = (*matrices.shape, *y.shape)
    if len(dtypes) > 1 or not lead or not all(type(n) is int and n > 0 for n in sizes):
        return None
    if y.device.type != "cpu" or prod(lead) > most:
        return None
    while str(vector.target) == ops.EXPAND:
        vector = vector.args[0]  # type: ignore[assignment]
    given = [n for n in vector.meta["val"].shape if type(n) is not int or n != 1]
    for turned in (False, True):
        height, width = matrices.shape[:-3:-1] if turned else matrices.shape[-2:]
        if not given or given[-1] != width or matrices.stride(-2 if turned else -1) != 1:
            continue
        rows = vector.meta["val"].numel() // width
        divides = any(prod(lead[:i]) == rows for i in range(len(lead) + 1))
        if divides and y.numel() == prod(lead) * height:
            return ChosenProduct(node, stored, chosen, vector, turned, lead, rows)
    return None
