"""What the parameters of a captured graph are called: as in the model, or from where Dynamo found them."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import count

from torch.fx import Node


def unique_names(known: Mapping[Node, str | None], taken: Iterable[str]) -> dict[Node, str]:
    """A name for each placeholder: the one it has in the model, or else one from its source that is free."""
    names = {node: name for node, name in known.items() if name is not None}
    short = {node: _dotted_name(node) for node, name in known.items() if name is None}
    used = {*names.values(), *taken}
    often = Counter([*used, *short.values()])
    for node in short:
        name = wanted = short[node] if often[short[node]] == 1 else dotted_source(node)
        for number in count(2):
            if name not in used:
                break
            path, _, leaf = wanted.rpartition(".")
            name = f"{path}_{number}.{leaf}" if path else f"{wanted}_{number}"
        names[node] = name
        used.add(name)
    return names


def _source(placeholder: Node) -> str:
    source = getattr(placeholder, "_dynamo_source", None)
    text = source.name if source is not None else placeholder.name
    return str(text() if callable(text) else text)


def _dotted_name(placeholder: Node) -> str:
    """`L['self']._modules['mlp']._parameters['weight']` to `mlp.weight`: the name in the state dict."""
    parts = re.findall(r"_(?:modules|parameters|buffers)\['([^']+)'\]", _source(placeholder))
    return ".".join(part for part in parts if part != "_orig_mod") or placeholder.name


def dotted_source(placeholder: Node) -> str:
    """`L['self'].mods[0]._modules['q']._parameters['weight']` to `mods.0.q.weight`: all of it."""
    ignored = {"L", "G", "self", "_modules", "_parameters", "_orig_mod", "__closure__", "cell_contents"}
    return ".".join(part for part in re.findall(r"\w+", _source(placeholder)) if part not in ignored)
