"""What is computed of two tensors that are reshaped alike is computed before, and reshaped afterwards.

Before: y = f(reshape(a, s), reshape(b, s), …)      a and b of one shape, views of larger rows perhaps
After:  y = reshape(f(a, b, …), s)                  nothing is copied
"""

from torch.fx import Node

from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites, equal_sizes
from fxfuse.patterns import ops

JOINS = (ops.RESHAPE, "aten.flatten.using_ints")


def reshape_after(program: Program, target: str, keeps_last: bool = False) -> None:
    """Rewrite the calls of an operator of two operands first; with `keeps_last`, rows have to stay rows."""
    writes = StorageWrites(program.graph)
    for node in program.calls(target):
        joined: list[Node] = list(node.args[:2])  # type: ignore[arg-type]
        if any(str(n.target) not in JOINS or writes.is_written(n) for n in joined):
            continue
        sources: list[Node] = [n.args[0] for n in joined]  # type: ignore[misc]
        shapes = [n.meta["val"].shape for n in sources]
        last = [shape[-1:] for shape in (shapes[0], joined[0].meta["val"].shape)]
        if equal_sizes(*shapes) and (not keeps_last or equal_sizes(*last)):
            _move(program, node, joined, sources)


def _move(program: Program, node: Node, joined: list[Node], sources: list[Node]) -> None:
    how = joined[0]
    with program.graph.inserting_after(node):
        after = program.graph.call_function(how.target, (node, *how.args[1:]))  # type: ignore[arg-type]
    after.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    node.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    node.args = (*sources, *node.args[2:])
    node.meta.pop("val", None)
    for n in joined:
        if not n.users:
            program.graph.erase_node(n)
