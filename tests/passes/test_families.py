"""The same rules on the real models: counts, nothing unexplained, and the plan that names alone give."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5Attention,
    Qwen3_5GatedDeltaNet,
    Qwen3_5MLP,
    Qwen3_5TextRotaryEmbedding,
)

import fxfuse
from fxfuse import Report
from fxfuse.runtime import families
from fxfuse.runtime.backend import backend
from fxfuse.runtime.sessions import report_of
from fxfuse.runtime.shapes import text_config
from fxfuse.testing.tensors import integer_like_, integer_tensor

PLAIN: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 32,
}
HYBRID: dict[str, Any] = {
    **PLAIN,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
SPARSE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SHARED: dict[str, Any] = {**SPARSE, "shared_expert_intermediate_size": 12}

RULE = "same_input_linears"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config).eval()


def merges(report: Report, graph: int) -> Counter[str]:
    """How often each fused weight was made in one graph, layers taken together."""
    names = (match.where.split(".")[3:] for match in report.graphs[graph].outcomes[RULE].matches)
    return Counter(".".join(name) for name in names)


@pytest.fixture(scope="module")
def small() -> tuple[PreTrainedModel, Report]:
    """The published 0.8B shape, without memory."""
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(text_config("0.8b")).to(torch.bfloat16).eval()
    return model, fxfuse.explain(model, inner="eager")


def test_0_8b_has_18_gdn_24_mlp_and_6_attention_merges_in_prefill_and_decode(
    small: tuple[PreTrainedModel, Report],
) -> None:
    _, report = small
    assert [graph.phase for graph in report.graphs] == ["prefill", "decode"]
    for graph in range(2):
        assert merges(report, graph) == {
            "linear_attn.in_proj_qkv_z_b_a": 18,
            "mlp.gate_up_proj": 24,
            "self_attn.q_k_v_proj": 6,
        }
        details = Counter(m.detail for m in report.graphs[graph].outcomes[RULE].matches)
        assert details == {"4 linears → 1": 18, "2 linears → 1": 24, "3 linears → 1": 6}


def test_0_8b_leaves_nothing_unexplained(small: tuple[PreTrainedModel, Report]) -> None:
    assert small[1].misses == []


def test_0_8b_gives_the_plan_that_names_alone_give(small: tuple[PreTrainedModel, Report]) -> None:
    model, report = small
    digest = fxfuse.plan(model, "fused").digest
    assert [graph.plan_digest for graph in report.graphs] == [digest, digest]


CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3_5": Qwen3_5TextConfig(**HYBRID),
    "qwen3_5 with biases": Qwen3_5TextConfig(**HYBRID, attention_bias=True),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(
        **{k: v for k, v in HYBRID.items() if k != "intermediate_size"}, **SHARED
    ),
    "qwen3_next": Qwen3NextConfig(**HYBRID, **SHARED, mlp_only_layers=[1]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_family_gives_the_plan_that_names_alone_give(kind: str) -> None:
    model = tiny(CONFIGS[kind])
    report = fxfuse.explain(model, inner="eager")
    assert report.misses == []
    digest = fxfuse.plan(model, "fused").digest
    assert [graph.plan_digest for graph in report.graphs] == [digest, digest]


def test_the_router_reads_the_same_input_as_the_shared_expert() -> None:
    """It flattens rows that are flat already."""
    report = fxfuse.explain(tiny(CONFIGS["qwen3_5_moe"]), inner="eager")
    for graph in report.graphs:
        members = {m.members for m in graph.outcomes[RULE].matches if "expert" in m.where}
        layers = {member[0].split(".mlp.")[0] for member in members}
        names = {tuple(name.split(".mlp.")[1] for name in member) for member in members}
        assert len(layers) == 4
        assert names == {
            (
                "shared_expert.gate_proj.weight",
                "shared_expert.up_proj.weight",
                "gate.weight",
                "shared_expert_gate.weight",
            )
        }


def test_plain_llama_is_merged_without_any_table_of_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", ())
    monkeypatch.setattr(families, "_BY_MODEL_TYPE", {})
    report = fxfuse.explain(tiny(LlamaConfig(**PLAIN)), inner="eager")
    assert len(report.graphs) == 2
    for graph in range(2):
        assert merges(report, graph) == {"self_attn.q_k_v_proj": 2, "mlp.gate_up_proj": 2}
    assert report.misses == []


@pytest.mark.parametrize(
    ("config", "mlp"),
    [(Qwen3Config(**PLAIN), 2), (Qwen3MoeConfig(**PLAIN, **SPARSE, decoder_sparse_step=1), 0)],
)
def test_models_without_a_family_are_merged_where_the_rule_holds(config: PretrainedConfig, mlp: int) -> None:
    report = fxfuse.explain(tiny(config), inner="eager")
    assert report.graphs
    for graph in range(len(report.graphs)):
        assert (
            merges(report, graph) == Counter({"self_attn.q_k_v_proj": 2, "mlp.gate_up_proj": mlp}) + Counter()
        )


# One block each, compiled and run, bit for bit: what reads the merged outputs gets what it got before.


def compiled_equals_eager(
    module: nn.Module, merged: list[str], *args: Any, passes: Any = None, **kwargs: Any
) -> None:
    """Given `passes`, the reference is the graph rewritten by those instead of the module as it is."""
    integer_like_(module, seed=1, low=-1, high=1)
    call = torch.compile(module, backend=backend, options={"inner": "eager"})
    reference: Any = module
    if passes is not None:
        reference = torch.compile(
            copy.deepcopy(module), backend=backend, options={"inner": "eager", "passes": passes}
        )
    with torch.no_grad():
        expected, got = reference(*args, **kwargs), call(*args, **kwargs)
    pairs = list(zip(*(o if isinstance(o, tuple) else (o,) for o in (expected, got)), strict=True))
    for e, g in pairs:
        assert g is e is None or torch.equal(e, g)
        assert e is None or e.stride() == g.stride()
    report = backend_report(module)
    assert report.calls == 1
    assert [m.where for graph in report.graphs for m in graph.outcomes[RULE].matches] == merged


def backend_report(module: nn.Module) -> Report:
    report = report_of(module.parameters())
    assert report is not None
    return report


HIDDEN = integer_tensor((2, 5, 16), seed=0, low=-1, high=1)


def test_a_gated_delta_net_block_keeps_every_bit() -> None:
    """Beside the same graph without a pass: the delta rule is ours in both, and sums in another order."""
    module = Qwen3_5GatedDeltaNet(CONFIGS["qwen3_5"], 0).eval()
    compiled_equals_eager(module, ["in_proj_qkv_z_b_a"], passes=(), hidden_states=HIDDEN)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5 with biases"])
def test_an_attention_block_keeps_every_bit(kind: str, attention: str) -> None:
    config = CONFIGS[kind]
    config._attn_implementation = attention
    positions = Qwen3_5TextRotaryEmbedding(config)(HIDDEN, torch.arange(5).expand(3, 2, 5))
    compiled_equals_eager(
        Qwen3_5Attention(config, 3).eval(),
        ["q_k_v_proj"],
        hidden_states=HIDDEN,
        position_embeddings=positions,
        attention_mask=None,
    )


def test_an_mlp_block_keeps_every_bit() -> None:
    compiled_equals_eager(Qwen3_5MLP(CONFIGS["qwen3_5"], 24).eval(), ["gate_up_proj"], HIDDEN)


def test_with_grad_and_trainable_weights_nothing_is_merged_and_gradients_are_the_originals() -> None:
    module = integer_like_(Qwen3_5MLP(CONFIGS["qwen3_5"], 24), seed=1)
    call = torch.compile(module, backend=backend, options={"inner": "eager"})

    def gradients(run: Any) -> list[Tensor | None]:
        module.zero_grad()
        run(HIDDEN).sum().backward()
        return [p.grad.clone() if p.grad is not None else None for p in module.parameters()]

    assert all(map(torch.equal, gradients(module), gradients(call)))
    (graph,) = backend_report(module).graphs
    assert graph.outcomes[RULE].matches == []
    assert {m.where for m in graph.outcomes[RULE].misses} == {"gate_proj", "up_proj"}
    assert all("grad mode is on" in m.reason for m in graph.outcomes[RULE].misses)


def test_with_grad_frozen_weights_are_merged_and_the_input_gets_its_gradient() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    module = integer_like_(Product(), seed=1).requires_grad_(False)
    call = torch.compile(module, backend=backend, options={"inner": "eager"})
    x, y = HIDDEN.clone().requires_grad_(), HIDDEN.clone().requires_grad_()
    module(x).sum().backward()
    call(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert len(backend_report(module).graphs[0].outcomes[RULE].matches) == 1


def test_a_linear_under_no_grad_is_not_merged_with_one_that_has_a_gradient() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, n) for n in (2, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            with torch.no_grad():
                b = self.b(x)
            return a.sum() + b.sum() + self.c(x).sum()

    module = integer_like_(Detached(), seed=1).requires_grad_(False)
    call = torch.compile(module, backend=backend, options={"inner": "eager"})
    x, y = (integer_tensor((3, 4), 0).requires_grad_() for _ in range(2))
    module(x).backward()
    call(y).backward()
    assert torch.equal(x.grad, y.grad)
    (match,) = backend_report(module).graphs[0].outcomes[RULE].matches
    assert match.members == ("a.weight", "c.weight")
