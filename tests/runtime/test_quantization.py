"""Formats that cannot be merged are named, wherever it is said that a checkpoint is in one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3_5Config, Qwen3_5MoeTextConfig, Qwen3_5TextConfig
from typer.testing import CliRunner

from fxfuse import cli
from fxfuse.errors import CheckpointError, PlanError
from fxfuse.runtime.convert import convert
from fxfuse.runtime.plan import plan
from fxfuse.runtime.quantization import scheme_of

LAYOUTS = ["hf", "fused", "sglang", "fastdeploy", "qwen3_next"]
PACKED = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "strategy": "group"}}}
FORMATS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "zero_point": True},
    "NVFP4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "gguf": {"quant_method": "gguf"},
    "compressed-tensors pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": PACKED,
    },
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "an unknown method": {"bits": 3},
}


def stored(kind: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What files of a format hold for one linear, by the last part of the name."""
    out, width = weight.shape
    if kind in ("gptq", "awq"):
        packed = {"qweight": torch.zeros(width, out, dtype=torch.int32), "scales": torch.ones(1, out)}
        packed["qzeros"] = torch.zeros(1, out, dtype=torch.int32)
        return packed | ({"g_idx": torch.zeros(width, dtype=torch.int32)} if kind == "gptq" else {})
    if kind == "NVFP4":
        scales = {"weight_scale": torch.ones(out, 1).to(torch.float8_e4m3fn), "input_scale": torch.ones(())}
        half = torch.zeros(out, width // 2, dtype=torch.uint8)
        return {"weight": half, "weight_scale_2": torch.ones(()), **scales}
    if kind == "compressed-tensors pack-quantized":
        shape = torch.tensor([out, width])
        return {"weight_packed": torch.zeros(out, width // 8), "weight_scale": shape, "weight_shape": shape}
    if kind == "fp8":
        return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)}
    return {"weight": weight.to(torch.int8)}


def quantised(kind: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every projection, other than those of the gates, in a format."""
    result = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        if (tensor.dim() == 2 and module.endswith("proj")) or "in_proj_qkv" in name:
            result |= {f"{module}.{leaf}": t.clone() for leaf, t in stored(kind, tensor).items()}
        else:
            result[name] = tensor.clone()
    return result


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_alone_is_refused_by_the_name_of_its_format(narrow: Any, kind: str, layout: str) -> None:
    given = FORMATS[kind]
    sparse = {**narrow.sizes, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    text = Qwen3_5TextConfig(**narrow.sizes, quantization_config=given)
    for config in (
        text,
        Qwen3_5MoeTextConfig(**sparse, quantization_config=given),
        Qwen3_5Config(text_config=narrow.sizes, quantization_config=given),
        Qwen3_5Config(text_config=text.to_dict()),
    ):
        with pytest.raises(PlanError, match=f"quantised with {kind}.* take the unquantised or the FP8"):
            plan(config, layout)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("where", ["config.json", "its text part"])
def test_a_checkpoint_is_refused_by_the_name_of_its_format(
    narrow: Any, kind: str, where: str, tmp_path: Path
) -> None:
    fields, given = narrow.configs["dense"].to_dict(), FORMATS[kind]
    if where == "config.json":
        fields |= {"quantization_config": given}
    else:
        fields = {"model_type": "qwen3_5", "text_config": fields | {"quantization_config": given}}
    source = narrow.write(tmp_path / "source", quantised(kind, narrow.state("dense")), fields)
    with pytest.raises(PlanError, match=f"quantised with {kind}"):
        plan(source)
    # not by the check of dtypes, which sees integers
    with pytest.raises(PlanError, match=f"quantised with {kind}"):
        convert(source, tmp_path / "there", "sglang")
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("gptq", r"\.qweight: of weights quantised with GPTQ or AWQ"),
        ("awq", r"\.qweight: of weights quantised with GPTQ or AWQ"),
        ("NVFP4", r"\.weight_scale_2: of weights quantised with NVFP4"),
        ("compressed-tensors pack-quantized", r"\.weight_packed: .* with compressed-tensors"),
        ("fp8", r"\.weight_scale_inv: of weights quantised with FP8"),
        ("bitsandbytes", r"in_proj_qkv\.weight: of weights quantised with an unknown method"),
    ],
)
def test_quantised_weights_of_which_the_config_says_nothing_are_no_plain_rows(
    narrow: Any, kind: str, named: str, layout: str, tmp_path: Path
) -> None:
    source = narrow.write(tmp_path, quantised(kind, narrow.state("dense")))
    with pytest.raises(PlanError, match=rf"^model\.layers\.0\..*{named}, while the config says no"):
        plan(source, layout)


@pytest.mark.parametrize(
    ("dtype", "leaf", "named"),
    [
        (torch.float8_e4m3fn, "_scale_inv", "gate_up_proj_scale_inv: of weights quantised with FP8,"),
        (torch.float8_e4m3fn, "_scale", "gate_up_proj_scale: of weights quantised with FP8 or INT8"),
        (torch.float8_e4m3fn, "_input_scale", "gate_up_proj_input_scale: of weights quantised with FP8,"),
        (torch.int8, "", "(gate_up|down)_proj: of weights quantised with an unknown method"),
    ],
)
def test_stacks_of_which_the_config_says_nothing_are_no_plain_rows(
    narrow: Any, dtype: torch.dtype, leaf: str, named: str, tmp_path: Path
) -> None:
    weights, stack = narrow.state("moe"), "model.layers.0.mlp.experts.gate_up_proj"
    for name in (stack, stack.replace("gate_up", "down")):
        weights[name] = weights[name].to(dtype)
    if leaf:
        weights[stack + leaf] = torch.ones(4, 1, 1)
    source = narrow.write(tmp_path / "source", weights, "moe")
    with pytest.raises(PlanError, match=rf"^model\.layers\.0\.mlp\.experts\.{named}"):
        convert(source, tmp_path / "there", "per_expert")
    assert not (tmp_path / "there").exists()


def test_inspect_lists_what_it_cannot_plan(narrow: Any, tmp_path: Path) -> None:
    fields = narrow.configs["dense"].to_dict() | {"quantization_config": FORMATS["gptq"]}
    source = narrow.write(tmp_path, quantised("gptq", narrow.state("dense")), fields)
    result = CliRunner().invoke(cli.app, ["inspect", str(source)])
    assert result.exit_code == 2
    assert "int32" in result.stdout
    assert result.stderr.startswith("fxfuse: weights quantised with gptq")
    assert len(result.stderr.splitlines()) == 1


def test_a_foreign_format_beside_an_fp8_config_is_no_fp8(narrow: Any, tmp_path: Path) -> None:
    fields = narrow.configs["dense"].to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    source = narrow.write(tmp_path, quantised("NVFP4", narrow.state("dense")), fields)
    with pytest.raises(PlanError, match="quantised with NVFP4, while the config says fp8"):
        plan(source)


def test_what_modelopt_says_in_a_file_of_its_own_is_heard(narrow: Any, tmp_path: Path) -> None:
    source = narrow.write(tmp_path, quantised("NVFP4", narrow.state("dense")))
    beside = source / "hf_quant_config.json"
    beside.write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(PlanError, match="weights quantised with NVFP4: its packed"):
        plan(source)
    weights = narrow.state("dense")
    for name in ("gate", "up"):
        weight = f"model.layers.0.mlp.{name}_proj.weight"
        weights[weight] = weights[weight].to(torch.float8_e4m3fn)
        weights[weight + "_scale"] = torch.tensor(float(len(name)))
    narrow.write(source, weights)
    beside.write_text('{"quantization": {"quant_algo": "FP8", "exclude_modules": ["*in_proj*"]}}')
    got = plan(source).apply(weights)
    assert got["model.layers.0.mlp.gate_up_proj.weight_scale"].tolist() == [4.0, 2.0]


def test_a_file_of_modelopts_without_its_field_is_named(narrow: Any, tmp_path: Path) -> None:
    source = narrow.write(tmp_path, narrow.state("dense"))
    (source / "hf_quant_config.json").write_text('{"producer": {}}')
    with pytest.raises(CheckpointError, match=r'hf_quant_config\.json: says nothing under "quantization"'):
        plan(source)


def test_a_scale_for_each_channel_follows_a_turned_weight(narrow: Any, tmp_path: Path) -> None:
    """FastDeploy's parameter is stored [H, out]; its output channels are q, k, v and gate in turn."""
    groups = {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}}
    fields = {"quant_method": "compressed-tensors", "config_groups": groups}
    layer = "model.layers.3.self_attn."
    weights, scales = {}, {}
    for name, tensor in narrow.state("dense").items():
        weights[name] = tensor
        if name.startswith(layer) and name.endswith("proj.weight"):
            weights[name] = tensor.to(torch.float8_e4m3fn)
            scales[name + "_scale"] = torch.rand(tensor.shape[0], 1)
    config = narrow.configs["dense"].to_dict() | {"quantization_config": fields}
    got = plan(narrow.write(tmp_path, weights | scales, config), "fastdeploy").apply(weights | scales)
    q, k, v = (scales[f"{layer}{n}_proj.weight_scale"].flatten().tolist() for n in "qkv")
    heads = range(0, 32, 16)
    queries = [x for at in heads for x in q[at : at + 8]]
    gates = [x for at in heads for x in q[at + 8 : at + 16]]
    assert got[layer + "qkv_gate_proj.weight_scale"].flatten().tolist() == [*queries, *k, *v, *gates]


def test_a_power_of_two_for_each_row_is_told_by_the_config(tmp_path: Path) -> None:
    """ue8m0 tables that are stored as floats."""
    fields = {"quant_method": "fp8", "weight_block_size": [8, 8], "scale_fmt": "ue8m0"}
    scheme = scheme_of(SimpleNamespace(quantization_config=fields))
    assert scheme is not None
    assert scheme.powers_of_two
    config = {"model_type": "qwen3_5_text", "quantization_config": fields}
    weights = {
        f"model.layers.0.mlp.{n}_proj.weight": torch.randn(5, 16).to(torch.float8_e4m3fn)
        for n in ("gate", "up")
    }
    tables = {f"{name}_scale_inv": torch.rand(5, 2) for name in weights}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights | tables, tmp_path / "model.safetensors")
    got = plan(tmp_path).apply(weights | tables)
    # five rows are no whole block of eight, and have a scale each
    assert torch.equal(
        got["model.layers.0.mlp.gate_up_proj.weight_scale_inv"], torch.cat(list(tables.values()))
    )


