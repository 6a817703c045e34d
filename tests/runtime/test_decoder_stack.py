"""The decoder stack and its model through wrappers of every kind, real ones where torch has them."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3_5Config, Qwen3_5ForConditionalGeneration

import fxfuse
from fxfuse.errors import UnsupportedModelError
from fxfuse.runtime.decoder_stack import ATTRIBUTES, find_decoder, inner_model
from fxfuse.runtime.optimize import is_optimized, optimization_report

Make = Callable[..., Any]


class Holding(nn.Module):
    """A wrapper that keeps a module under one name and passes calls on."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.held = name
        self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(self.held)(*args, **kwargs)


class Adapted(nn.Module):
    """As PEFT replaces a linear: the layer itself, and what was added to it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, layer.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.fixture
def process_group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def peft(model: Any) -> nn.Module:
    """PeftModel around LoraModel around the model, one projection adapted."""
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    return Holding("base_model", Holding("model", model))


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "nothing": lambda model: model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "peft": peft,
    "value head": lambda model: Holding("pretrained_model", model),
    "several": lambda model: Holding("module", torch.compile(Holding("pretrained_model", peft(model)))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_plan_is_that_of_the_model_inside(make_model: Make, wrapper: str) -> None:
    expected = fxfuse.plan(make_model())
    model = make_model()
    wrapped = WRAPPERS[wrapper](model)
    assert fxfuse.plan(wrapped) == expected
    found = find_decoder(wrapped)
    assert found.model is model
    assert found.stack is model.model


def test_ddp_is_looked_through(make_model: Make, process_group: None) -> None:
    model = make_model()
    wrapped = DistributedDataParallel(model)
    assert fxfuse.plan(wrapped) == fxfuse.plan(model)
    assert find_decoder(DistributedDataParallel(Holding("pretrained_model", make_model()))).stack is not None


def test_the_text_part_of_a_two_part_model_is_found() -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 32, "intermediate_size": 16}
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text))
    found = find_decoder(Holding("module", model))
    assert found.model is model
    assert found.stack is model.model.language_model


@pytest.mark.parametrize("wrapper", ["nothing", "torch.compile", "peft", "value head"])
def test_optimize_reaches_the_model_inside_and_deoptimize_too(
    make_model: Make, wrapper: str, prompt: torch.Tensor
) -> None:
    model = make_model()
    wrapped = WRAPPERS[wrapper](model)
    with torch.no_grad():
        expected = model(prompt).logits
        assert fxfuse.optimize(wrapped, inner="eager") is wrapped
        assert is_optimized(model)
        assert is_optimized(wrapped)
        assert torch.allclose(wrapped(prompt).logits, expected, atol=1e-5)
        report = optimization_report(wrapped)
        assert report is not None
        assert report is model.optimization_report
        assert report.calls
        fxfuse.deoptimize(wrapped)
        assert not is_optimized(model)
        assert torch.equal(model(prompt).logits, expected)


def test_cycles_end_and_failure_lists_what_was_tried_and_seen() -> None:
    outer, inner = Holding("module", nn.Linear(2, 2)), Holding("base_model", nn.Linear(2, 2))
    outer.add_module("module", inner)
    inner.add_module("base_model", outer)
    inner.add_module("model", inner)
    inner.add_module("language_model", nn.GELU())
    with pytest.raises(UnsupportedModelError) as caught:
        find_decoder(outer)
    assert all(attribute in str(caught.value) for attribute in ATTRIBUTES)
    assert "in Holding, GELU;" in str(caught.value)
    assert inner_model(outer) is outer


def test_a_model_without_a_decoder_stack_is_refused_with_the_known_architectures() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=8))
    with pytest.raises(UnsupportedModelError, match=r"model_type 'gpt2'; known are: qwen3_5_text, .*mixtral"):
        fxfuse.plan(model)
