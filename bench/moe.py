"""Time per decoded token of a mixture of experts, against each way transformers has to run experts.

Four layers with the widths of 35B-A3B. Each `experts_implementation` is a baseline, run eagerly and through
torch.compile; ours keeps the one that transformers chooses by itself. A way that does not run here is named
with its reason.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from generation import CACHES, Call, prompt, token_case
from harness import Case, Skipped, run
from models import (
    DTYPES,
    NARROW,
    Contender,
    Model,
    compiled,
    model_arguments,
    narrow_rope,
    optimized,
    sharing_weights,
    title,
)
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fxfuse.runtime.shapes import SIZES

WAYS = ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys())


def config(size: str, layers: int | None) -> Qwen3_5MoeTextConfig:
    """transformers' defaults are the widths of 35B-A3B; `tiny` has eight narrow experts."""
    more: dict[str, Any] = {"rope_parameters": {**SIZES["small"]["rope_parameters"]}}
    if layers is not None or size != "tiny":
        more["num_hidden_layers"] = layers or 4
    if size != "tiny":
        return Qwen3_5MoeTextConfig(**more)
    experts: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
    widths: dict[str, Any] = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    shape = Qwen3_5MoeTextConfig(**{**NARROW, **experts, **widths, **more})
    return narrow_rope(shape)


def build(options: argparse.Namespace) -> Model:
    """A model with random weights, the same ones every time."""
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    shape = config(options.size, options.layers)
    with torch.device(options.device):
        model = Qwen3_5MoeForCausalLM._from_config(shape, dtype=DTYPES[options.dtype]).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name or name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=0.02)  # transformers allocates them and leaves them empty
    return model


def cases(options: argparse.Namespace) -> Iterator[Case | Skipped]:
    """One case for each kind of cache."""
    model = build(options)
    ids = prompt(model, options.batch, options.prompt)
    compared: list[Contender] = []
    for way in options.ways:
        eager = sharing_weights(model)
        try:
            eager.set_experts_implementation(way)
            with torch.no_grad():
                eager(ids)
        except Exception as error:  # a way may need another device, another dtype or a package
            reason = str(error).strip().partition("\n")[0]
            yield Skipped(f"{options.size}, experts_implementation {way}", reason)
            continue
        compared += [Contender(f"eager {way}", eager), *compiled(options.peers, eager, f"{way} ")]
    compared.append(optimized(options, model))
    for cache in options.cache:
        name = title(options, model, f"{model.config.num_experts} experts", f"batch {options.batch}", cache)
        yield token_case(name, Call(ids, options.tokens, cache), compared)


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__)
    options.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    options.add_argument("--tokens", type=int, default=32, help="tokens decoded in one sample (default 32)")
    options.add_argument("--cache", nargs="+", choices=CACHES, default=["StaticCache"], help="default static")
    options.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default all")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("decoding with experts", parser(), lambda options: [DTYPES[options.dtype]], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
