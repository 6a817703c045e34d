"""What the tests of the runtime have in common; tiny models are in tests/conftest.py."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from fxfuse.passes import pipeline
from fxfuse.passes.program import Program


@pytest.fixture(scope="session", autouse=True)
def _quiet(quiet: None) -> None:
    pass


@pytest.fixture(scope="session")
def make_next(hybrid: dict[str, Any]) -> Callable[..., Any]:
    """An untrained Qwen3-Next, whose projections are interleaved by groups of three value heads; dense."""

    def make(**config: Any) -> Any:
        torch.manual_seed(0)
        heads = {"linear_value_head_dim": 8, "linear_num_value_heads": 6, "mlp_only_layers": [0, 1]}
        given = {**hybrid, **heads, "num_experts": 0, **config}
        return Qwen3NextForCausalLM(Qwen3NextConfig(**given)).eval()

    return make


@pytest.fixture()
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that passes have rewritten, as they are compiled."""
    seen: list[Program] = []
    apply = pipeline.apply

    def recording(*args: Any) -> Any:
        result = apply(*args)
        seen.append(result[0])
        return result

    monkeypatch.setattr(pipeline, "apply", recording)
    return seen


# --- checkpoints whose widths are all different, for plans and conversions

NARROW: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "vocab_size": 32,
}
SPARSE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "dense": Qwen3_5TextConfig(**NARROW, intermediate_size=24),
    "dense with biases": Qwen3_5TextConfig(**NARROW, intermediate_size=24, attention_bias=True),
    "moe": Qwen3_5MoeTextConfig(**NARROW, **SPARSE),
    "next": Qwen3NextConfig(**NARROW, **SPARSE, intermediate_size=24, mlp_only_layers=[1]),
}


def _model(kind: str) -> Any:
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def _state(kind: str) -> dict[str, torch.Tensor]:
    """bfloat16, with A_log and the gated norm in float32, and what no layout touches."""
    torch.manual_seed(0)
    weights = {
        name: tensor.clone() if name.endswith(("A_log", "linear_attn.norm.weight")) else tensor.bfloat16()
        for name, tensor in _model(kind).state_dict().items()
    }
    weights["mtp.fc.weight"] = torch.randn(16, 32).to(torch.bfloat16)
    weights["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(32, 16).to(torch.bfloat16)
    weights["model.visual.pos_embed"] = torch.randn(3, 5)
    weights["flag"] = torch.tensor([True, False, True])
    return weights


def _write(
    folder: Path,
    weights: dict[str, torch.Tensor],
    config: str | PretrainedConfig | dict[str, Any] = "dense",
    shards: int = 1,
) -> Path:
    """A checkpoint with what lies beside the weights; several shards have an index."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[config] if isinstance(config, str) else config
    fields = config if isinstance(config, dict) else config.to_dict()
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    name = "model-{}.safetensors" if shards > 1 else "model.safetensors"
    files = {tensor: name.format(i % shards) for i, tensor in enumerate(weights)}
    for file in sorted(set(files.values())):
        # tied weights are saved once under each name
        own = {n: t.clone().contiguous() for n, t in weights.items() if files[n] == file}
        save_file(own, folder / file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture(scope="session")
def narrow() -> SimpleNamespace:
    """`configs` by kind, and for a kind its `model` and `state`; `write` makes a checkpoint of a state."""
    return SimpleNamespace(configs=CONFIGS, sizes=NARROW, model=_model, state=_state, write=_write)
