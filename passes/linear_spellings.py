"""Products with the transpose of a parameter are spelled as linears.

Before: y = x @ w.t(); z = addmm(b, x, w.T); u = einsum("bti,oi->bto", x, w) + b; p = einsum("ab->ba", x)
After:  y = linear(x, w); z = linear(x, w, b);   u = linear(x, w, b);                p = permute(x, [1, 0])
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.modes import modes
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites, storage_of
from fxfuse.patterns import ops


def spell_linears(program: Program) -> None:
    """Rewrite in place; shapes and dtypes stay, strides may change where nobody reads them."""
    writes = StorageWrites(program.graph)
    for node in program.calls(ops.EINSUM):
        _permute_of_einsum(program, node)
    changed = False
    for node in program.calls(*ops.PRODUCTS):
        found = _operands(node)
        if found is not None and not any(writes.is_written(n) for n in found if n is not None):
            _become_linear(node, *found)
            changed = True
    mode = modes(program.graph, program.grad_enabled)
    sums = {found[0]: found for n in program.calls(*ops.ADDS) if (found := _biased(writes, mode, n))}
    for linear, node, bias in sums.values():
        if all(len(n.args) > 2 or n in sums for n in _readers(linear.args[0])):
            _become_linear(node, linear.args[0], linear.args[1], bias)  # type: ignore[arg-type]
            changed = True
    for linear in sums:
        if not linear.users:
            program.graph.erase_node(linear)
    if changed:
        program.refresh()
    if _rows_meet(program):
        program.refresh()


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _is_input(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _untransposed(node: Any) -> Node | None:
    """The two-dimensional input whose transpose a node is, by the memory that it shows."""
    source, value = node, _value(node)
    if value is None or value.dim() != 2:
        return None
    while isinstance(source, Node) and not _is_input(source) and source.args:
        source = source.args[0]
    own = _value(source)
    if own is None or own.dim() != 2 or storage_of(source) != storage_of(node) or own.dtype != value.dtype:
        return None
    turned = zip((*value.shape, *value.stride()), (*own.shape[::-1], *own.stride()[::-1]), strict=True)
    same = all(statically_known_true(a == b) for a, b in turned)
    return source if same and statically_known_true(own.storage_offset() == value.storage_offset()) else None


def _operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """x, W and b of a product that is x·Wᵀ + b with an input as W."""
    name = str(node.target)
    if name == ops.EINSUM:
        return _einsum_operands(node)
    if name == ops.ADDMM:
        bias, x, turned = node.args[:3]
        scaled = any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta"))
        weight = _untransposed(turned)
        if scaled or weight is None or not _is_bias(bias, weight):
            return None
        return x, weight, bias  # type: ignore[return-value]
    x, turned = node.args[:2]
    weight, value = _untransposed(turned), _value(x)
    if weight is None or value is None or value.dim() == 0:
        return None
    return x, weight, None  # type: ignore[return-value]


def _is_bias(bias: Any, weight: Node) -> bool:
    value, rows = _value(bias), weight.meta["val"]
    if value is None or value.dim() != 1 or value.dtype != rows.dtype or not _is_input(bias):
        return False
    return statically_known_true(value.shape[0] == rows.shape[0])


def _equation(node: Node) -> tuple[list[str], str] | None:
    equation, operands = node.args[:2]
    text = str(equation).replace(" ", "")
    if "->" not in text or len(node.args) > 2 or node.kwargs.get("path") is not None:
        return None
    given, result = text.split("->")
    names = given.split(",")
    for operand in operands:  # type: ignore[union-attr]
        if _value(operand) is None:
            return None
    return names, result


def _einsum_operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """einsum("…i,oi->…o", x, w), whichever comes first and whatever the letters."""
    parsed = _equation(node)
    if parsed is None or len(parsed[0]) != 2:
        return None
    operands: Any = node.args[1]
    for x, weight, rows, columns in (
        (operands[0], operands[1], parsed[0][0], parsed[0][1]),
        (operands[1], operands[0], parsed[0][1], parsed[0][0]),
    ):
        if len(columns) != 2 or "." in columns or columns[0] == columns[1] or not rows:
            continue
        outer, inner = columns[0], columns[1]
        source: Node | None = weight if _is_input(weight) else None
        if rows[-1] != inner:
            outer, inner, source = inner, outer, _untransposed(weight)
        lead = rows[:-1]
        distinct = len(set(lead.replace(".", ""))) == len(lead.replace(".", ""))
        if source is None or rows[-1] != inner or outer in lead or inner in lead or not distinct:
            continue
        if parsed[1] == lead + outer and x.meta["val"].dtype == source.meta["val"].dtype:
            return x, source, None
    return None


def _permute_of_einsum(program: Program, node: Node) -> None:
    """einsum("ab->ba", x) -> permute(x, [1, 0]): einsum of one operand shows the same memory."""
    parsed = _equation(node)
    if parsed is None or len(parsed[0]) != 1 or "." in parsed[0][0]:
        return
    given, result = parsed[0][0], parsed[1]
    if len(set(given)) == len(given) and sorted(given) == sorted(result):
        operands: Any = node.args[1]
        node.target = torch.ops.aten.permute.default
        node.args = (operands[0], [given.index(letter) for letter in result])
        node.kwargs = {}


def _become_linear(node: Node, x: Node, weight: Node, bias: Node | None) -> None:
    node.target = torch.ops.aten.linear.default
    node.args = (x, weight) if bias is None else (x, weight, bias)
    node.kwargs = {}
    node.meta.pop("val", None)


def _biased(writes: StorageWrites, mode: dict[Node, Hashable], node: Node) -> tuple[Node, Node, Node] | None:
    """The linear, the sum and the bias of linear(x, w) + b, where nobody else reads the sum without b."""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    for linear, bias in (node.args, node.args[::-1]):
        if not isinstance(linear, Node) or str(linear.target) != ops.LINEAR or len(linear.users) != 1:
            continue
        if len(linear.args) > 2 or linear.kwargs or not isinstance(bias, Node):
            continue
        weight = linear.args[1]
        if not _is_input(weight) or _value(weight).dim() != 2 or not _is_bias(bias, weight):  # type: ignore[arg-type, union-attr]
            continue
        if any(writes.is_written(n) for n in (node, linear, bias, weight, linear.args[0])):  # type: ignore[arg-type]
            continue
        if mode[node] == mode[linear] and node.meta["val"].dtype == bias.meta["val"].dtype:
            return linear, node, bias
    return None


def _readers(x: Any) -> list[Node]:
    """The linears over a value: with a bias on some of them alone they would not merge."""
    return [user for user in x.users if str(user.target) == ops.LINEAR] if isinstance(x, Node) else []


def _rows_meet(program: Program) -> bool:
    """linear(reshape(x, [rows, n]), w) -> reshape(linear(x, w), …), where another linear reads x itself."""
    readers: dict[Any, list[Node]] = {}
    linears = [node for node in program.calls(ops.LINEAR) if not node.kwargs]
    for linear in linears:
        readers.setdefault(linear.args[0], []).append(linear)
    moved = False
    writes = StorageWrites(program.graph)
    for linear in linears:
        rows = linear.args[0]
        if not isinstance(rows, Node) or str(rows.target) not in ops.RESHAPES:
            continue
        x = rows.args[0]
        while isinstance(x, Node) and x not in readers and str(x.target) in ops.RESHAPES:
            x = x.args[0]
        flat, whole = _value(rows), _value(x)
        if not isinstance(x, Node) or x not in readers or flat is None or whole is None:
            continue
        if not statically_known_true(flat.shape[-1] == whole.shape[-1]) or linear.meta["val"].dim() == 1:
            continue
        if any(writes.is_written(n) for n in (x, rows, linear)) or flat.dim() == whole.dim():
            continue
        shape = list(rows.args[1])  # type: ignore[arg-type]
        with program.graph.inserting_before(linear):
            y = program.graph.call_function(linear.target, (x, *linear.args[1:]))  # type: ignore[arg-type]
            outputs = linear.args[1].meta["val"].shape[0]  # type: ignore[union-attr]
            back = program.graph.call_function(torch.ops.aten.reshape.default, (y, [*shape[:-1], outputs]))
        for new in (y, back):
            new.meta["nn_module_stack"] = linear.meta.get("nn_module_stack", {})
        for user in linear.users:
            user.meta.pop("val", None)
        linear.replace_all_uses_with(back)
        program.graph.erase_node(linear)
        moved = True
    return moved
