"""`generate()` with a clock and, if asked, with dictated tokens: what measurements and judgements run."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

__all__ = ["Generated", "ReplayTokens", "TokenClock", "generate"]


class TokenClock(BaseStreamer):
    """Notes when `generate()` has each token: the prompt is handed over first, then one token at a time.

    Tokens are handed over on the host, so that what an accelerator had to do for them is over.
    """

    def __init__(self, label: str | None = None, total: int = 0) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []
        # A bar costs time between tokens; it is for calls that compile and are not measured per token.
        self.bar = (
            tqdm(total=total, desc=f"  {label}", unit="token", leave=False, disable=None) if label else None
        )

    def put(self, value: Tensor) -> None:
        """Note the time of a token."""
        self.times.append(time.perf_counter())
        if self.bar is not None and len(self.times) > 1:
            self.bar.update()

    def end(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    @property
    def first_token_seconds(self) -> float:
        """From the call to the first token."""
        return self.times[1] - self.start

    @property
    def prompt_seconds(self) -> float:
        """From the hand-over of the prompt to the first token."""
        return self.times[1] - self.times[0]

    @property
    def token_seconds(self) -> list[float]:
        """From each token to the next."""
        return [later - earlier for earlier, later in zip(self.times[1:], self.times[2:], strict=False)]

    @property
    def seconds_per_token(self) -> float:
        """The mean of `token_seconds`: prompt and first token are left out."""
        return statistics.fmean(self.token_seconds)

    @property
    def total_seconds(self) -> float:
        """From the hand-over of the prompt to the last token."""
        return self.times[-1] - self.times[0]


class ReplayTokens(LogitsProcessor):
    """Makes `generate()` choose given tokens [B, T], so that two models see the same input at every step."""

    def __init__(self, tokens: Tensor, prompt_tokens: int) -> None:
        self.tokens = tokens
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Leave only the next token a finite score."""
        step = input_ids.shape[1] - self.prompt_tokens
        return torch.full_like(scores, -math.inf).scatter_(1, self.tokens[:, step : step + 1], 0.0)


@dataclass
class Generated:
    """One call of `generate()`.

    Attributes:
        tokens: the new ones, [B, T]. logits: [T, B, V] as the model gave them; empty unless asked for.
        clock: when each token was there.
    """

    tokens: Tensor
    logits: Tensor
    clock: TokenClock


def generate(
    model: Any,
    prompt: Tensor,
    tokens: int,
    *,
    logits: bool = False,
    replay: Tensor | None = None,
    label: str | None = None,
    **settings: Any,
) -> Generated:
    """`model.generate()` with its defaults, greedy, exactly `tokens` new tokens after `prompt` [B, S].

    Args:
        replay: tokens [B, T] that are chosen whatever the model says.
        label: shows a bar of that name while it runs.
        settings: passed on to `generate()`.
    """
    processors = [] if replay is None else [ReplayTokens(replay, prompt.shape[1])]
    clock = TokenClock(label, tokens)
    output: Any = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        logits_processor=processors,
        streamer=clock,
        return_dict_in_generate=True,
        output_logits=logits,
        **settings,
    )
    kept = torch.stack(output.logits) if logits else torch.empty(0)
    return Generated(output.sequences[:, prompt.shape[1] :], kept, clock)
