"""A cat of one tensor and an empty one keeps eager's strides under Inductor, too."""

import torch
from torch import Tensor, nn

import fxfuse


class StartsACache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(8, 12)
        self.v = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (p(x).unflatten(-1, (3, 4)).transpose(1, 2) for p in (self.k, self.v))
        empty = torch.tensor([], dtype=x.dtype)
        return torch.cat([empty, k], dim=-2), torch.cat([v, v * 2], dim=-2)


def test_a_cat_with_an_empty_tensor_is_a_contiguous_copy() -> None:
    module, x = StartsACache(), torch.randn(2, 5, 8)
    result = fxfuse.rewrite(module, (x,))
    targets = [str(node.target) for node in result.graph_module.graph.nodes]
    assert targets.count("aten.cat.default") == 1
    for shape in ((2, 5, 8), (1, 1, 8)):
        x = torch.randn(shape)
        for ours, theirs in zip(result.graph_module(x), module(x), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
            assert ours.stride() == theirs.stride()
