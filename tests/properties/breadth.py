"""Every causal language model of transformers, tiny and random, through optimize().

    python tests/properties/breadth.py                     all of them, table in docs/breadth.md
    python tests/properties/breadth.py --only llama gpt2   some, printed
    python tests/properties/breadth.py --table             the table anew, from the results at hand

A class counts as built if its config shrinks to a few thousand parameters by the common names of sizes and
the plain model answers. The optimised model must answer, too, and pass the reference oracle.
"""

import argparse
import copy
import json
import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import fxfuse
from fxfuse.runtime.optimize import optimization_report
from fxfuse.testing import assert_equivalent

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".cache" / "breadth.jsonl"
TABLE = ROOT / "docs" / "breadth.md"
SECONDS = 240
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


def shrunk(config: Any, variant: dict[str, Any]) -> Any:
    """The config anew with small sizes, its parts too."""
    sizes = {**SMALL, **variant}
    given = {key: value for key, value in sizes.items() if getattr(config, key, None) is not None}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            given[key] = shrunk(value, variant)
    return type(config)(**given)


def build(model_type: str, variant: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config = shrunk(AutoConfig.for_model(model_type), variant)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters remain")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


def examine(model_type: str) -> dict[str, Any]:
    """One row of the table: what became of the class."""
    row: dict[str, Any] = {"model_type": model_type}
    try:
        model, inputs = prepared(model_type)
    except Exception as error:
        return row | {"state": "not built", "detail": _line(error)}
    row["class"] = type(model).__name__
    plain = copy.deepcopy(model)
    try:
        torch.manual_seed(0)
        fxfuse.optimize(model, inner="eager", report="off")
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        return row | {"state": "crash", "detail": _line(error)}
    report: Any = optimization_report(model)
    graphs = report.graphs
    row["matches"] = Counter(
        match.rule for graph in graphs for outcome in graph.outcomes.values() for match in outcome.matches
    )
    row["misses"] = Counter(
        miss.reason for graph in graphs for outcome in graph.outcomes.values() for miss in outcome.misses
    )
    row["graphs"], row["failures"], row["notes"] = len(graphs), report.failures, list(report.notes)
    try:
        assert_equivalent(plain, model, inputs, logits=("logits",))
    except fxfuse.VerificationError as error:
        if "does not run in" in str(error) or "when asked for" in str(error):
            return _without_wide_run(row, plain, model, inputs)
        return row | {"state": "wrong", "detail": str(error)[:2000]}
    except Exception as error:
        return row | {"state": "not compared", "detail": _line(error)}
    return row | {"state": "right", "detail": "reference oracle"}


def _without_wide_run(row: dict[str, Any], plain: nn.Module, model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Models that do not run in float64 are compared with their own fp32 answer."""
    with torch.no_grad():
        expected, got = plain(**inputs).logits, model(**inputs).logits
    error = (expected - got).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt().clamp_min(1e-12)
    state = "right" if error < 1e-5 else "wrong"
    return row | {"state": state, "detail": f"fp32 only: relative RMS difference {float(error):.1e}"}


def _line(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def isolated(model_type: str) -> dict[str, Any]:
    """`examine` in a process of its own, within SECONDS."""
    read, write = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(SECONDS)
        row = examine(model_type)
        os.write(write, json.dumps(row).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    seconds = round(time.perf_counter() - started, 1)
    if text:
        return json.loads(text) | {"seconds": seconds}
    slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    state, detail = ("too slow", f"over {SECONDS} s") if slow else ("crash", f"process status {status}")
    return {"model_type": model_type, "state": state, "detail": detail, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    states = Counter(row["state"] for row in rows)
    merged = sum(1 for row in rows if row.get("matches"))
    seconds = sum(row["seconds"] for row in rows)
    lines = [
        "# Breadth: every causal language model of transformers",
        "",
        'Each class of `AutoModelForCausalLM` as a tiny random model through `optimize(inner="eager")`,',
        "held to the reference oracle on two prompts. Written by `python tests/properties/breadth.py`.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}, fxfuse {fxfuse.__version__}: "
        f"{len(rows)} model types in {seconds / 60:.0f} minutes. "
        + ", ".join(f"{count} {state}" for state, count in states.most_common())
        + f"; {merged} have matches.",
        "",
        "| model type | class | state | matches | graphs | detail |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["model_type"]):
        matches = ", ".join(f"{rule} {count}" for rule, count in row.get("matches", {}).items())
        detail = "" if row["state"] == "right" else row["detail"].replace("|", "/").replace("\n", " ")[:160]
        cells = (
            row["model_type"],
            row.get("class", ""),
            row["state"],
            matches,
            row.get("graphs", ""),
            detail,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="model types instead of all of them")
    parser.add_argument("--table", action="store_true", help="write the table from the results at hand")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if arguments.only:
        rows = [isolated(name) for name in arguments.only]
        print(json.dumps(rows, indent=1))
        return int(any(row["state"] in ("wrong", "crash") for row in rows))
    if not arguments.table:
        RESULTS.parent.mkdir(exist_ok=True)
        names = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        with RESULTS.open("w") as file:
            for number, name in enumerate(names, 1):
                row = isolated(name)
                print(f"{number}/{len(names)} {name}: {row['state']} {row['detail'][:120]}", flush=True)
                file.write(json.dumps(row) + "\n")
                file.flush()
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    TABLE.write_text(table(rows))
    return int(any(row["state"] in ("wrong", "crash") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
