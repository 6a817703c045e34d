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


def normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=2),
    "expand": lambda x: x[:, :, :, None].expand(-1, -1, -1, 3, -1).flatten(2, 3),
    "stack": lambda x: torch.stack([x] * 3, dim=3).flatten(2, 3),
    "index": lambda x: x[:, :, torch.arange(6) // 3],
    "repeat": lambda x: x.unsqueeze(3).repeat(1, 1, 1, 3, 1).flatten(2, 3),
}


class Normed(nn.Module):
    """Query and key are normalised, and then their heads repeated; or one of them the other way round."""

    def __init__(self, repeat: Callable[[Tensor], Tensor], query_first: bool = False) -> None:
        super().__init__()
        self.repeat, self.query_first = repeat, query_first

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        q, k = (x.unflatten(-1, (2, 4)) for x in (q, k))
        q = normed(self.repeat(q)) if self.query_first else self.repeat(normed(q))
        return torch.ops.fxfuse.chunk_gated_delta_rule(q, self.repeat(normed(k)), v, g, beta, None, False)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("query_first", [False, True])
@pytest.mark.parametrize("repeat", REPEATS)
def test_heads_that_are_normalised_before_they_are_repeated(
    repeat: str, query_first: bool, dynamic: bool
) -> None:
    q, k, *others = drawn(3)
    module, given = Normed(REPEATS[repeat], query_first), [q.flatten(2), k.flatten(2), *others]
    result = rewrite(module, given, passes=("l2_norm", PASS), dynamic=dynamic)
    (rule,) = (n for n in result.graph_module.graph.nodes if "chunk_gated" in str(n.target))
    assert [n.meta["val"].shape[2] for n in rule.args[:2]] == [2, 2] and rule.args[6] is True
    torch.testing.assert_close(result.graph_module(*given), module(*given))


@pytest.mark.parametrize(
    ("change", "reason"), [("tiled", ""), ("written", "is written before the rule reads it")]
)
def test_a_norm_stays_whose_heads_are_repeated_otherwise_or_written(change: str, reason: str) -> None:
    def repeat(x: Tensor) -> Tensor:
        return x.repeat(1, 1, 3, 1) if change == "tiled" else x.repeat_interleave(3, dim=2)

    class Changed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
            heads = repeat(normed(q)), repeat(normed(k))
            if change == "written":
                k.mul_(2)
            return torch.ops.fxfuse.chunk_gated_delta_rule(*heads, v, g, beta, None, False)

    result = rewrite(Changed(), drawn(3), passes="l2_norm")
    assert result.report.matched == 0 and reason in "".join(miss.reason for miss in result.report.misses)
    torch.testing.assert_close(result.graph_module(*drawn(3)), Changed()(*drawn(3)))


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
