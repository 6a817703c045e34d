"""The models that benchmarks compare: one as it is, others of the same weights compiled by torch, and ours.

Weights are random, shapes are those of the published models, or `tiny` for trying a benchmark in seconds.
"""

import argparse
import copy
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Case, Peer, arguments
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM

import fxfuse
from fxfuse.errors import VerificationError
from fxfuse.runtime.shapes import SIZES as PUBLISHED
from fxfuse.runtime.shapes import text_config
from fxfuse.testing import assert_equivalent
from fxfuse.testing.oracles import default_slack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NARROW: dict[str, Any] = {
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "hidden_size": 64,
    "vocab_size": 256,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
TINY = {**NARROW, "intermediate_size": 96}
SIZES = ("tiny", *PUBLISHED)
# What a user has beside eager, as arguments of torch.compile.
PEERS: dict[str, dict[str, Any]] = {
    "torch.compile": {},
    "freezing": {"options": {"freezing": True}},
    "max-autotune": {"mode": "max-autotune"},
    "reduce-overhead": {"mode": "reduce-overhead"},
}

Model = Any  # a transformers model: its class types every attribute as a tensor or a module


@dataclass(frozen=True)
class Contender:
    """A model by the name that it has in the table.

    Attributes:
        ours: our compiled graphs have to run in it. matching: and something has to be matched in them, or
            they do not count as fused code.
    """

    name: str
    model: Model
    ours: bool = False
    matching: bool = True

    def calls(self) -> int:
        """How often fused code has run."""
        report = self.model.optimization_report
        return int(report.calls) if report.matched or not self.matching else 0

    @property
    def fused_calls(self) -> Callable[[], int] | None:
        return self.calls if self.ours else None


Function = Callable[[Tensor], Any]


def model_arguments(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, and those of the models."""
    options = arguments(description)
    options.add_argument("--size", choices=SIZES, default="small", help="widths of the model (default small)")
    options.add_argument("--layers", type=int, help="number of layers (default: that of the size)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    options.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    options.add_argument(
        "--peers", nargs="*", choices=PEERS, default=["torch.compile"], help="beside eager and fxfuse"
    )
    options.add_argument("--inner", default="inductor", help="what compiles our graph (default inductor)")
    options.add_argument("--mode", help="mode of torch.compile for our graph, such as reduce-overhead")
    options.set_defaults(**defaults)
    return options


def config(size: str, layers: int | None = None) -> Any:
    """The configuration of one of `SIZES`."""
    depth = {} if layers is None else {"num_hidden_layers": layers}
    if size != "tiny":
        return text_config(size, **depth)
    return narrow_rope(text_config("small", **{**TINY, **depth}))


def narrow_rope(narrow: Any) -> Any:
    """A configuration of `NARROW` heads, whose sections of the rotary embedding now fit them."""
    narrow.rope_parameters["mrope_section"] = [2, 1, 1]
    return narrow


def build(options: argparse.Namespace, layers: int | None = None, device: str | None = None) -> Model:
    """A model of the options with random weights, the same ones every time; on meta, only its shapes."""
    # Every length and kind of cache is a graph of its own: at torch's limit a peer would silently run eager.
    torch._dynamo.config.recompile_limit = 64
    torch.manual_seed(0)
    shape = config(options.size, options.layers if layers is None else layers)
    with torch.device(device or options.device):
        return Qwen3_5ForCausalLM._from_config(shape, dtype=DTYPES[options.dtype]).eval()


def contenders(options: argparse.Namespace, eager: Model, matching: bool = True) -> list[Contender]:
    """The model as it is, the peers of the options, and ours."""
    ours = optimized(options, eager, matching=matching)
    return [Contender("eager", eager), *compiled(options.peers, eager), ours]


def compiled(peers: Sequence[str], eager: Model, prefix: str = "") -> list[Contender]:
    """Models over the same parameters that torch compiles."""
    found = []
    for name in peers:
        model = sharing_weights(eager)
        model.compile(**PEERS[name])
        found.append(Contender(prefix + name, model))
    return found


def optimized(
    options: argparse.Namespace,
    eager: Model,
    name: str = "fxfuse",
    passes: Any = "default",
    matching: bool = True,
) -> Contender:
    """Ours, with weights of its own, which packing would move for all; stacks of experts it leaves alone."""
    stacks = [p for name, p in eager.named_parameters() if ".experts." in name]
    model = copy.deepcopy(eager, {id(stack): stack for stack in stacks})
    fxfuse.optimize(model, inner=options.inner, mode=options.mode, passes=passes, report="off")
    return Contender(name, model, True, matching)


def sharing_weights(model: Model) -> Model:
    """Another model over the same parameters: compiled by itself, without a second copy of the weights."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def title(options: argparse.Namespace, eager: Model, *more: str) -> str:
    """The name of a case: size, dtype, layers, and what else there is."""
    return ", ".join([f"{options.size} {options.dtype}", f"{eager.config.num_hidden_layers} layers", *more])


def case_of(name: str, contenders: Sequence[Contender], peers: Sequence[Peer], **more: Any) -> Case:
    """A case in which ours are compared with all others."""
    more.setdefault("baselines", tuple(each.name for each in contenders if not each.ours))
    return Case(name, tuple(peers), dtype=contenders[0].model.dtype, **more)


class _Widened(nn.Module):
    """A module that computes with its weights in a wider dtype, which it has only as long as that takes."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = [module], dtype  # in a list: no submodule, whose weights `to` would cast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = self.module
        weights = {name: weight.to(self.dtype) for name, weight in module.named_parameters()}
        return torch.func.functional_call(module, weights, args, kwargs)


def widened(model: Model, dtype: torch.dtype) -> Model:
    """A copy in a wider dtype; stacks of experts, most of a model's memory, are cast one by one in use."""
    gc.collect()  # the copy before this one, which refers to itself
    stacks = [module for name, module in model.named_modules() if name.endswith(".experts")]
    return copy.deepcopy(model, {id(stack): _Widened(stack, dtype) for stack in stacks}).to(dtype)


def right(
    reference: Contender,
    candidate: Contender,
    function: Callable[[Contender], Function],
    ids: Tensor,
    grad: bool = False,
) -> bool:
    """Whether what `function` makes of the candidate has no larger error on `ids` than the reference's own.

    Both errors are against the reference's model in a wider dtype. What differs is said on stderr.
    """
    if candidate is reference:
        return True
    model = reference.model
    wide = torch.float64 if model.dtype == torch.float32 else torch.float32
    try:
        assert_equivalent(
            function(reference),
            function(candidate),
            ids,
            dtype=wide,
            high_precision=function(replace(reference, model=widened(model, wide))),
            slack=default_slack(model.config.hidden_size),
            grad=grad,
        )
    except VerificationError as error:
        print(f"{candidate.name}: {error}", file=sys.stderr)
        return False
    return True


def bytes_per_token(model: Model, batch: int = 1) -> float:
    """Bytes of the weights that one step reads: no embedding table that is not the head as well, and of the
    experts those that are chosen, all of them different ones."""
    return sum(parameter.nbytes * min(1.0, batch * share) for _, parameter, share in _read(model))


def flops_per_token(model: Model, batch: int = 1) -> float:
    """Operations of one step's matrix products with weights: two for each weight in use and sequence."""
    return 2 * batch * sum(p.numel() * share for name, p, share in _read(model) if _in_product(name, p))


def _in_product(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 or ".experts." in name


def _read(model: Model) -> Iterator[tuple[str, Tensor, float]]:
    """Names and parameters that a step reads, and which part of each one sequence needs."""
    table = None if model.config.tie_word_embeddings else model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if parameter is not table:
            experts = ".experts." in name
            yield name, parameter, model.config.num_experts_per_tok / len(parameter) if experts else 1.0


def flops_of_prompt(model: Model, batch: int, length: int) -> float:
    """Operations of a prompt whose last token alone has logits: weights, causal attention, delta rule."""
    shape = model.config
    head = 2 * model.get_output_embeddings().weight.numel()
    attention = 2 * length**2 * shape.num_attention_heads * shape.head_dim  # two products, half of each
    state = shape.linear_key_head_dim * shape.linear_value_head_dim
    rule = 6 * length * shape.linear_num_value_heads * state  # read, write and read again
    full = shape.layer_types.count("full_attention")
    mixers = full * attention + (len(shape.layer_types) - full) * rule
    return batch * (length * (flops_per_token(model) - head) + head + mixers)
