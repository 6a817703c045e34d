"""Calls of `model.generate()` as cases: the same prompt and number of tokens for every contender.

Outputs are checked through `generate` as well: the logits along given tokens have no larger error against a
run in a wider dtype than those of the first contender (`models.right`), and in fp32 the greedy tokens are
equal.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Case, Peer
from models import (
    Contender,
    Function,
    Model,
    bytes_per_token,
    case_of,
    flops_of_prompt,
    flops_per_token,
    right,
)
from torch import Tensor

from fxfuse.runtime.generation import Generated, TokenClock, generate

CACHES: dict[str, dict[str, Any]] = {"DynamicCache": {}, "StaticCache": {"cache_implementation": "static"}}
CHECKED_STEPS = 8


def prompt(model: Model, batch: int, length: int) -> Tensor:
    """Token ids [B, S], the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


@dataclass(frozen=True)
class Call:
    """One call of generate(): prompt `ids` [B, S], how many new tokens, the kind of cache."""

    ids: Tensor
    tokens: int
    cache: str

    def run(self, contender: Contender, tokens: int | None = None, **more: Any) -> Generated:
        # Over a static cache transformers compiles by itself on some devices; the baselines are as named.
        own = {} if contender.ours else {"disable_compile": True}
        settings = {"attention_mask": torch.ones_like(self.ids), **CACHES[self.cache], **own}
        return generate(contender.model, self.ids, tokens or self.tokens, **settings, **more)

    def right(self, reference: Contender, candidate: Contender) -> bool:
        """Whether the candidate generates what the reference does; says on stderr what differs."""
        if reference.model.dtype == torch.float32:
            wrong = int((self.run(reference).tokens != self.run(candidate).tokens).sum())
            if wrong:
                print(f"{self.cache}, {candidate.name}: {wrong} tokens differ", file=sys.stderr)
                return False
        # Greedy tokens alone say little of random weights: most of them repeat themselves.
        forced = torch.randint(
            reference.model.config.vocab_size,
            (len(self.ids), CHECKED_STEPS),
            generator=torch.Generator().manual_seed(1),
        ).to(self.ids.device)

        def logits(contender: Contender) -> Function:
            return lambda ids: {
                "logits": self.run(contender, CHECKED_STEPS, logits=True, replay=forced).logits
            }

        return right(reference, candidate, logits, self.ids)


def token_case(name: str, call: Call, contenders: Sequence[Contender], **more: Any) -> Case:
    """Time per token, from the first new one to the last: the prompt and what happens once are left out."""
    model, batch = contenders[0].model, len(call.ids)
    peers = [
        _peer(call, contenders[0], each, lambda clock: clock.seconds_per_token, None) for each in contenders
    ]
    limits = {"bytes": bytes_per_token(model, batch), "flops": flops_per_token(model, batch)}
    return case_of(name, contenders, peers, unit="token", **limits, **more)


def call_case(name: str, call: Call, contenders: Sequence[Contender]) -> Case:
    """Time of the whole call, with time to the first token (TTFT), time per output token and tokens/s."""
    model, (batch, length) = contenders[0].model, call.ids.shape

    def figures(clocks: Sequence[TokenClock]) -> dict[str, float]:
        def median(of: Callable[[TokenClock], float]) -> float:
            return statistics.median(map(of, clocks))

        return {
            "TTFT ms": median(lambda clock: clock.first_token_seconds) * 1e3,
            "ms/token": median(lambda clock: clock.seconds_per_token) * 1e3,
            "tokens/s": median(lambda clock: batch * call.tokens / (clock.times[-1] - clock.start)),
        }

    peers = [
        _peer(call, contenders[0], each, lambda clock: clock.times[-1] - clock.start, figures)
        for each in contenders
    ]
    steps = call.tokens - 1
    limits = {
        "bytes": call.tokens * bytes_per_token(model, batch),
        "flops": flops_of_prompt(model, batch, length) + steps * flops_per_token(model, batch),
    }
    return case_of(name, contenders, peers, unit="call", **limits)


def _peer(
    call: Call,
    reference: Contender,
    contender: Contender,
    seconds: Callable[[TokenClock], float],
    figures: Callable[[Sequence[TokenClock]], dict[str, float]] | None,
) -> Peer:
    clocks: list[TokenClock] = []

    def sample() -> float:
        clocks.append(call.run(contender).clock)
        return seconds(clocks[-1])

    return Peer(
        contender.name,
        sample,
        lambda: call.right(reference, contender),
        contender.fused_calls,
        # The first call compiles, and is no sample of anything else.
        lambda: figures(clocks[1:] or clocks) if figures else {},
    )
