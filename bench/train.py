"""Time of a training step, of all weights and of LoRA adapters: forward, backward and optimizer.

The optimizer's rate is 0: a step costs what it always does, and every contender keeps the weights on which
the gradients are compared afterwards (`models.right`). With trained weights the passes that merge
weights decline, so for the full step it counts that our graphs ran, whatever was matched in them.
"""

import argparse
import copy
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from generation import prompt
from harness import Case, Peer, Skipped, run, timed
from models import (
    DTYPES,
    Contender,
    Function,
    Model,
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

COMPARED = 2**20  # elements of each gradient, evenly spaced


def cases(options: argparse.Namespace) -> Iterator[Case | Skipped]:
    """A full step, and a step of LoRA where peft is installed."""
    eager = build(options).train()
    ids = prompt(eager, options.batch, options.prompt)
    name = title(options, eager, f"batch {options.batch} x {options.prompt}")
    if "full" in options.what:
        yield _case(f"{name}, full step", ids, contenders(options, eager, matching=False), times=3)
    if "lora" in options.what:
        if importlib.util.find_spec("peft") is None:
            yield Skipped(f"{name}, LoRA step", "peft is not installed: pip install peft")
            return
        yield _case(f"{name}, LoRA step", ids, contenders(options, with_lora(eager)), times=2)


def with_lora(model: Model) -> Model:
    """The model with adapters on every linear, none of which starts as nothing."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model), settings).train()


def _case(name: str, ids: Tensor, compared: Sequence[Contender], times: int) -> Case:
    """One step. The backward of a product is two more, of which a frozen weight needs one: `times` in all."""
    model, (batch, length) = compared[0].model, ids.shape
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def peer(contender: Contender) -> Peer:
        weights = [p for p in contender.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=0.0)

        def step() -> None:
            _loss(contender, ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        return Peer(
            contender.name,
            timed(step, ids.device.type),
            lambda: right(compared[0], contender, _gradients, ids, grad=True),
            contender.fused_calls,
            lambda: {"M trained": trained / 1e6},
        )

    return case_of(
        name,
        compared,
        [peer(contender) for contender in compared],
        unit="step",
        bytes=times * bytes_per_token(_base(model), batch * length),
        flops=times * flops_of_prompt(_base(model), batch, length),
    )


def _base(model: Model) -> Model:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _loss(contender: Contender, ids: Tensor) -> Any:
    return contender.model(input_ids=ids, labels=ids, use_cache=False).loss


def _gradients(contender: Contender) -> Function:
    """The gradients of all trained weights as one vector: of large ones a part, for errors take float64."""

    def function(ids: Tensor) -> dict[str, Tensor]:
        weights = [p for p in contender.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(_loss(contender, ids), weights)
        return {"gradients": torch.cat([_part(gradient.flatten()) for gradient in gradients])}

    return function


def _part(gradient: Tensor) -> Tensor:
    return gradient[:: gradient.numel() // COMPARED | 1]  # odd: of every column


def parser() -> argparse.ArgumentParser:
    options = model_arguments(__doc__)
    options.add_argument("--prompt", type=int, default=64, help="tokens of a sequence (default 64)")
    options.add_argument("--what", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    return options


def main(argv: list[str] | None = None) -> int:
    return run("time of a training step", parser(), lambda options: [DTYPES[options.dtype]], cases, argv)


if __name__ == "__main__":
    raise SystemExit(main())
