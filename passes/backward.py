"""What a backward tells apart: no rewrite takes a gradient through a value that had none, or ends one.

A value made under no_grad, or detached, has no gradient. Two calls written as one have one mode. What a call
was given it may keep until the backward: a copy is still there when its source has been written.
"""

from torch.fx import Node

from fxfuse.passes.modes import grad_enabled_at
from fxfuse.passes.program import Program
from fxfuse.passes.storage_writes import StorageWrites
from fxfuse.patterns import ops


class Backward:
    """Of one program, while its switches of grad mode stay where they are."""

    def __init__(self, program: Program) -> None:
        self._at_entry, self._needed = program.grad_enabled, program.needs_gradients

    def stops_at(self, node: Node) -> bool:
        """Whether gradients do not pass a call, although something in the graph has some."""
        if not self._needed or node.op != "call_function":
            return False
        return str(node.target) == ops.DETACH or not grad_enabled_at(node, self._at_entry)

    def parts(self, *nodes: Node) -> bool:
        """Whether gradients pass some of these calls only, so that no one call can be in their place."""
        return self._needed and len({self.stops_at(n) for n in nodes if n.op == "call_function"}) > 1

    def misses_copy(self, source: Node, writes: StorageWrites) -> bool:
        """Whether a call may not read the source of a copy instead, which is written before the backward.

        If not in this call of the graph, then in the next one: of a state, say.
        """
        return self._needed and writes.is_written(source)
