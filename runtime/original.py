"""A captured graph as it was: what runs where nothing is rewritten, or what is rewritten cannot run."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.utils.checkpoint import checkpoint

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
CONTEXT = "_checkpoint_context_fn"  # says what a selective checkpoint keeps


def as_it_was(graph_module: GraphModule) -> Callable[..., Any]:
    """The computation of one of Dynamo's graphs, which stays as it is, without any compiler.

    Dynamo's operator for an activation checkpoint leaves it to Inductor that the second run draws the random
    numbers of the first; without Inductor it draws others. In its place stands the function that it is from.
    """
    if not graph_module.graph.find_nodes(op="call_function", target=CHECKPOINT):
        return graph_module.forward
    graph = copy_of(graph_module)
    for node in graph.find_nodes(op="call_function", target=CHECKPOINT):
        node.target = _checkpointed(getattr(graph_module, str(node.args[0].target)))
    return GraphModule(graph_module, graph).forward


def copy_of(graph_module: GraphModule) -> Graph:
    """A graph to edit; the module keeps its own."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return graph


def _checkpointed(body: GraphModule) -> Callable[..., Any]:
    run = as_it_was(body)
    selective = {} if CONTEXT not in body.meta else {"context_fn": body.meta[CONTEXT]}

    def checkpointed(_: GraphModule, *args: Any, **options: Any) -> Any:
        return checkpoint(run, *args, **{**options, **selective, "use_reentrant": False})

    return checkpointed
