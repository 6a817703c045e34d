"""Checkpoints quantised by the libraries themselves, through transformers: bitsandbytes, torchao, GPTQ-Model.

Needs these libraries: `make test-extras` has an environment with them. transformers' float8 linears have
kernels for GPUs alone; tests/daily/test_models.py has a stand-in for them.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import fxfuse

Make = Callable[..., Any]
# As published quantised checkpoints have it: the small projections and the head stay as they are.
PLAIN = ["model.layers.0.linear_attn.in_proj_b", "model.layers.0.linear_attn.in_proj_a", "lm_head"]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
WIDE = {"hidden_size": 128, "intermediate_size": 128}  # what 4 bits on a CPU can be packed in


def library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-extras has it")


def eight_bits() -> Any:
    library("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=PLAIN)


def four_bits() -> Any:
    library("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, llm_int8_skip_modules=PLAIN, bnb_4bit_compute_dtype=torch.float32
    )


def int8_weights() -> Any:
    library("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=PLAIN)


def loaded_twice(make_model: Make, settings: Any, folder: Path) -> tuple[Any, Any]:
    make_model(**WIDE).save_pretrained(folder)
    how = {"quantization_config": settings, "device_map": {"": "cpu"}}
    first, second = (AutoModelForCausalLM.from_pretrained(folder, **how).eval() for _ in range(2))
    return first, second


@pytest.mark.parametrize(("config", "kind"), [(eight_bits, "Linear8bitLt"), (four_bits, "Linear4bit")])
def test_a_quantised_model_keeps_its_tokens_and_its_linears_and_the_rest_is_merged(
    make_model: Make, prompt: Tensor, tmp_path: Path, config: Callable[[], Any], kind: str
) -> None:
    plain, model = loaded_twice(make_model, config(), tmp_path)
    expected = plain.generate(prompt, **GREEDY)
    assert torch.equal(fxfuse.optimize(model, inner="eager").generate(prompt, **GREEDY), expected)
    report = model.optimization_report
    merged = {m.where for g in report.graphs for o in g.outcomes.values() for m in o.matches}
    assert merged == {"model.layers.0.linear_attn.in_proj_b_a"} and not report.failures
    (note,) = [note for note in report.notes if note.startswith("quantised")]
    assert kind in note and "model.layers.{0..1}.mlp.up_proj" in note and "in_proj_b" not in note
    assert sum("nothing matched" in note for note in report.notes) <= 2


def test_a_model_of_torchao_runs_as_it_was_and_says_why(
    make_model: Make, prompt: Tensor, tmp_path: Path
) -> None:
    """Its weights are tensor subclasses: a trace would keep their parts as constants."""
    plain, model = loaded_twice(make_model, int8_weights(), tmp_path)
    expected = plain.generate(prompt, **GREEDY)
    assert torch.equal(fxfuse.optimize(model, inner="eager").generate(prompt, **GREEDY), expected)
    report = model.optimization_report
    assert report.matched == 0 and any("tensor subclass Int8Tensor" in note for note in report.notes)
    with pytest.raises(fxfuse.UnsupportedModelError, match="Int8Tensor"):
        model.deoptimize().optimize(inner="eager", strict=True)


def test_linears_of_gptq_model_keep_their_tokens_and_the_rest_is_merged(
    make_model: Make, prompt: Tensor
) -> None:
    """Packed by the library's own layer, and computed by its torch kernel."""
    library("gptqmodel")
    kernels = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    kind = getattr(kernels, "TorchLinear", None) or kernels.TorchQuantLinear

    def quantised() -> Any:
        model = make_model(**WIDE)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name not in PLAIN:
                model.set_submodule(name, _packed(kind, module))
        return model

    plain, model = quantised(), fxfuse.optimize(quantised(), inner="eager")
    assert torch.equal(model.generate(prompt, **GREEDY), plain.generate(prompt, **GREEDY))
    report = model.optimization_report
    merged = {m.where for g in report.graphs for o in g.outcomes.values() for m in o.matches}
    assert merged == {"model.layers.0.linear_attn.in_proj_b_a"} and not report.failures
    (note,) = [note for note in report.notes if note.startswith("quantised")]
    assert "model.layers.{0..1}.mlp.up_proj" in note


def _packed(kind: Any, linear: torch.nn.Linear, bits: int = 4, group: int = 32) -> Any:
    out, width = linear.weight.shape
    grouped = linear.weight.detach().reshape(out, width // group, group)
    low, high = grouped.amin(-1), grouped.amax(-1)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zeros = (-low / scales).round()
    layer = kind(
        bits=bits,
        group_size=group,
        sym=False,
        desc_act=False,
        in_features=width,
        out_features=out,
        bias=False,
        pack_dtype=torch.int32,
    )
    index = torch.arange(width, dtype=torch.int32) // group
    layer.pack(linear, scales, zeros, index)
    layer.post_init()
    return layer.eval()