@pytest.mark.parametrize("block", [[8], [8, 0], [8, "8"], 8, [8, 8, 8], [True, 8]])
def test_blocks_that_are_none_are_refused(block: Any) -> None:
    fields = {"quant_method": "fp8", "weight_block_size": block}
    with pytest.raises(PlanError, match="is no block of rows and columns"):
        scheme_of(SimpleNamespace(quantization_config=fields))


GROUP = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}


def groups(group: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("fp8", r"^quantization_config: 'fp8' is no object of fields"),
        ([], r"^quantization_config: \[\] is no object of fields"),
        (
            {"quant_method": "fp8", "modules_to_not_convert": 5},
            r"modules_to_not_convert: 5 is no list of names",
        ),
        (
            {"quant_method": "fp8", "modules_to_not_convert": [5]},
            r"modules_to_not_convert: \[5\] is no list of",
        ),
        (
            {"quant_method": "fp8", "modules_to_not_convert": "lm_head"},
            r"quantization_config\.modules_to_not_convert: 'lm_head' is no list of names",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": "lm_head"},
            r"quantization_config\.exclude_modules: 'lm_head' is no list of names",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": 5}, r"config_groups: 5 is no object"),
        (groups(None), r"quantization_config\.config_groups\.g: None is no object"),
        (groups({"weights": "x"}), r"quantization_config\.config_groups\.g\.weights: 'x' is no object"),
        (
            groups({"weights": GROUP["weights"] | {"type": ["float"]}}),
            r"g\.weights\.type: \['float'\] is no string",
        ),
        (
            groups({"weights": GROUP["weights"] | {"strategy": {}}}),
            r"g\.weights\.strategy: \{\} is no string",
        ),
        (
            groups({"weights": GROUP["weights"] | {"num_bits": [8]}}),
            r"g\.weights\.num_bits: \[8\] is no number",
        ),
        (
            groups(GROUP) | {"ignore": ["re:("]},
            r"quantization_config\.ignore: 're:\(' is no regular expression",
        ),
        (
            groups(GROUP) | {"ignore": "lm_head"},
            r"quantization_config\.ignore: 'lm_head' is no list of names",
        ),
    ],
)
def test_fields_of_another_type_are_named(narrow: Any, fields: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        scheme_of(SimpleNamespace(quantization_config=fields))
    with pytest.raises(PlanError, match=message):
        scheme_of(SimpleNamespace(text_config={"quantization_config": fields}))
    config = narrow.configs["dense"].to_dict() | {"quantization_config": fields}
    source = narrow.write(tmp_path / "source", narrow.state("dense"), config)
    with pytest.raises(PlanError, match=message):
        convert(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_absent_and_empty_fields_are_none(narrow: Any) -> None:
    for none in (None, [], ()):
        scheme = scheme_of(
            SimpleNamespace(quantization_config={"quant_method": "fp8", "modules_to_not_convert": none})
        )
        assert scheme is not None
        assert scheme.plain == ()
    with pytest.raises(PlanError, match="0 kinds of weights"):
        scheme_of(SimpleNamespace(quantization_config={"quant_method": "compressed-tensors"}))
    with pytest.raises(PlanError, match="None of None bits"):
        scheme_of(SimpleNamespace(quantization_config=groups({"weights": None})))
