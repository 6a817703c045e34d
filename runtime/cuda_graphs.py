"""Which graphs a mode of torch.compile records as CUDA graphs, and which of their inputs stay in place."""

from collections.abc import Sequence
from typing import Any

from torch._dynamo.source import ConstantSource
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols

from fxfuse.passes.storage_writes import StorageWrites
from fxfuse.runtime.capture import placeholders
from fxfuse.runtime.options import Mode

# Modes that record, each with the one that does the same without.
WITHOUT: dict[str, Mode] = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
NOT_RECORDED = (
    "no CUDA graph is recorded for a decoded token whose sizes, strides or offset vary: mode={0!r} records "
    "one over a static cache (cache_implementation='static') with a token that is no view of a sequence"
)


def mode_for(mode: Mode | None, phase: str, inputs: Sequence[Any], graph: Graph) -> Mode | None:
    """The mode that one graph is compiled in, where `mode` is the one asked for.

    Only a decoded token of fixed sizes is recorded, one that writes to a cache. Other sizes would need a
    recording each; and what a prompt's graph, also one of a single token, makes for a cache to keep would
    lie in memory that its next replay writes to.
    """
    if mode in WITHOUT and (phase != "decode" or any(map(free_symbols, inputs)) or not _states(graph)):
        return WITHOUT[mode]
    return mode


def _states(graph: Graph) -> list[Node]:
    """The inputs that a graph writes to and that are as large as keys and states: not a mere length."""
    writes, inputs = StorageWrites(graph), graph.find_nodes(op="placeholder")
    return [node for node in inputs if writes.is_written(node) and node.meta["val"].dim() >= 3]


def keep_addresses(graph_module: GraphModule) -> None:
    """Mark the inputs that a graph writes to, those of a cache, as static: a replay uses them in place.

    Otherwise Inductor copies an input into the recording's own memory before each replay, and does not record
    a graph that writes to one. transformers marks the tensors of a static cache itself
    (`torch._dynamo.mark_static_address`), but not where a compiled prompt has made them. A cache at another
    address is recorded anew, not compiled anew.
    """
    writes = StorageWrites(graph_module.graph)
    # By this AOTAutograd knows a graph of Dynamo's, whose marks it reads; it asks where constants are from.
    constants = (
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    )
    sources: Any = {name: ConstantSource(name) for name, _ in constants}
    graph_module._param_name_to_source = sources
    for node in placeholders(graph_module):
        if writes.is_written(node):
            kept = node.meta.get("tensor_dict", {})
            node.meta["tensor_dict"] = {**kept, "_dynamo_static_input_type": "unguarded"}
