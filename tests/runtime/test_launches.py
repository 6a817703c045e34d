"""Kernels per layer of graphs that are lowered for cuda, counted at the widths of released models."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    StaticCache,
)

import fxfuse
from fxfuse.passes import pipeline
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


EXPERTS = {  # of 35B-A3B
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
WIDE = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "linear_num_value_heads": 32,
}


def decode_blocks(
    model: type[Any], config: type[Any], passes: Any = "default", **widths: Any
) -> tuple[fxfuse.Report, list[Block]]:
    heads = {"head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    layers = {"num_hidden_layers": len(LAYERS), "layer_types": list(LAYERS), "vocab_size": 512}
    with torch.device("meta"):
        built = model(config(**heads, **layers, **widths)).to(torch.bfloat16).eval()
    report = fxfuse.explain(built, target="cuda", inner="eager", passes=passes)
    return report, report.graphs[-1].launches


def assert_few(blocks: list[Block], most: dict[str, int]) -> None:
    """No kind of block launches more than it may, and a step of Gated DeltaNet is one of its launches."""
    for kind, count in most.items():
        of_kind = [block for block in blocks if block.kind == kind]
        assert [n for block in of_kind for n in block.layers], f"no block is {kind}"
        assert all(len(block.launches) <= count for block in of_kind), "\n".join(map(str, of_kind))
    names = [launch.names for block in blocks for launch in block.launches if block.kind == "linear_attn"]
    assert ("gdn_decode",) in names, "no launch is gdn_decode"
    assert ("qkvzba_split",) not in names, "the row is copied apart"


@pytest.mark.parametrize("size", WIDTHS)
def test_a_decoded_token_takes_few_launches(size: str) -> None:
    report, blocks = decode_blocks(Qwen3_5ForCausalLM, Qwen3_5TextConfig, **WIDTHS[size])
    assert not report.misses
    assert_few(blocks, MOST)
    assert "triton gdn_decode" in str(report)


def test_interleaved_projections_cost_no_launch() -> None:
    _, blocks = decode_blocks(
        Qwen3NextForCausalLM, Qwen3NextConfig, **WIDE, intermediate_size=512, mlp_only_layers=[0, 1, 2, 3]
    )
    assert_few(blocks, MOST)


def test_a_mixture_of_experts_has_the_same_mixers_and_takes_what_torch_takes_to_route() -> None:
    """The limit of 4 is a dense MLP's: one of experts also has a router, its sort and the shared expert.

    Counted are all of them, as transformers writes them for grouped matrix products, and the norm behind.
    """
    report, blocks = decode_blocks(Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, **WIDE, **EXPERTS)
    assert not report.misses
    (block,) = (block for block in blocks if block.kind == "mlp")
    # transformers 5.17 zeroes the rows of experts elsewhere even where no expert is
    masks = [launch for launch in block.launches if launch.names == ("masked_fill",)]
    assert_few(blocks, {**MOST, "mlp": 21 + len(masks)})
    assert len(masks) <= 1
    kernels = [name for launch in block.launches for name in launch.names if launch.kind != "inductor"]
    assert Counter(kernels)["_grouped_mm"] == 2 and Counter(kernels)["silu_mul"] == 2


def waits_for_the_device(node: Node) -> bool:
    """Whether a call has to see values on the host, or copies between host and device."""
    if not isinstance(node.target, OpOverload):
        return False
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    devices = {value.device for value in values if isinstance(value, Tensor)}
    seen = torch.Tag.data_dependent_output in node.target.tags or bool(free_unbacked_symbols(values[0]))
    return seen or len(devices) > 1


def test_a_token_of_experts_never_waits_for_the_device(graphs: list[Program]) -> None:
    report, _ = decode_blocks(Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, **WIDE, **EXPERTS)
    assert report.graphs[-1].phase == "decode"
    (decode,) = graphs[1:]
    assert "aten._grouped_mm.default" in {str(node.target) for node in decode.graph.nodes}
    assert [node.format_node() for node in decode.graph.nodes if waits_for_the_device(node)] == []


def test_a_call_that_waits_is_seen() -> None:
    for function in (torch.nonzero, lambda x: torch.zeros(2) * x.amax().item()):
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
            graph = make_fx(function)(mode.from_tensor(torch.ones(3))).graph
        assert any(map(waits_for_the_device, graph.nodes))


def test_the_count_fails_where_the_step_is_not_one_launch() -> None:
    names = [p.name for p in pipeline.selected("default", "eager", "cuda") if p.name != "gdn_decode"]
    _, blocks = decode_blocks(Qwen3_5ForCausalLM, Qwen3_5TextConfig, passes=names, **WIDTHS["0.8B"])
    with pytest.raises(AssertionError, match="linear_attn × 2: 7 launches"):
        assert_few(blocks, MOST)
    with pytest.raises(AssertionError, match="no launch is gdn_decode"):
        assert_few(blocks, {**MOST, "linear_attn": 7})


@pytest.mark.parametrize("kind", ["contiguous", "interleaved"])
def test_a_batch_takes_no_more_launches_than_one_sequence(
    kind: str, make_model: Any, make_next: Any, graphs: list[Program]
) -> None:
    model = (make_model if kind == "contiguous" else make_next)().optimize(inner="eager", target="cuda")
    cache = StaticCache(config=model.config, max_cache_len=8)
    for length in (3, 1):
        with torch.no_grad():
            model(torch.ones(4, length, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert_few(blocks_of(graphs[-1].graph), MOST)


class LoneNorm(nn.Module):
    """An l2 norm that no delta rule reads, between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.a(x))
        return self.b(y * torch.rsqrt((y * y).sum(-1, keepdim=True) + 1e-6) * 8**-0.5)


def test_an_l2_norm_that_no_rule_reads_is_one_launch_with_its_neighbours() -> None:
    module, given = LoneNorm().requires_grad_(False), [torch.randn(3, 8)]
    found = fxfuse.rewrite(module, given, passes="default", target="cuda")
    ran = [launch for _, launch in launches(found.graph_module.graph)]
    assert [launch.kind for launch in ran] == ["library", "inductor", "library"]
    assert {"silu", "rsqrt", "sum"} <= set(ran[1].names)


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
