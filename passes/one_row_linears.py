"""A linear over one row is a reduction, which Inductor vectorises and runs at the speed of memory.

Before: y = linear(x, W)                        x: one row
After:  y = (W.float() * x.float()).sum(-1)     in W's dtype again

The row is written out once: Inductor would compute it anew for every row of W, norm and all, which takes
twice as long.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes import regions
from fxfuse.passes.modes import PLAIN, Mode, modes
from fxfuse.passes.outcome import Match, Miss, Outcome
from fxfuse.passes.program import Program, module_path
from fxfuse.passes.same_input_linears import bias_of, weight_of
from fxfuse.patterns import ops

RULE = "one_row_linears"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Why a row times this weight stays a product, None where it need not.
Stays = Callable[[torch.Tensor], str | None]


def none_stays(weight: torch.Tensor) -> str | None:
    return None


def has_one_row(linear: Node) -> bool:
    if weight_of(linear).meta["val"].dim() != 2:
        return False
    rows = linear.args[0].meta["val"].shape[:-1]  # type: ignore[union-attr]
    return all(statically_known_true(size == 1) for size in rows)


def runs_on_cpu(linear: Node) -> bool:
    value = weight_of(linear).meta["val"]
    return value.device.type == "cpu" and value.dtype in DTYPES


def runs_plainly(mode: Mode) -> bool:
    """Without grad mode, which would keep products as large as the weight, and without autocast."""
    return mode == PLAIN


def _replace(program: Program, linear: Node) -> None:
    aten, graph = torch.ops.aten, program.graph
    x, weight, bias = linear.args[0], weight_of(linear), bias_of(linear)
    dtype, dims = linear.meta["val"].dtype, linear.meta["val"].dim()
    height, width = weight.meta["val"].shape

    call = partial(regions.call, program, linear)

    def cast(node: Node, given: torch.dtype, wanted: torch.dtype) -> Node:
        return node if given == wanted else call(aten.to.dtype, node, wanted)

    with graph.inserting_before(linear):
        row = call(aten.to.dtype, call(aten.reshape.default, x, [-1]), torch.float32, False, True)
        row = regions.written_out(call, row, width)
        wide = cast(weight, weight.meta["val"].dtype, torch.float32)
        y = call(aten.sum.dim_IntList, call(aten.mul.Tensor, wide, row), [-1])
        if bias is not None:
            y = call(aten.add.Tensor, y, bias)
        y = cast(y, torch.float32, dtype)
        y = call(aten.reshape.default, y, [*[1] * (dims - 1), height])
    linear.replace_all_uses_with(y)
    graph.erase_node(linear)


def run(program: Program, stays: Stays = none_stays) -> Outcome:
    """Rewrite every linear over one row on a CPU; linears over more rows are no candidates.

    `stays` says of a weight why its linear stays the product that it is; by default none does.
    """
    outcome = Outcome()
    mode = modes(program.graph, program.grad_enabled)
    # All of them before the first is replaced: one that feeds another leaves no value behind to ask for.
    found = [
        linear
        for linear in program.calls(ops.LINEAR)
        if has_one_row(linear) and runs_on_cpu(linear) and runs_plainly(mode[linear])
    ]
    for linear in found:
        weight = weight_of(linear)
        name = program.name_of(weight)
        members = program.members_of(weight) if name else ()
        where = name or module_path(linear) or linear.name
        why = stays(weight.meta["val"])
        if why is not None:
            outcome.misses.append(Miss(RULE, where, linear.name, why, chosen=True))
            continue
        _replace(program, linear)
        outcome.matches.append(Match(RULE, where, members, "1 linear → 1 reduction"))
    return outcome
