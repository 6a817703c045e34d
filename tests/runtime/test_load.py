"""Weights of every layout loaded into plain and optimised models, and refused without a trace."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import fxfuse
from fxfuse.errors import CheckpointError, OptionError, PlanError, UnsupportedModelError
from fxfuse.runtime import streaming
from fxfuse.runtime.convert import convert
from fxfuse.runtime.live_weights import is_packed

Make = Callable[..., Any]
LAYOUTS = ["hf", "fused", "qwen3_next", "sglang", "fastdeploy"]


def save(folder: Path, model: Any, weights: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir()
    model.config.save_pretrained(folder)
    weights = dict(model.state_dict()) if weights is None else weights
    save_file({n: t.clone().contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    return folder


def equal(model: Any, weights: dict[str, torch.Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[n], t) for n, t in weights.items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_tensors_of_any_layout_are_loaded(make_model: Make, layout: str, named: bool, prefix: str) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    weights = {n: t.clone() for n, t in other.state_dict().items()}
    planned = fxfuse.plan(other, layout)
    given = planned.apply(weights) if len(planned) else weights
    given = {n.replace("model.", prefix, 1): t for n, t in reversed(given.items())}
    given["mtp.fc.weight"] = torch.zeros(1)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    fxfuse.load_state_dict(model, given, layout=layout if named else None)
    assert equal(model, weights)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_plan", [True, False])
def test_directories_of_any_layout_are_loaded(
    make_model: Make, layout: str, with_plan: bool, tmp_path: Path
) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    convert(save(tmp_path / "hf", other), tmp_path / "there", layout, shard_bytes=50_000)
    if not with_plan:
        (tmp_path / "there" / "fxfuse_plan.json").unlink(missing_ok=True)
    fxfuse.load_state_dict(model, tmp_path / "there")
    assert equal(model, other.state_dict())


@pytest.mark.parametrize("layout", ["hf", "fused"])
def test_an_optimised_model_computes_with_what_was_loaded_without_packing_again(
    make_model: Make, layout: str, prompt: torch.Tensor, tmp_path: Path
) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    fxfuse.optimize(model, inner="eager")
    with torch.no_grad():
        model(prompt)
        packed = [p.data_ptr() for p in model.parameters()]
        convert(save(tmp_path / "hf", other), tmp_path / "there", layout)
        fxfuse.load_state_dict(model, tmp_path / "there")
        assert [p.data_ptr() for p in model.parameters()] == packed
        plain = copy.deepcopy(model)
        assert torch.allclose(model(prompt).logits, other(prompt).logits, atol=1e-5)
        assert torch.equal(plain(prompt).logits, other(prompt).logits)
    assert [p.data_ptr() for p in model.parameters()] == packed


def test_dtypes_of_the_model_and_strides_stay(make_model: Make, tmp_path: Path) -> None:
    model, other = make_model(seed=0).to(torch.bfloat16), make_model(seed=1)
    turned = model.model.layers[0].mlp.down_proj.weight
    turned.data = turned.data.t().contiguous().t()
    fxfuse.load_state_dict(model, save(tmp_path / "hf", other))
    assert equal(model, {n: t.to(torch.bfloat16) for n, t in other.state_dict().items()})
    assert not turned.is_contiguous()


def test_a_tied_head_is_there_under_either_name(make_model: Make) -> None:
    model, other = make_model(tie_word_embeddings=True), make_model(seed=1, tie_word_embeddings=True)
    weights = other.state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        given = {n: t for n, t in weights.items() if n != name}
        torch.nn.init.zeros_(model.lm_head.weight)
        fxfuse.load_state_dict(model, given)
        assert equal(model, weights)


def test_a_tied_head_with_values_of_its_own_is_refused(make_model: Make, tmp_path: Path) -> None:
    """transformers unties such a model; here one of the two would be lost."""
    model, other = make_model(tie_word_embeddings=True), make_model(seed=1, tie_word_embeddings=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    given = {n: t.clone() for n, t in other.state_dict().items()}
    given["lm_head.weight"][0, 0] += 1
    for source in (given, save(tmp_path / "hf", other, given)):
        with pytest.raises(CheckpointError, match=r"differs from .*, and the model has one tensor for both"):
            fxfuse.load_state_dict(model, source)
        assert equal(model, before)
    given["lm_head.weight"] = given["model.embed_tokens.weight"].double()
    fxfuse.load_state_dict(model, given)
    assert equal(model, other.state_dict())


def test_every_fault_is_listed_and_the_model_is_unchanged(make_model: Make, tmp_path: Path) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    given = dict(other.state_dict())
    del given["model.norm.weight"]
    given["surplus"] = torch.zeros(1)
    given["lm_head.weight"] = torch.zeros(3, 64)
    given["model.language_model.embed_tokens.weight"] = given["model.embed_tokens.weight"].clone()
    messages = [
        "model.norm.weight: missing",
        "surplus: unexpected",
        "lm_head.weight: shape [3, 64], the model needs [300, 64]",
        "embed_tokens.weight: comes twice",
    ]
    for source in (given, save(tmp_path / "hf", other, given)):
        with pytest.raises(CheckpointError) as caught:
            fxfuse.load_state_dict(model, source)
        assert all(message in str(caught.value) for message in messages)
        assert equal(model, before)


@pytest.mark.parametrize("change", [{"surplus": torch.zeros(1)}, {"model.norm.weight": torch.zeros(63)}])
def test_one_fault_is_enough(make_model: Make, change: dict[str, torch.Tensor]) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=next(iter(change))):
        fxfuse.load_state_dict(model, other.state_dict() | change)
    assert equal(model, before)


def test_tensors_whose_values_cannot_be_had_are_refused_before_the_first_is_copied(make_model: Make) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    weights = dict(other.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    fused = fxfuse.plan(other).apply(weights)
    for given, message in (
        (weights | {name: weights[name].to("meta")}, f"{name}: on the meta device, without values"),
        (weights | {name: weights[name].int()}, f"{name}: dtype int32, the model needs float32"),
        (weights | {name: weights[name].bool()}, f"{name}: dtype bool, the model needs float32"),
        (
            fused | {(gone := next(n for n in fused if "gate_up" in n)): fused[gone].to("meta")},
            f"{gone}: on the meta device, without values",
        ),
    ):
        with pytest.raises(CheckpointError, match="the model is unchanged") as caught:
            fxfuse.load_state_dict(model, given)
        assert message in str(caught.value)
        assert equal(model, before)


@pytest.mark.parametrize("layout", ["hf", "sglang"])
def test_one_file_without_a_config_is_enough(make_model: Make, layout: str, tmp_path: Path) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    convert(save(tmp_path / "hf", other), tmp_path / "there", layout)
    fxfuse.load_state_dict(model, tmp_path / "there" / "model.safetensors")
    assert equal(model, other.state_dict())


def test_other_floats_are_rounded(make_model: Make) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    given = {n: t.to(torch.bfloat16) for n, t in other.state_dict().items()}
    fxfuse.load_state_dict(model, given)
    assert equal(model, {n: t.float() for n, t in given.items()})


def test_what_is_asked_wrongly_is_refused(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(PlanError, match="layout 'sideways' is not known"):
        fxfuse.load_state_dict(model, model.state_dict(), layout="sideways")
    with pytest.raises(PlanError, match="none of the plan's"):
        fxfuse.load_state_dict(model, model.state_dict(), layout="fused")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index"):
        fxfuse.load_state_dict(model, tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: not a directory"):
        fxfuse.load_state_dict(model, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="a, b: no tensors"):
        fxfuse.load_state_dict(model, {"a": 3, "b": "x"})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"3, None: names that are no strings"):
        fxfuse.load_state_dict(model, {3: torch.zeros(1), None: torch.zeros(1)})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="the model is unchanged"):
        fxfuse.load_state_dict(model.to("meta"), {})
    assert all(p.is_meta for p in model.parameters())


def test_a_layout_is_checked_where_a_plan_says_it_too(make_model: Make, tmp_path: Path) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    convert(save(tmp_path / "hf", other), tmp_path / "there", "sglang")
    with pytest.raises(PlanError, match="layout 'sideways' is not known"):
        fxfuse.load_state_dict(model, tmp_path / "there", layout="sideways")
    assert equal(model, before)
    fxfuse.load_state_dict(model, tmp_path / "there", layout="sglang")
    assert equal(model, other.state_dict())


# --- models without memory


def recipe() -> str:
    """The code of the how-to, as it is printed there."""
    text = (Path(__file__).parents[2] / "docs" / "how-to-load.md").read_text()
    return text.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("layout", ["hf", "fused", "sglang"])
def test_the_printed_recipe_loads_straight_into_packed_memory(
    make_model: Make, layout: str, prompt: torch.Tensor, tmp_path: Path
) -> None:
    other = make_model(seed=1)
    convert(save(tmp_path / "hf", other), tmp_path / "there", layout)
    lines = recipe().replace("model.optimize()", 'model.optimize(inner="eager")')
    assert lines != recipe()
    scope: dict[str, Any] = {"folder": tmp_path / "there"}
    exec(lines, scope)
    model = scope["model"]
    assert model.dtype == torch.bfloat16
    bf16 = {n: t.to(torch.bfloat16) for n, t in other.state_dict().items()}
    assert equal(model, bf16)
    groups = [t.sources for t in fxfuse.plan(model).transforms]
    packed = {n for group in groups for n in group}
    parameters = dict(model.named_parameters())
    assert {n for n, p in parameters.items() if is_packed(p)} == packed
    for group in groups:
        ends = [parameters[n].data_ptr() + parameters[n].nbytes for n in group]
        assert ends[:-1] == [parameters[n].data_ptr() for n in group[1:]]
    mlp = [p for n, p in parameters.items() if "mlp" in n]
    before = [p.data_ptr() for p in mlp]
    with torch.no_grad():
        model.eval()(prompt)
        # the compiled graph found them where they were put
        assert [p.data_ptr() for p in mlp] == before
        assert model.optimization_report.calls
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
        assert torch.equal(model.forward(prompt).logits, loaded(prompt).logits)


def test_buffers_that_no_file_has_get_the_values_of_a_loaded_model(make_model: Make, tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", other := make_model(seed=1))
    with torch.device("meta"):
        model = make_model()
    fxfuse.load_state_dict(model, folder)
    expected = dict(other.named_buffers())
    assert expected
    assert all(torch.equal(b, expected[n]) for n, b in model.named_buffers())
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("from_files", [False, True])
def test_memory_on_the_meta_device_is_refused(make_model: Make, from_files: bool, tmp_path: Path) -> None:
    """Weights that a load puts on the meta device are lost without a word."""
    other = make_model(seed=1)
    given = save(tmp_path / "hf", other) if from_files else other.state_dict()
    with torch.device("meta"):
        model = make_model()
        with pytest.raises(OptionError, match="torch's default device, which is meta"):
            fxfuse.load_state_dict(model, given)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    fxfuse.load_state_dict(model, given)
    assert equal(model, other.state_dict())


@pytest.mark.parametrize("from_files", [False, True])
def test_a_model_in_memory_is_loaded_inside_of_a_meta_context(
    make_model: Make, from_files: bool, tmp_path: Path
) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    convert(save(tmp_path / "hf", other), tmp_path / "fused", "fused")
    given = tmp_path / "fused" if from_files else fxfuse.plan(other).apply(other.state_dict())
    turned = model.model.layers[0].mlp.down_proj.weight
    turned.data = turned.data.t().contiguous().t()
    with torch.device("meta"):
        fxfuse.load_state_dict(model, given)
    assert equal(model, other.state_dict())


def test_a_buffer_that_nobody_computes_is_refused_and_the_model_stays_on_meta(
    make_model: Make, tmp_path: Path
) -> None:
    folder = save(tmp_path / "hf", make_model())
    with torch.device("meta"):
        model = make_model()
        model.model.layers[0].mlp.register_buffer("mask", torch.ones(3), persistent=False)
    with pytest.raises(UnsupportedModelError, match=r"mask: a buffer on the meta device .*\(1 in all\)"):
        fxfuse.load_state_dict(model, folder)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_a_file_that_ends_too_early_leaves_a_model_on_meta(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "hf", make_model())
    with torch.device("meta"):
        model = make_model()
    monkeypatch.setattr(streaming.os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends inside of"):
        fxfuse.load_state_dict(model, folder)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_ties_frozen_weights_and_what_has_memory_stay_so(make_model: Make, tmp_path: Path) -> None:
    folder = save(tmp_path / "hf", other := make_model(seed=1, tie_word_embeddings=True))
    with torch.device("meta"):
        model = make_model(tie_word_embeddings=True)
    model.model.layers[0].mlp.gate_proj.requires_grad_(False)
    kept = model.model.norm.weight = torch.nn.Parameter(torch.zeros(64))
    fxfuse.load_state_dict(model, folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight is kept
    assert equal(model, other.state_dict())
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.layers.0.mlp.gate_proj.weight"}


def test_memory_is_that_of_the_weights_and_one_piece(tmp_path: Path) -> None:
    """A fused checkpoint of 0.4 GB; from_pretrained and packing would hold one group more, or all twice."""
    program = """
