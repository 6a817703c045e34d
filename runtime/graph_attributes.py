"""Tensors that a graph holds by itself instead of taking them as inputs."""

from torch import Tensor, nn
from torch.fx import Graph, Node


def hold(root: nn.Module, name: str, value: Tensor, persistent: bool = True) -> None:
    """Make the tensor a parameter or a buffer by this name, in modules of its own where the name has dots."""
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, nn.Parameter):
        root.register_parameter(leaf, value)
    else:
        root.register_buffer(leaf, value, persistent=persistent)


def as_attribute(graph: Graph, node: Node, name: str) -> Node:
    """What reads an input reads the attribute of this name instead; the input goes."""
    with graph.inserting_before(node):
        attribute = graph.get_attr(name)
    attribute.meta.update(node.meta)
    node.replace_all_uses_with(attribute)
    graph.erase_node(node)
    return attribute
