"""Time per decoded token through `model.generate()`: eager, torch.compile and fxfuse, with both caches.

Weights are random, shapes are those of the published models. A sample is one call of `generate` on a short
prompt; its time per token runs from the first new token to the last, so that the prompt and what happens
once are left out. Outputs are checked through `generate` as well: in fp32 the greedy tokens are eager's;
below, the logits along a given continuation have no larger error against an fp32 run than eager's own
(`fxfuse.testing`).
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Case, Peer, arguments, run, synchronize
from torch import Tensor
from transformers import LogitsProcessor, Qwen3_5ForCausalLM
from transformers.generation.streamers import BaseStreamer

import fxfuse
from fxfuse.errors import VerificationError
from fxfuse.runtime.shapes import SIZES, text_config
from fxfuse.testing import assert_equivalent
from fxfuse.testing.oracles import default_slack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CACHES: dict[str, dict[str, Any]] = {"DynamicCache": {}, "StaticCache": {"cache_implementation": "static"}}
CHECKED_STEPS = 8

Model = Any  # a transformers model: its class types every attribute as a tensor or a module
Generate = Callable[..., Any]


class Stopwatch(BaseStreamer):
    """Notes when each token is ready on the host; the prompt is the first thing that generate() puts."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds_per_token(self) -> float:
        decoded = self.times[1:]
        return (decoded[-1] - decoded[0]) / (len(decoded) - 1)


class Forced(LogitsProcessor):
    """Makes generate() continue with given tokens [B, T], so that two models see the same sequence."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens = tokens
        self.prompt = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        return torch.full_like(scores, -torch.inf).scatter_(1, self.tokens[:, step : step + 1], 0.0)


def forced_logits(generate: Generate, ids: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Logits [T, B, V] of each step while generate() continues `ids` [B, S] with `tokens` [B, T]."""
    output = generate(
        ids,
        max_new_tokens=tokens.shape[1],
        logits_processor=[Forced(tokens, ids.shape[1])],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return {"logits": torch.stack(output.logits)}


def sharing_weights(model: Model) -> Model:
    """Another model over the same parameters: compiled by itself, without a second copy of the weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def bytes_per_token(model: Model) -> int:
    """Bytes of the weights that one step reads: all but an embedding table that is not the head as well."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    return total if model.config.tie_word_embeddings else total - model.get_input_embeddings().weight.nbytes


def flops_per_token(model: Model, batch: int) -> int:
    """Operations of one step's matrix products with weights: two for each weight and sequence."""
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    tied = model.config.tie_word_embeddings
    return 2 * batch * (matrices if tied else matrices - model.get_input_embeddings().weight.numel())


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One case for each kind of cache."""
    # Every length and both caches are a graph of their own: at torch's limit a peer would silently run eager.
    torch._dynamo.config.recompile_limit = 64
    dtype = DTYPES[options.dtype]
    overrides = {} if options.layers is None else {"num_hidden_layers": options.layers}
    torch.manual_seed(0)
    config = text_config(options.size, **overrides)
    eager = Qwen3_5ForCausalLM._from_config(config, dtype=dtype).to(options.device).eval()
    compiled = sharing_weights(eager)
    compiled.compile()
    fused = fxfuse.optimize(copy.deepcopy(eager))  # packing would move the weights of the others
    ids = torch.randint(config.vocab_size, (options.batch, options.prompt), device=options.device)
    for cache in options.cache:
        yield _case(options, cache, ids, {"eager": eager, "torch.compile": compiled, "fxfuse": fused})


def _case(options: argparse.Namespace, cache: str, ids: Tensor, models: dict[str, Model]) -> Case:
    def generate(model: Model, ids: Tensor, **more: Any) -> Any:
        # Over a static cache transformers compiles by itself on some devices; the baselines are as named.
        own = {} if model is models["fxfuse"] else {"disable_compile": True}
        mask = torch.ones_like(ids)
        settings = {"max_new_tokens": options.tokens, "do_sample": False, "attention_mask": mask}
        return model.generate(ids, **{**settings, **CACHES[cache], **own, **more})

    def sample(model: Model) -> Callable[[], float]:
        def seconds() -> float:
            watch = Stopwatch(options.device)
            generate(model, ids, streamer=watch)
            return watch.seconds_per_token()

        return seconds

    def matched(name: str) -> Callable[[], bool]:
        def check() -> bool:
            if name == "eager":
                return True
            return _matches(models["eager"], models[name], generate, ids, f"{cache}, {name}")

        return check

    def fused_calls() -> int:
        report = models["fxfuse"].optimization_report
        return report.calls if report.matched else 0

    batch = f", batch {options.batch}" if options.batch > 1 else ""
    eager = models["eager"]
    return Case(
        name=f"{options.size} {options.dtype}, {eager.config.num_hidden_layers} layers{batch}, {cache}",
        peers=tuple(
            Peer(name, sample(model), matched(name), fused_calls if name == "fxfuse" else None)
            for name, model in models.items()
        ),
        baselines=("eager", "torch.compile"),
        unit="token",
        bytes=bytes_per_token(eager),
        flops=flops_per_token(eager, options.batch),
        dtype=eager.dtype,
    )


def _matches(eager: Model, candidate: Model, generate: Generate, ids: Tensor, name: str) -> bool:
    """Whether the candidate generates what eager does; says on stderr what differs."""
    if eager.dtype == torch.float32:
        expected, got = generate(eager, ids), generate(candidate, ids)
        if torch.equal(expected, got):
            return True
        print(f"{name}: {int((expected != got).sum())} tokens differ from eager's", file=sys.stderr)
        return False
    tokens = torch.randint(
        eager.config.vocab_size, (len(ids), CHECKED_STEPS), generator=torch.Generator().manual_seed(1)
    ).to(ids.device)

    def logits(model: Model) -> Callable[[Tensor], dict[str, Tensor]]:
        return lambda ids: forced_logits(lambda *args, **more: generate(model, *args, **more), ids, tokens)

    try:
        assert_equivalent(
            logits(eager),
            logits(candidate),
            ids,
            dtype=torch.float32,
            high_precision=logits(copy.deepcopy(eager).float()),
            slack=default_slack(eager.config.hidden_size),
        )
    except VerificationError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return False
    return True


def parser() -> argparse.ArgumentParser:
    options = arguments(__doc__)
    options.add_argument("--size", choices=SIZES, default="small", help="widths of the model (default small)")
    options.add_argument("--layers", type=int, help="number of layers (default: that of the size)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    options.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    options.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    options.add_argument("--tokens", type=int, default=32, help="tokens decoded in one sample (default 32)")
    options.add_argument("--cache", nargs="+", choices=CACHES, default=list(CACHES), help="default both")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time per decoded token", parser(), lambda options: [DTYPES[options.dtype]], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
