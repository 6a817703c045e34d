"""Heads that are repeated in front of the chunked delta rule are read where they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

import fxfuse
from fxfuse import rewrite

PASS = "grouped_delta_rule"


class Rule(nn.Module):
    def __init__(self, ratio: int, between: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.ratio, self.between = ratio, between

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        repeated = q.repeat_interleave(self.ratio, dim=2), k.repeat_interleave(self.ratio, dim=-2)
        extra = None if self.between is None else self.between(q, repeated[0])
        out, state = torch.ops.fxfuse.chunk_gated_delta_rule(*repeated, v, g, beta, None, True)
        return out, state, q + 1, extra


def drawn(ratio: int) -> list[Tensor]:
    torch.manual_seed(ratio)
    q, k = (torch.randn(2, 5, 2, 4) for _ in range(2))
    gates = [-torch.rand(2, 5, 2 * ratio), torch.rand(2, 5, 2 * ratio)]
    return [q, k, torch.randn(2, 5, 2 * ratio, 3), *gates]


def rewritten(module: Rule) -> Any:
    given = drawn(module.ratio)
    result = rewrite(module, given, passes=PASS)
    outs, expected_outs = result.graph_module(*drawn(module.ratio)), module(*drawn(module.ratio))
    for got, expected in zip(outs, expected_outs, strict=True):
        assert expected is None or torch.equal(got, expected)
    return result


def count(result: Any, name: str) -> int:
    return sum(name in str(node.target) for node in result.graph_module.graph.nodes)


@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
def test_nothing_is_repeated_and_the_result_is_the_same(ratio: int) -> None:
    result = rewritten(Rule(ratio))
    (match,) = result.report.graphs[0].outcomes[PASS].matches
    assert match.detail == f"heads repeated {ratio} times → once"
    assert count(result, "repeat_interleave") == 0 and count(result, "chunk_gated_delta_rule") == 1


def test_a_repeat_that_is_read_elsewhere_stays_for_its_reader() -> None:
    result = rewritten(Rule(2, lambda q, repeated: repeated.sum()))
    assert len(result.report.graphs[0].outcomes[PASS].matches) == 1
    assert count(result, "repeat_interleave") == 1


def test_a_query_that_is_written_in_between_is_read_as_it_was() -> None:
    result = rewritten(Rule(2, lambda q, repeated: q.mul_(2)))
    (miss,) = result.report.graphs[0].outcomes[PASS].misses
    assert "writes to what the computation reads" in miss.reason
    assert count(result, "repeat_interleave") == 2


@pytest.mark.parametrize("ratio", [1, 3])
def test_a_prompt_lowered_for_cuda_has_the_kernels_and_no_repeats(ratio: int) -> None:
    config = Qwen3_5TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2 * ratio,
        vocab_size=300,
    )
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(config).eval()
    report = fxfuse.explain(model, target="cuda", inner="eager")
    prefill = [block for block in report.graphs[0].launches if block.kind == "linear_attn"]
    names = [launch.names for block in prefill for launch in block.launches]
    assert names.count(("chunk_gated_delta_rule",)) == 2
    assert not any("repeat_interleave" in name for launch in names for name in launch)
    assert "triton chunk_gated_delta_rule" in str(report)
