"""Time of a prompt: one forward that fills a fresh cache and computes the logits of the last token.

The share of the matrix product rate counts weights, causal attention and the delta rule
(`models.flops_of_prompt`).
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from generation import prompt
from harness import Case, Peer, run, timed
from models import (
    DTYPES,
    Contender,
    Function,
    build,
    bytes_per_token,
    case_of,
    contenders,
    flops_of_prompt,
    model_arguments,
    right,
    title,
)
from torch import Tensor

CHECKED = 8  # logits of that many last tokens are compared


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One case for each length."""
    eager = build(options)
    compared = contenders(options, eager)
    for length in options.prompt or ([16, 80] if options.size == "tiny" else [1024, 4096]):
        yield prompt_case(
            title(options, eager, f"prompt {length}"), prompt(eager, options.batch, length), compared
        )


def prompt_case(name: str, ids: Tensor, compared: Sequence[Contender], **more: Any) -> Case:
    """One forward over `ids` [B, T]."""
    model, (batch, length) = compared[0].model, ids.shape

    def peer(contender: Contender) -> Peer:
        sample = timed(lambda: last_logits(contender, 1)(ids), ids.device.type)
        return Peer(
            contender.name,
            sample,
            lambda: right(compared[0], contender, lambda each: last_logits(each, CHECKED), ids),
            contender.fused_calls,
        )

    peers = [peer(contender) for contender in compared]
    limits = {"bytes": bytes_per_token(model, batch * length), "flops": flops_of_prompt(model, batch, length)}
    return case_of(name, compared, peers, unit="prompt", **limits, **more)


def last_logits(contender: Contender, count: int) -> Function:
    """A forward without gradients that computes the logits of the last `count` tokens."""

    def logits(ids: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": contender.model(input_ids=ids, use_cache=True, logits_to_keep=count).logits}

    return logits


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__)
    options.add_argument("--prompt", type=int, nargs="+", help="tokens (default 1024 and 4096)")
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time of a prompt", parser(), lambda options: [DTYPES[options.dtype]], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
