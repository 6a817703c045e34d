"""Kernels per layer of graphs that are lowered for cuda, counted at the widths of released models."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import fxfuse
from fxfuse.passes.program import Program
from fxfuse.runtime.launches import Block, blocks_of, launches
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced

LAYERS = ("linear_attention", "full_attention", "linear_attention", "full_attention")
WIDTHS: dict[str, dict[str, int]] = {
    "0.8B": {
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
    },
    "27B": {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
    },
}
MOST = {"linear_attn": 4, "self_attn": 6, "mlp": 4}


def decode_blocks(**config: Any) -> tuple[fxfuse.Report, list[Block]]:
    heads = {"head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    layers = {"num_hidden_layers": len(LAYERS), "layer_types": list(LAYERS), "vocab_size": 512}
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**heads, **layers, **config)).to(torch.bfloat16).eval()
    report = fxfuse.explain(model, target="cuda", inner="eager")
    return report, report.graphs[-1].launches


@pytest.mark.parametrize("size", WIDTHS)
def test_a_decoded_token_takes_few_launches(size: str) -> None:
    report, blocks = decode_blocks(**WIDTHS[size])
    assert not report.misses
    for kind, most in MOST.items():
        of_kind = [block for block in blocks if block.kind == kind]
        assert [n for block in of_kind for n in block.layers], f"no block is {kind}"
        assert all(len(block.launches) <= most for block in of_kind), "\n".join(map(str, of_kind))
    names = [launch.names for block in blocks for launch in block.launches if block.kind == "linear_attn"]
    assert ("gdn_decode",) in names
    assert "triton gdn_decode" in str(report)


def test_pointwise_calls_that_feed_each_other_are_one_launch_and_views_are_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x.view(-1, 4)).relu() * 2 + x
            return (self.b(y).t() + 1).exp().sum(0) + y.mean()

    module = Two()
    program: Program = traced(module, dict(module.named_parameters()), [torch.randn(3, 4)], Options())
    kinds = [launch.kind for _, launch in launches(program.graph)]
    assert kinds.count("library") == 2
    assert kinds.count("inductor") == 2  # before the second linear, and behind it
    (block,) = blocks_of(program.graph)
    assert block.kind == "outside of layers"
