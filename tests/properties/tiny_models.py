"""A tiny random model of every model type of `AutoModelForCausalLM`, and inputs that it answers to."""

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MOST_PARAMETERS = 20_000_000

# Names of sizes that configs use, with tiny values; a config takes those that it has.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "model_dim", "decoder_hidden_size"), 32),
    **dict.fromkeys(("embedding_size", "embed_dim", "word_embed_proj_dim", "hidden_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "d_inner"), 48),
    **dict.fromkeys(
        ("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "shared_intermediate_size"), 48
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "n_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("swa_num_key_value_heads",), 2),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_dim", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "lora_rank", "index_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "conv_kernel"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_window_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("first_k_dense_replace",), 1),
    **dict.fromkeys(("num_kv_shared_layers", "num_nextn_predict_layers"), 0),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    **dict.fromkeys(("num_buckets", "num_hashes"), 2),
    **dict.fromkeys(("rotary_dim",), 4),
}
# What some classes need beside it: tried in this order until the plain model answers.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "num_kv_heads": 4},
    {"head_dim": None},
    {"num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16},
    {"mamba_d_head": 16, "mamba_n_heads": 4, "num_heads": 8, "head_dim": 8},
    {"num_heads": 4, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16},
    {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 64},
    {"num_hidden_layers": 6, "num_layers": 6, "n_layer": 6},
    {"num_hidden_layers": 2, "num_layers": 2, "n_layer": 2},
)

_SLIDING = ["sliding_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_OF_GEMMA4 = {"layer_types": _SLIDING, "global_head_dim": 16}
# What one type of config needs, by its name; None leaves a value of SMALL out.
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 40, "encoder_hash_byte_group_size": [3, 4]},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [2, 1, 1]}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention", "indexed_attention"],
        "shared_experts_intermediate_size": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_text": _OF_GEMMA4,
    "gemma4_unified_text": _OF_GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 8},
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": None, "num_decoder_attention_heads": 4, "num_buckets": 32},
    "reformer": {
        "num_hidden_layers": None,
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "hash_seed": 0,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"hidden_size": 64, "num_hidden_layers": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": _HYBRID, "num_key_value_heads": 4}
    | {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": _HYBRID, "num_key_value_heads": 4}
    | {"head_dim": None, "attention_head_dim": None, "attention_hidden_size": None, "kv_channels": None},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
# Types of which a causal language model is a part, that transformers builds from the part's config.
PARTS = {"dots3_note": "text_config", "musicgen": "decoder", "musicgen_melody": "decoder"}
# Types that transformers builds with something else, or not at all.
WHY_NOT = {
    "gemma3n": "its vision tower is one of timm's, which is not installed",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "all its layers read the keys of another model: its config asks for that, and its model raises",
    ),
}


def _takes(config: Any, key: str) -> bool:
    """Whether a config has a size of that name that can be set."""
    kind = getattr(type(config), key, None)
    if isinstance(kind, property) and kind.fset is None:
        return False
    try:
        return getattr(config, key, None) is not None
    except RuntimeError:  # it differs from layer to layer
        return True


def shrunk(config: Any, variant: dict[str, Any]) -> Any:
    """The config anew with small sizes, its parts too."""
    given = {key: value for key, value in {**SMALL, **variant}.items() if _takes(config, key)}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            given[key] = shrunk(value, variant)
    given |= OWN.get(config.model_type, {})
    return type(config)(**{key: value for key, value in given.items() if value is not None})


def _config(model_type: str, variant: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(model_type)
    return shrunk(getattr(config, PARTS[model_type]) if model_type in PARTS else config, variant)


def build(model_type: str, variant: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = _config(model_type, variant)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    part: Any = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    made = part._from_config if model_type in PARTS else AutoModelForCausalLM.from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in made(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters remain")
    model: nn.Module = made(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():  # left empty by the model's own initialisation
                parameter.normal_(std=0.02)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def prepared(model_type: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model that answers and the inputs that it answers to; raises what the first attempt raised."""
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    first: Exception | None = None
    for variant in VARIANTS:
        try:
            model = build(model_type, variant)
        except Exception as error:
            first = first or error
            continue
        for inputs in ({"input_ids": ids, "use_cache": False}, {"input_ids": ids}):
            try:
                with torch.no_grad():
                    if copy.deepcopy(model)(**inputs).logits.isfinite().all():
                        return model, inputs
                first = first or ValueError("its logits are not finite")
            except Exception as error:
                first = first or error
    assert first is not None
    raise first
