"""`plan` against the linears that a real forward calls, against torch.cat, and on checkpoints."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    LlamaConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
)

from fxfuse.errors import PlanError, UnsupportedModelError
from fxfuse.passes.weights import WeightPlan
from fxfuse.runtime.plan import _STEPS, LAYOUTS, plan
from fxfuse.runtime.shapes import text_config

KINDS = ["dense", "dense with biases", "moe", "next"]


class LinearCalls(TorchFunctionMode):
    """Inputs and parameters of every F.linear, in order; inputs are held, so that no address comes twice."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.nn.functional.linear:
            self.calls.append((args[0], args[1], args[2] if len(args) > 2 else None))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def merges_seen_in_forward(model: PreTrainedModel) -> set[tuple[str, ...]]:
    """Names of the parameters of the linears that read the same memory, in order of the calls."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    with LinearCalls() as seen:
        model(torch.arange(5)[None], use_cache=False)
    by_input: dict[int, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}
    for x, weight, bias in seen.calls:
        by_input.setdefault(x.data_ptr(), []).append((weight, bias))
    merges = set()
    for group in by_input.values():
        weights, biases = zip(*group, strict=True)
        if len(weights) > 1:
            merges.add(tuple(names[id(w)] for w in weights))
            if all(b is not None for b in biases):
                merges.add(tuple(names[id(b)] for b in biases))
    return merges


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_the_linears_that_read_one_input_in_the_order_of_their_calls(
    narrow: Any, kind: str
) -> None:
    model = narrow.model(kind)
    merges = merges_seen_in_forward(model)
    assert {t.rows.sources for t in plan(model).transforms} == merges
    assert len(merges) == {"dense": 8, "dense with biases": 9, "moe": 8, "next": 8}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_fused_weights_are_the_members_stacked(narrow: Any, kind: str) -> None:
    model = narrow.model(kind).to(torch.bfloat16)
    weights = model.state_dict()
    planned = plan(model)
    fused = planned.apply(weights)
    for transform in planned.transforms:
        expected = torch.cat([weights[name] for name in transform.rows.sources])
        assert torch.equal(fused[transform.target.name], expected)
    back = planned.inverse().apply(fused)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_0_8b_has_the_groups_and_widths_of_the_published_model() -> None:
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(text_config("0.8b")).to(torch.bfloat16)
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for target in plan(model).targets:
        assert target.dtype == "bfloat16"
        shapes.setdefault(target.name.split(".", 3)[3], []).append(target.shape)
    assert shapes == {
        "linear_attn.in_proj_qkv_z_b_a.weight": [(8224, 1024)] * 18,
        "self_attn.q_k_v_proj.weight": [(5120, 1024)] * 6,
        "mlp.gate_up_proj.weight": [(7168, 1024)] * 24,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_gives_the_template_of_its_model(narrow: Any, kind: str) -> None:
    template, model = plan(narrow.configs[kind]), narrow.model(kind)
    assert {spec.dtype for spec in (*template.sources, *template.targets)} == {None}
    assert template.bind(model.state_dict()).digest == plan(model).digest


def test_a_composite_config_gives_the_names_of_its_files(narrow: Any) -> None:
    config = Qwen3_5Config(text_config=narrow.configs["dense"].to_dict())
    with torch.device("meta"):
        model = Qwen3_5ForConditionalGeneration(config)
    from_model = plan(model)
    assert [s.name for s in plan(config).sources] == [s.name for s in from_model.sources]
    assert plan(config).bind(model.state_dict()).digest == from_model.digest
    assert all(source.name.startswith("model.language_model.layers.") for source in from_model.sources)
    # and onto the text model, which has them elsewhere
    text = narrow.model("dense")
    assert plan(config).bind(text.state_dict()).digest == plan(text).digest


def test_a_large_mixture_of_experts_is_planned_quickly_and_without_weights() -> None:
    start = time.perf_counter()
    planned = plan(Qwen3_5MoeConfig())
    assert time.perf_counter() - start < 10  # 35 billion random numbers would take minutes
    assert len(planned) == 80
    assert planned.targets[1].shape == (2 * 512 + 256 + 1, 2048)


def test_hf_changes_nothing(narrow: Any) -> None:
    assert plan(narrow.configs["dense"], "hf") == WeightPlan()


def test_digest_does_not_depend_on_where_the_names_come_from(narrow: Any, tmp_path: Path) -> None:
    model = narrow.model("moe")
    narrow.write(tmp_path, model.state_dict(), narrow.configs["moe"])
    assert plan(tmp_path).digest == plan(str(tmp_path)).digest == plan(model).digest


# --- groups that cannot be merged


def test_a_group_of_two_dtypes_stays_as_it_is(narrow: Any) -> None:
    model = narrow.model("dense")
    model.model.layers[0].linear_attn.in_proj_b.half()
    targets = {target.name for target in plan(model).targets}
    assert len(targets) == 7
    assert "model.layers.0.linear_attn.in_proj_qkv_z_b_a.weight" not in targets


def test_a_group_with_a_bias_on_one_member_stays_as_it_is(narrow: Any) -> None:
    model = narrow.model("dense")
    model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(24))
    assert "model.layers.1.mlp.gate_up_proj.weight" not in {target.name for target in plan(model).targets}
    assert len(plan(model)) == 7


def test_an_incomplete_group_is_refused(narrow: Any, tmp_path: Path) -> None:
    weights = narrow.model("dense").state_dict()
    del weights["model.layers.2.linear_attn.in_proj_a.weight"]
    narrow.write(tmp_path, weights, narrow.configs["dense"])
    with pytest.raises(PlanError, match=r"^model\.layers\.2\.linear_attn\.in_proj_a\.weight: missing"):
        plan(tmp_path)


def test_members_of_different_widths_are_refused(narrow: Any, tmp_path: Path) -> None:
    weights = narrow.model("dense").state_dict()
    weights["model.layers.0.mlp.up_proj.weight"] = torch.randn(24, 15)
    narrow.write(tmp_path, weights, narrow.configs["dense"])
    with pytest.raises(PlanError, match=r"cannot hold those of model\.layers\.0\.mlp\.up_proj\.weight"):
        plan(tmp_path)


def test_a_fused_checkpoint_is_not_planned_again(narrow: Any, tmp_path: Path) -> None:
    model = narrow.model("dense")
    planned = plan(model)
    narrow.write(tmp_path, planned.apply(model.state_dict()), narrow.configs["dense"])
    assert plan(tmp_path) == WeightPlan()
    assert plan(tmp_path, "hf").digest == planned.inverse().digest


@pytest.mark.parametrize(
    ("kind", "layout", "prefix"),
    [
        *(("dense", layout, "model.") for layout in ("fused", "sglang", "fastdeploy", "qwen3_next")),
        *(("moe", layout, "model.language_model.") for layout in ("fused", "sglang", "fastdeploy")),
        *(("next", layout, "model.") for layout in ("fused", "sglang", "fastdeploy", "qwen3_5")),
    ],
)
def test_checkpoints_that_other_programs_fused_are_recognised(
    narrow: Any, kind: str, layout: str, prefix: str, tmp_path: Path
) -> None:
    """Without a plan beside them, in the names of files of one part or of two."""
    weights = narrow.model(kind).to(torch.bfloat16).state_dict()
    weights["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(4, 16)
    there = plan(narrow.configs[kind], layout).apply(weights)
    foreign = {name.replace("model.", prefix, 1): tensor for name, tensor in there.items()}
    narrow.write(tmp_path, foreign, narrow.configs[kind])
    back = plan(tmp_path, "hf").apply(foreign)
    assert back.keys() == {name.replace("model.", prefix, 1) for name in weights}
    assert all(torch.equal(back[n.replace("model.", prefix, 1)], t) for n, t in weights.items())
    for other in ("fused", "sglang"):
        got, expected = plan(tmp_path, other).apply(foreign), plan(narrow.configs[kind], other).apply(weights)
        assert got.keys() == {name.replace("model.", prefix, 1) for name in expected}
        assert all(torch.equal(got[n.replace("model.", prefix, 1)], t) for n, t in expected.items())


def test_a_part_of_a_fused_checkpoint_is_in_no_layout(narrow: Any, tmp_path: Path) -> None:
    weights = plan(narrow.configs["dense"], "sglang").apply(narrow.model("dense").state_dict())
    del weights["model.layers.1.linear_attn.in_proj_ba.weight"]
    narrow.write(tmp_path, weights, narrow.configs["dense"])
    with pytest.raises(PlanError, match="they are in another layout already, or belong to another part"):
        plan(tmp_path)


# --- what is asked wrongly


def test_unknown_names_are_refused_with_the_known_ones(narrow: Any) -> None:
    with pytest.raises(PlanError, match="layout 'sideways' is not known; known are: hf, fused"):
        plan(narrow.configs["dense"], "sideways")
    for layout in (None, 3, ["hf"]):
        with pytest.raises(PlanError, match="is not known; known are: hf, fused"):
            plan(narrow.configs["dense"], layout)  # type: ignore[arg-type]
    for tp in ((2, 2), (-1, 2), (0, 0), (0, True), (0, 1, 2), 2, "02", (0.0, 2)):
        with pytest.raises(PlanError, match="with 0 <= rank < world"):
            plan(narrow.configs["dense"], tp=tp)  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedModelError, match=r"model_type 'llama'; known are: qwen3_5_text, qwen3_5, "
    ):
        plan(LlamaConfig())
    with pytest.raises(UnsupportedModelError, match=r"no decoder stack.* in Linear; tried"):
        plan(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="no plan for a int"):
        plan(3)  # type: ignore[arg-type]


# --- other layouts, from every kind of source


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_every_layout_is_planned_alike_from_config_model_and_directory(
    narrow: Any, kind: str, layout: str, tmp_path: Path
) -> None:
    config, model = narrow.configs[kind], narrow.model(kind)
    narrow.write(tmp_path, model.state_dict(), config)
    nothing = {("dense", "per_expert"): "in it already, or the model has no such parts"}
    if (kind, layout) in nothing:
        for source in (config, model, tmp_path):
            with pytest.raises(PlanError, match=nothing[kind, layout]):
                plan(source, layout)
        return
    weights = model.state_dict()
    planned = plan(model, layout)
    assert plan(tmp_path, layout).digest == planned.digest
    template = plan(config, layout)
    assert (template.bind(weights) if len(template) else template).digest == planned.digest
    there = planned.apply(weights)
    back = planned.inverse().apply(there) if len(planned) else there
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    changes = {"hf": 0, "qwen3_next": 0 if kind == "next" else 6, "qwen3_5": 12 if kind == "next" else 0}
    assert len(planned) == changes.get(layout, len(planned))


@pytest.mark.parametrize("layout", ["hf", "fused", "sglang", "fastdeploy"])
def test_ranks_of_a_layout_are_parts_of_its_heads(narrow: Any, layout: str) -> None:
    model = narrow.model("dense")
    weights = model.state_dict()
    for rank in range(2):
        held = plan(model, layout, tp=(rank, 2)).apply(weights)
        (out,) = [t for n, t in held.items() if n.endswith("layers.0.linear_attn.out_proj.weight")]
        assert torch.equal(out, weights["model.layers.0.linear_attn.out_proj.weight"].chunk(2, dim=1)[rank])
    names = {"hf": "q_proj.weight", "sglang": "layers.3.qkv_proj.weight", "fused": "q_k_v_proj.weight"}
    shapes = {"hf": (16, 16), "sglang": (32, 16), "fused": (32, 16), "fastdeploy": (16, 32)}
    name = names.get(layout, "qkv_gate_proj.weight")
    assert [tuple(t.shape) for n, t in held.items() if n.endswith(name)] == [shapes[layout]]


def test_the_names_and_programs_are_written_down() -> None:
    for step in _STEPS.values():
        assert "Read by: " in (sys.modules[step.__module__].__doc__ or "")


def test_a_layout_by_heads_needs_their_sizes(narrow: Any, tmp_path: Path) -> None:
    fields = narrow.configs["dense"].to_dict()
    del fields["linear_num_key_heads"]
    narrow.write(tmp_path, narrow.model("dense").state_dict(), fields)
    with pytest.raises(PlanError, match="linear_num_key_heads is None"):
        plan(tmp_path, "qwen3_next")
    assert len(plan(tmp_path, "fused")) == 8


def test_the_largest_mixture_of_experts_is_planned_expert_by_expert_in_seconds_and_little_memory() -> None:
    """397B: 60 layers of 512 experts, imports counted as memory. Twice the 5 s, for a busy machine."""
    program = """
import resource, time
from transformers import Qwen3_5MoeTextConfig
from fxfuse.runtime.plan import plan
config = Qwen3_5MoeTextConfig(hidden_size=4096, num_hidden_layers=60, num_attention_heads=32,
    num_key_value_heads=2, linear_num_value_heads=64, num_experts=512, num_experts_per_tok=10,
    moe_intermediate_size=1024, shared_expert_intermediate_size=1024)
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
start = time.process_time()
planned = plan(config, "per_expert")
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(planned))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, peak, transforms = map(float, done.stdout.split())
    assert transforms == 60 * 512 * 3
    assert seconds < 10
    assert peak < 2**20  # KiB
