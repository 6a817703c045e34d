"""A graph that trains and has no match is compiled as torch.compile does, but for its embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from fxfuse.runtime import capture, inner
from fxfuse.runtime.options import Mode
from fxfuse.runtime.original import copy_of

_NAMES = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def compiled(graph_module: GraphModule, inputs: Sequence[Any], mode: Mode | None) -> Callable[..., Any]:
    """The graph under Inductor; the module given stays as it is."""
    graph = copy_of(graph_module)
    copied = GraphModule(graph_module, graph)
    capture.carry_over(copied, graph_module)
    for node in graph.find_nodes(op="call_function", target=F.embedding):
        args = _arguments_on_a_cpu(node)
        if args is not None:
            node.target, node.args, node.kwargs = torch.ops.fxfuse.embedding.default, args, {}
    copied.recompile()
    return inner.compile_graph("inductor", mode, copied, inputs)


def _arguments_on_a_cpu(node: Node) -> tuple[Any, ...] | None:
    """What our operator takes for a call of `embedding`; None where it has no such gradient."""
    given = dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    weight, ids = given["weight"], given["input"]
    table = weight.meta.get("example_value") if isinstance(weight, Node) else None
    if not isinstance(table, torch.Tensor) or table.device.type != "cpu" or not isinstance(ids, Node):
        return None
    if not table.requires_grad:
        return None
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
        return None
    padding: Any = given.get("padding_idx")
    rows = table.shape[0]
    if padding is not None and not (isinstance(padding, int) and isinstance(rows, int)):
        return None
    return weight, ids, -1 if padding is None else padding % rows
