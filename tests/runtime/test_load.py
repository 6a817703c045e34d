"""Weights of every layout loaded into plain and optimised models, and refused without a trace."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fxfuse
from fxfuse.errors import CheckpointError, PlanError, UnsupportedModelError
from fxfuse.runtime.convert import convert

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


def test_what_is_asked_wrongly_is_refused(make_model: Make, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(PlanError, match="layout 'sideways' is not known"):
        fxfuse.load_state_dict(model, model.state_dict(), layout="sideways")
    with pytest.raises(PlanError, match="none of the plan's"):
        fxfuse.load_state_dict(model, model.state_dict(), layout="fused")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index"):
        fxfuse.load_state_dict(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        fxfuse.load_state_dict(model.to("meta"), {})
