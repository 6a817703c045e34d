"""The exact oracle of the pass tests: on small integers a rewrite changes no bit of any output."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fxfuse import Rewritten, rewrite
from fxfuse.testing.tensors import integer_like_

Rewrite = Callable[..., Rewritten]


def _layout(value: Any) -> Any:
    return (value.dtype, value.shape, value.stride()) if isinstance(value, torch.Tensor) else value


def _rewrite_equal(module: nn.Module, inputs: Sequence[Any], fill: bool = True, **options: Any) -> Rewritten:
    """`rewrite`, no pass undone; outputs, layouts, written inputs and buffers are equal, bit for bit."""
    if fill:
        integer_like_(module, seed=1)
    before = copy.deepcopy(module.state_dict())
    rewritten = rewrite(module, inputs, **options)
    assert not [miss.reason for miss in rewritten.report.misses if "undone" in miss.reason]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"rewrite() changed {name}"
    theirs, ours = copy.deepcopy(list(inputs)), copy.deepcopy(list(inputs))
    with torch.no_grad():
        expected, got = module(*theirs), rewritten.graph_module(*ours)
    pairs = list(zip(tree_leaves((expected, theirs)), tree_leaves((got, ours)), strict=True))
    assert pairs
    for e, g in pairs:
        assert _layout(e) == _layout(g)
        assert torch.equal(e, g) if isinstance(e, torch.Tensor) else e == g
    buffers = dict(rewritten.graph_module.named_buffers())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    return rewritten


@pytest.fixture
def rewrite_equal() -> Rewrite:
    return _rewrite_equal