import sys, torch, fxfuse
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from fxfuse.runtime import streaming
from fxfuse.runtime.convert import convert
from fxfuse.runtime.live_weights import is_packed
config = Qwen3_5TextConfig(hidden_size=1024, intermediate_size=28 * 1024, num_hidden_layers=2, vocab_size=64,
    layer_types=["linear_attention", "full_attention"], tie_word_embeddings=False)
with torch.device("meta"):
    model = Qwen3_5ForCausalLM(config).bfloat16()
if sys.argv[2] == "write":
    from safetensors.torch import save_file
    config.save_pretrained(sys.argv[1])
    fused = fxfuse.plan(model).apply(model.state_dict())
    zeros = {n: torch.zeros(t.shape, dtype=t.dtype) for n, t in fused.items()}
    save_file(zeros, sys.argv[1] + "/model.safetensors")
    sys.exit()
def status(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
open("/proc/self/clear_refs", "w").write("5")  # the peak includes the parent's until it is forgotten
before = status("VmRSS")
fxfuse.load_state_dict(model, sys.argv[1])
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""
    for step in ("write", "load"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), step], capture_output=True, text=True, check=True
        )
    grown, size = map(int, done.stdout.split())
    assert size > 4e8
    assert 0.9 * size < grown < size + 100 * 2**20


# --- wrapped models


def test_the_model_inside_of_wrappers_is_loaded_and_adapters_stay(make_model: Make, tmp_path: Path) -> None:
    class Adapted(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.lora_A = layer, torch.nn.Linear(64, 2)

    model, other = make_model(seed=0), make_model(seed=1)
    attention = model.model.layers[1].self_attn
    attention.q_proj = Adapted(attention.q_proj)
    added = attention.q_proj.lora_A.weight.clone()
    wrapped = torch.nn.ModuleDict({"base_model": torch.nn.ModuleDict({"model": model})})
    fxfuse.load_state_dict(wrapped, save(tmp_path / "hf", other))
    own = {n.replace("base_layer.", ""): t for n, t in model.state_dict().items() if "lora" not in n}
    assert own.keys() == other.state_dict().keys()
    assert all(torch.equal(own[n], t) for n, t in other.state_dict().items())
    assert torch.equal(attention.q_proj.lora_A.weight, added)
