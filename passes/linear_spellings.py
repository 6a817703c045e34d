"""Products with the transpose of a parameter are spelled as linears.

Before: y = x @ w.t(); z = addmm(b, x, w.T); u = einsum("bti,oi->bto", x, w) + b; p = einsum("ab->ba", x)
After:  y = linear(x, w); z = linear(x, w, b);   u = linear(x, w, b);                p = permute(x, [1, 0])
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxfuse.passes.backward import Backward
from fxfuse.passes.modes import Mode, modes, switches_autocast
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes, layout_shows, storage_of
from fxfuse.patterns import ops
from fxfuse.patterns.readings import ZEROS


def spell_linears(program: Program) -> None:
    """Rewrite in place; shapes and dtypes stay, strides may change where nobody reads them."""
    writes, backward = StorageWrites(program.graph), Backward(program)
    for node in program.calls(ops.EINSUM):
        _permute_of_einsum(program, node)
    _read_transposes_uncopied(program, writes, backward)
    changed = False
    mode = modes(program.graph, program.grad_enabled)
    values = {node: value_of(node) for node in program.graph.nodes}
    for node in program.calls(*ops.PRODUCTS):
        found = _operands(node)
        if found is None or not _has_rows_of(values, node, *found[:2]):
            continue
        if backward.parts(node, *_views_of(found[1], node)):
            continue
        if str(node.target) == ops.MV and switches_autocast(mode[node]):
            continue  # which leaves it alone, and would not leave a linear
        if not any(writes.is_written(n) for n in found if n is not None):
            _become_linear(node, *found)
            changed = True
    sums = {found[0]: found for n in program.calls(*ops.ADDS) if (found := _biased(writes, mode, values, n))}
    for linear, node, bias in sums.values():
        if all(len(n.args) > 2 or n in sums for n in _readers(values, linear.args[0])):
            _become_linear(node, linear.args[0], linear.args[1], bias)  # type: ignore[arg-type]
            changed = True
    for linear in sums:
        if not linear.users:
            program.graph.erase_node(linear)
    if changed:
        program.refresh()
    if _rows_meet(program):
        program.refresh()


def value_of(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def is_input(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _untransposed(node: Any) -> Node | None:
    """The two-dimensional input whose transpose a node is, by the memory that it shows."""
    source, value = node, value_of(node)
    if value is None or value.dim() != 2:
        return None
    while isinstance(source, Node) and not is_input(source) and source.args:
        source = source.args[0]
    own = value_of(source)
    if own is None or own.dim() != 2 or storage_of(source) != storage_of(node) or own.dtype != value.dtype:
        return None
    if own.is_conj() != value.is_conj() or own.is_neg() != value.is_neg():
        return None
    turned = zip((*value.shape, *value.stride()), (*own.shape[::-1], *own.stride()[::-1]), strict=True)
    same = all(statically_known_true(a == b) for a, b in turned)
    return source if same and statically_known_true(own.storage_offset() == value.storage_offset()) else None


def _views_of(weight: Node, product: Node) -> list[Node]:
    """The calls by which a product reads an input as another view."""
    found: list[Node] = []
    for node in product.all_input_nodes:
        source: Any = node
        while isinstance(source, Node) and not is_input(source) and storage_of(source) == storage_of(weight):
            found.append(source)
            source = source.args[0]
    return found


def _expanded(node: Any) -> Node | None:
    """The two-dimensional input whose transpose a node repeats for each of a batch."""
    value, source = value_of(node), node
    if value is None or value.dim() != 3 or not (value.stride(0) == 0 or value.shape[0] == 1):
        return None
    while (own := value_of(source)) is not None and own.dim() == 3 and str(source.target) in ops.REPEATED:
        source = source.args[0]
    if own is None or own.dim() != 2 or own.stride() != value.stride()[1:] or own.shape != value.shape[1:]:
        return None
    return _untransposed(source)


def _operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """x, W and b of a product that is x·Wᵀ + b with an input as W."""
    name = str(node.target)
    if name == ops.EINSUM:
        return _einsum_operands(node)
    if name == ops.ADDMM:
        bias, x, turned = node.args[:3]
        scaled = any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta"))
        weight = _untransposed(turned)
        if scaled or weight is None or not (_is_zero(bias) or _is_bias(bias, weight)):
            return None
        return x, weight, None if _is_zero(bias) else bias  # type: ignore[return-value]
    if name == ops.BADDBMM:
        bias, x, turned = node.args[:3]
        scaled = any(node.kwargs.get(key, 1) != 1 for key in ("alpha", "beta"))
        weight = _expanded(turned)
        if scaled or weight is None or not (_is_zero(bias) or _is_bias(bias, weight)):
            return None
        return x, weight, None if _is_zero(bias) else bias  # type: ignore[return-value]
    if name in (ops.INNER, ops.TENSORDOT, ops.MV):
        return _contracted(node)
    x, turned = node.args[:2]
    weight, value = _untransposed(turned) or _expanded(turned), value_of(x)
    if weight is None or value is None or value.dim() == 0:
        return None
    return x, weight, None  # type: ignore[return-value]


def _contracted(node: Node) -> tuple[Node, Node, None] | None:
    """inner(x, W), tensordot(x, W, [-1], [1]), tensordot(x, Wᵀ, [-1], [0]) and mv(W, x)."""
    x, weight = node.args[:2]
    if str(node.target) == ops.MV:
        x, weight = weight, x
    source = weight if isinstance(weight, Node) and is_input(weight) else None
    if str(node.target) == ops.TENSORDOT:
        value, (given, other) = value_of(x), node.args[2:4]
        if value is None or len(given) != 1 or len(other) != 1 or given[0] % value.dim() != value.dim() - 1:  # type: ignore[arg-type, index, operator]
            return None
        if other[0] % 2 == 0:  # type: ignore[index, operator]
            source = _untransposed(weight)
    values = [value_of(n) for n in (x, source)]
    if any(v is None for v in values) or values[1].dim() != 2 or values[0].dim() == 0:  # type: ignore[union-attr]
        return None
    if values[0].dtype != values[1].dtype or node.kwargs.get("out") is not None:  # type: ignore[union-attr]
        return None
    return x, source, None  # type: ignore[return-value]


def _is_transposed(value: Tensor, own: Tensor) -> bool:
    """Whether one tensor is the other with its last two dimensions exchanged, by shape and strides."""
    if own.dim() != value.dim() or own.dim() < 2:
        return False
    order = [*range(own.dim() - 2), -1, -2]
    wanted = [*(own.shape[i] for i in order), *(own.stride(i) for i in order)]
    pairs = zip((*value.shape, *value.stride()), wanted, strict=True)
    return all(statically_known_true(a == b) for a, b in pairs)


def turned(node: Any) -> Node | None:
    """What a node is the transpose of, last two dimensions exchanged, by the memory that it shows."""
    source = node.args[0] if isinstance(node, Node) and node.args else None
    value, own = value_of(node), value_of(source)
    if value is None or own is None or storage_of(source) != storage_of(node):  # type: ignore[arg-type]
        return None
    return source if _is_transposed(value, own) else None  # type: ignore[return-value]


def put_weights_second(program: Program) -> None:
    """W @ xᵀ -> (x @ Wᵀ)ᵀ, where xᵀ is a view of a tensor of rows."""
    writes, fixed, changed = StorageWrites(program.graph), layout_shows(program.graph), False
    backward = Backward(program)
    for node in program.calls(ops.MATMUL):
        operands: tuple[Any, ...] = node.args
        weight, turned = operands[:2]
        rows: Any = turned.args[0] if isinstance(turned, Node) and turned.args else None
        w, value, own = value_of(weight), value_of(turned), value_of(rows)
        if w is None or value is None or own is None or weight.name not in program.weights:
            continue
        if rows.name in program.weights or storage_of(rows) != storage_of(turned) or w.dim() != 2:
            continue
        if own.dtype != w.dtype or not _is_transposed(value, own) or backward.parts(node, turned):
            continue
        if any(writes.is_written(n) for n in (node, weight, turned)) or storage_of(node) in fixed:
            continue
        with program.graph.inserting_before(node):
            y = program.graph.call_function(torch.ops.aten.linear.default, (rows, weight))
        y.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        node.target, node.args, node.kwargs = torch.ops.aten.transpose.int, (y, -2, -1), {}
        node.meta.pop("val", None)
        changed = True
    if changed:
        program.refresh()


def _is_zero(bias: Any) -> bool:
    """Zeros to which a product is added, and which nobody writes."""
    alone = isinstance(bias, Node) and all(
        str(user.target) in (ops.ADDMM, ops.BADDBMM) for user in bias.users
    )
    return alone and str(bias.target) in ZEROS


def _is_bias(bias: Any, weight: Node) -> bool:
    value, rows = value_of(bias), weight.meta["val"]
    if value is None or value.dim() != 1 or value.dtype != rows.dtype or not is_input(bias):
        return False
    return statically_known_true(value.shape[0] == rows.shape[0])


def equation_of(node: Node) -> tuple[list[str], str] | None:
    equation, operands = node.args[:2]
    text = str(equation).replace(" ", "")
    if "->" not in text or len(node.args) > 2 or node.kwargs.get("path") is not None:
        return None
    given, result = text.split("->")
    names = given.split(",")
    for operand in operands:  # type: ignore[union-attr]
        if value_of(operand) is None:
            return None
    return names, result


def _einsum_operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """einsum("…i,oi->…o", x, w), whichever comes first and whatever the letters."""
    parsed = equation_of(node)
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
        source: Node | None = weight if is_input(weight) else None
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
    parsed = equation_of(node)
    if parsed is None or len(parsed[0]) != 1 or "." in parsed[0][0]:
        return
    given, result = parsed[0][0], parsed[1]
    if len(set(given)) == len(given) and sorted(given) == sorted(result):
        operands: Any = node.args[1]
        node.target = torch.ops.aten.permute.default
        node.args = (operands[0], [given.index(letter) for letter in result])
        node.kwargs = {}


_SECOND_FACTOR = {ops.MATMUL: 1, ops.MM: 1, ops.BMM: 1, ops.ADDMM: 2, ops.BADDBMM: 2}


def _read_transposes_uncopied(program: Program, writes: StorageWrites, backward: Backward) -> None:
    """x @ w.T.contiguous() -> x @ w.T: a matrix product asks for no layout, of a batch of them neither."""
    batches = []
    for copy in program.calls(ops.CLONE, ops.CONTIGUOUS):
        source: Any = copy.args[0]
        if _untransposed(source) is None or writes.is_written(copy) or writes.is_written(source):
            continue
        if backward.stops_at(copy):
            continue
        for user in list(copy.users):
            if _is_second_factor(user, copy):
                user.update_arg(_SECOND_FACTOR[str(user.target)], source)
            elif _is_batch(user):
                user.update_arg(0, source)
                batches.append(user)
    program.refresh(batches)


def _is_second_factor(product: Node, factor: Node) -> bool:
    place = _SECOND_FACTOR.get(str(product.target))
    return place is not None and product.args[place] is factor


def _is_batch(node: Node) -> bool:
    """Whether a call repeats its input for matrix products, which alone read it."""
    return str(node.target) in ops.REPEATED and all(
        _is_second_factor(user, node) or _is_batch(user) for user in node.users
    )


def _become_linear(node: Node, x: Node, weight: Node, bias: Node | None) -> None:
    node.target = torch.ops.aten.linear.default
    node.args = (x, weight) if bias is None else (x, weight, bias)
    node.kwargs = {}
    node.meta.pop("val", None)


def _has_rows_of(values: dict[Node, Tensor | None], node: Node, x: Node, weight: Node) -> bool:
    """Whether a product has the sizes of linear(x, weight): no batch of its own, no column repeated."""
    own, rows, features = values[node], values[x], values[weight]
    if own is None or rows is None or features is None:
        return False
    contracted = (rows.shape[-1], features.shape[1])
    return equal_sizes((*own.shape, contracted[0]), (*rows.shape[:-1], features.shape[0], contracted[1]))


def _biased(
    writes: StorageWrites, mode: dict[Node, Mode], values: dict[Node, Tensor | None], node: Node
) -> tuple[Node, Node, Node] | None:
    """The linear, the sum and the bias of linear(x, w) + b, where nobody else reads the sum without b."""
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    for linear, bias in (node.args, node.args[::-1]):
        if not isinstance(linear, Node) or str(linear.target) != ops.LINEAR or len(linear.users) != 1:
            continue
        if len(linear.args) > 2 or linear.kwargs or not isinstance(bias, Node):
            continue
        weight = linear.args[1]
        if not is_input(weight) or value_of(weight).dim() != 2 or not _is_bias(bias, weight):  # type: ignore[arg-type, union-attr]
            continue
        if any(writes.is_written(n) for n in (node, linear, bias, weight, linear.args[0])):  # type: ignore[arg-type]
            continue
        dtypes = {value.dtype for n in (node, linear, bias) if (value := values[n]) is not None}
        if mode[node] == mode[linear] and len(dtypes) == 1:
            return linear, node, bias
    return None


_ROWS = ops.RESHAPES | {ops.FLATTEN}


def _readers(values: dict[Node, Tensor | None], x: Any) -> list[Node]:
    """The linears over the rows of a value: with a bias on some of them alone they would not merge."""
    while _shows_rows(values, x):
        x = x.args[0]
    found, waiting = [], [x] if isinstance(x, Node) else []
    while waiting:
        users = list(waiting.pop().users)
        found += [user for user in users if str(user.target) == ops.LINEAR]
        waiting += [user for user in users if _shows_rows(values, user)]
    return found


def _shows_rows(values: dict[Node, Tensor | None], node: Any) -> bool:
    """Whether a call gives a value other leading sizes, and keeps its last."""
    if not isinstance(node, Node) or str(node.target) not in _ROWS:
        return False
    shown, own = values.get(node), values.get(node.args[0])  # type: ignore[arg-type]
    return shown is not None and own is not None and equal_sizes(shown.shape[-1:], own.shape[-1:])


def _are_put_back(linear: Node, x: Tensor) -> bool:
    """Whether all who read the rows give them the leading sizes that x has."""
    lead, width = x.shape[:-1], linear.meta["val"].shape[-1]
    reshapes = ops.RESHAPES | {ops.UNFLATTEN}
    values = [value_of(user) if str(user.target) in reshapes else None for user in linear.users]

    def is_back(v: Tensor | None) -> bool:
        if v is None or not lead:
            return v is not None and equal_sizes(v.shape, (width,))
        return v.dim() > len(lead) and equal_sizes(v.shape[: len(lead)], lead)

    return bool(values) and all(map(is_back, values))


def _rows_meet(program: Program) -> bool:
    """linear(reshape(x, [rows, n]), w) -> reshape(linear(x, w), …).

    Where another linear reads x itself, or the rows are put back to where they were.
    """
    readers: dict[Any, list[Node]] = {}
    linears = [node for node in program.calls(ops.LINEAR) if not node.kwargs]
    for linear in linears:
        readers.setdefault(linear.args[0], []).append(linear)
    moved = False
    writes, backward = StorageWrites(program.graph), Backward(program)
    for linear in linears:
        rows = linear.args[0]
        if not isinstance(rows, Node) or str(rows.target) not in _ROWS:
            continue
        x, between = rows.args[0], [rows]
        while isinstance(x, Node) and x not in readers and str(x.target) in _ROWS:
            between.append(x)
            x = x.args[0]
        if backward.parts(linear, *between):
            continue
        flat, whole = value_of(rows), value_of(x)
        if not isinstance(x, Node) or flat is None or whole is None:
            continue
        if x not in readers and not _are_put_back(linear, whole):
            continue
        if not statically_known_true(flat.shape[-1] == whole.shape[-1]) or linear.meta["val"].dim() == 1:
            continue
        if any(writes.is_written(n) for n in (x, rows, linear)) or flat.dim() == whole.dim():
            continue
        given: Any = rows.args[1:]
        shape = list(given[0]) if str(rows.target) != ops.FLATTEN else [-1, flat.shape[-1]]
        if len(shape) != flat.dim():
            continue
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
