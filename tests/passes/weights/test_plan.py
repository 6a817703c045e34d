"""Weight plans against torch.cat, torch.split and indexing written by hand."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import PlanError
from fxfuse.passes.weights import RowMap, Rows, TensorSpec, Transform, WeightPlan

GATE, UP = "model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"
FUSED = "model.layers.{}.mlp.gate_up_proj.weight"


def gate_up(layers: int = 2, dtype: str | None = None, width: int = 3) -> WeightPlan:
    """gate (4 rows) and up (2 rows) of each layer stacked."""
    sources, transforms = [], []
    for i in range(layers):
        gate, up = GATE.format(i), UP.format(i)
        sources += [TensorSpec(gate, (4, width), dtype), TensorSpec(up, (2, width), dtype)]
        target = TensorSpec(FUSED.format(i), (6, width), dtype)
        transforms.append(Transform(target, RowMap.concat([(gate, 4), (up, 2)])))
    return WeightPlan(tuple(sources), tuple(transforms))


def state(layers: int = 2, dtype: torch.dtype = torch.float32, width: int = 3) -> dict[str, torch.Tensor]:
    result = {"model.embed_tokens.weight": torch.randn(5, width, dtype=dtype)}
    for i in range(layers):
        result[f"model.layers.{i}.norm.weight"] = torch.randn(width)
        result[GATE.format(i)] = torch.randn(4, width).to(dtype)
        result[f"model.layers.{i}.mlp.down_proj.weight"] = torch.randn(width, 4).to(dtype)
        result[UP.format(i)] = torch.randn(2, width).to(dtype)
    return result


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, list[int]]:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return {k: bits(v) for k, v in left.items()} == {k: bits(v) for k, v in right.items()}


# --- apply


def test_concatenation_is_torch_cat() -> None:
    weights = state()
    fused = gate_up().apply(weights)
    for i in range(2):
        assert torch.equal(
            fused[FUSED.format(i)], torch.cat([weights[GATE.format(i)], weights[UP.format(i)]])
        )


def test_interleaving_per_head_is_reshape_and_cat() -> None:
    heads, dim, width = 3, 2, 4
    query, gate = torch.randn(heads * dim, width), torch.randn(heads * dim, width)
    rows = RowMap(tuple(Rows(n, h * dim, (h + 1) * dim) for h in range(heads) for n in ("query", "gate")))
    sources = (TensorSpec("query", (heads * dim, width)), TensorSpec("gate", (heads * dim, width)))
    plan = WeightPlan(sources, (Transform(TensorSpec("both", (2 * heads * dim, width)), rows),))
    expected = torch.stack([query.view(heads, dim, width), gate.view(heads, dim, width)], 1).reshape(
        -1, width
    )
    assert torch.equal(plan.apply({"query": query, "gate": gate})["both"], expected)


def test_permutation_under_the_same_name_is_indexing() -> None:
    order = [3, 0, 2, 1]
    spec = TensorSpec("w", (4, 2))
    plan = WeightPlan((spec,), (Transform(spec, RowMap.permute("w", order)),))
    weight = torch.randn(4, 2)
    assert torch.equal(plan.apply({"w": weight})["w"], weight[order])


def test_one_source_splits_into_experts_of_three_dimensions_and_back() -> None:
    stacked = torch.randn(6, 2, 3).transpose(0, 1)
    parts = [TensorSpec(f"e.{e}.{n}", (3, 3)) for e in range(2) for n in ("gate", "up")]
    split = [Transform(p, RowMap((Rows("e", 3 * i, 3 * i + 3),))) for i, p in enumerate(parts)]
    plan = WeightPlan((TensorSpec("e", (2, 6, 3)),), tuple(split))
    result = plan.apply({"e": stacked})
    assert torch.equal(result["e.1.up"], stacked[1, 3:])
    assert torch.equal(result["e.0.gate"], stacked[0, :3])
    assert same_bits(plan.inverse().apply(result), {"e": stacked})


def test_biases_merge_by_element() -> None:
    specs = (TensorSpec("q.bias", (3,)), TensorSpec("k.bias", (2,)))
    rows = RowMap.concat([(s.name, s.rows) for s in specs])
    plan = WeightPlan(specs, (Transform(TensorSpec("q_k.bias", (5,)), rows),))
    q, k = torch.randn(3), torch.randn(2)
    assert torch.equal(plan.apply({"q.bias": q, "k.bias": k})["q_k.bias"], torch.cat([q, k]))


@pytest.mark.parametrize("strided", [True, False])
def test_apply_reads_any_strides_and_writes_memory_of_its_own(strided: bool) -> None:
    weights = state()
    if strided:
        weights[GATE.format(0)] = torch.randn(3, 4).t()
    before = copy.deepcopy(weights)
    fused = gate_up().apply(weights)
    assert torch.equal(fused[FUSED.format(0)][:4], before[GATE.format(0)])
    fused[FUSED.format(0)].zero_()
    assert list(weights) == list(before)
    assert same_bits(weights, before)


def test_what_the_plan_does_not_name_is_the_same_object() -> None:
    weights = state() | {"_extra_state": object()}  # type: ignore[dict-item]
    fused = gate_up().apply(weights)
    untouched = [name for name in weights if "gate_proj" not in name and "up_proj" not in name]
    assert len(untouched) == 6
    assert all(fused[name] is weights[name] for name in untouched)


def test_a_target_stands_where_its_first_source_stood() -> None:
    assert list(gate_up(1).apply(state(1))) == [
        "model.embed_tokens.weight",
        "model.layers.0.norm.weight",
        FUSED.format(0),
        "model.layers.0.mlp.down_proj.weight",
    ]
    # first in the state dict, not first in the target
    up_first = {name: state(1)[name] for name in (UP.format(0), "model.embed_tokens.weight", GATE.format(0))}
    assert list(gate_up(1).apply(up_first)) == [FUSED.format(0), "model.embed_tokens.weight"]


def test_apply_gives_plain_tensors_under_inference_mode_and_for_parameters() -> None:
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in state().items()}
    with torch.inference_mode():
        fused = gate_up().apply(weights)[FUSED.format(0)]
    assert not fused.is_inference()
    assert not fused.requires_grad
    assert gate_up().apply(weights)[FUSED.format(0)].grad_fn is None


def test_apply_works_on_the_meta_device() -> None:
    weights = {name: tensor.to("meta") for name, tensor in state().items()}
    fused = gate_up().apply(weights)[FUSED.format(0)]
    assert (fused.device.type, fused.shape) == ("meta", (6, 3))


def test_sources_on_two_devices_are_refused() -> None:
    weights = state()
    weights[UP.format(1)] = weights[UP.format(1)].to("meta")
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.gate_up_proj.*several devices.*on cpu.*on meta"):
        gate_up().apply(weights)


# --- inverse


@st.composite
def plans(draw: st.DrawFn) -> WeightPlan:
    """Sources of one to three dimensions cut into ranges that are dealt to targets in any order."""
    width = draw(st.integers(1, 3))
    sources = []
    for i in range(draw(st.integers(1, 4))):
        lead = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
        sources.append(TensorSpec(f"s{i}", (*lead, width)))
    pieces = []
    for source in sources:
        cuts = sorted(draw(st.sets(st.integers(1, max(source.rows - 1, 1)))) - {source.rows})
        pieces += [Rows(source.name, a, b) for a, b in zip([0, *cuts], [*cuts, source.rows], strict=True)]
    pieces = draw(st.permutations(pieces))
    count = draw(st.integers(1, len(pieces)))
    dealt = [pieces[i::count] for i in range(count)]
    maps = [RowMap(tuple(part)) for part in dealt]
    targets = [TensorSpec(f"t{i}", (m.rows, width)) for i, m in enumerate(maps)]
    return WeightPlan(tuple(sources), tuple(Transform(t, m) for t, m in zip(targets, maps, strict=True)))


@given(plans(), st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]))
def test_inverse_gives_every_bit_back(plan: WeightPlan, dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    weights = {
        # any bits, NaN payloads included
        s.name: torch.randint(0, 256, (*s.shape[:-1], s.shape[-1] * size), dtype=torch.uint8).view(dtype)
        for s in plan.sources
    }
    there = plan.apply(weights)
    for t in plan.transforms:  # each row by hand
        flat = torch.cat(
            [
                weights[r.source].reshape(-1, t.target.width)[r.start : r.stop].view(torch.uint8)
                for r in t.rows.segments
            ]
        )
        assert bits(there[t.target.name].view(torch.uint8)) == bits(flat)
    assert same_bits(plan.inverse().apply(there), weights)


@given(plans())
def test_inverse_is_an_involution_and_json_round_trips(plan: WeightPlan) -> None:
    assert plan.inverse().inverse() == plan
    again = WeightPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest


# --- bind


def test_bind_fixes_the_dtypes() -> None:
    bound = gate_up().bind(state(dtype=torch.bfloat16))
    assert {spec.dtype for spec in (*bound.sources, *bound.targets)} == {"bfloat16"}
    assert bound == gate_up(dtype="bfloat16")


def test_bind_reads_the_dtype_names_of_safetensors() -> None:
    headers = {s.name: TensorSpec(s.name, s.shape, "BF16") for s in gate_up().sources}
    assert gate_up().bind(headers) == gate_up(dtype="bfloat16")


@pytest.mark.parametrize("prefix", ["model.language_model.", "model.", "language_model.", ""])
@pytest.mark.parametrize("own", ["model.language_model.", "model.", ""])
def test_bind_follows_the_decoders_prefix(own: str, prefix: str) -> None:
    def moved(plan: WeightPlan, to: str) -> WeightPlan:
        return WeightPlan.from_json(plan.to_json().replace('"model.', f'"{to}'))

    weights = {name.replace("model.", prefix, 1): tensor for name, tensor in state().items()}
    # the other decoder of a file, which has a layer 0 as well
    weights |= {f"mtp.layers.0.mlp.{n}_proj.weight": torch.randn(4, 3) for n in ("gate", "up")}
    assert moved(gate_up(), own).bind(weights) == moved(gate_up(dtype="float32"), prefix)
    fused = moved(gate_up(), own).apply(weights)
    assert torch.equal(fused[FUSED.format(1).replace("model.", prefix, 1)][4:], state_up(weights, prefix))
    assert "mtp.layers.0.mlp.gate_proj.weight" in fused


def state_up(weights: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    return weights[UP.format(1).replace("model.", prefix, 1)]


def test_bind_drops_what_is_absent_altogether() -> None:
    assert gate_up(layers=3).bind(state(layers=2)) == gate_up(layers=2, dtype="float32")


def test_all_misfits_are_listed_at_once() -> None:
    weights = state(layers=3)
    del weights[UP.format(0)]
    weights[GATE.format(1)] = torch.randn(5, 3)
    weights[UP.format(2)] = weights[UP.format(2)].half()
    plan = gate_up(layers=3, dtype="float32")
    for bind in (plan.bind, plan.apply):
        with pytest.raises(PlanError) as caught:
            bind(weights)
        message = str(caught.value)
        assert f"{UP.format(0)}: missing" in message
        assert f"{GATE.format(1)}: shape [5, 3], the plan needs [4, 3]" in message
        assert f"{UP.format(2)}: dtype float16, the plan needs float32" in message
        assert message.count("\n") == 3


def test_members_of_two_dtypes_do_not_bind_to_a_template() -> None:
    weights = state()
    weights[UP.format(1)] = weights[UP.format(1)].half()
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.gate_up_proj.*float16"):
        gate_up().bind(weights)


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(PlanError, match=r"gate_up_proj\.weight: the name is taken"):
        gate_up().apply(state() | {FUSED.format(1): torch.randn(1)})


def test_a_plan_that_finds_nothing_says_so_instead_of_doing_nothing() -> None:
    fused = gate_up().apply(state())
    with pytest.raises(PlanError, match="targets are there already"):
        gate_up().apply(fused)
    with pytest.raises(PlanError, match="targets are not there either"):
        gate_up().apply({"visual.weight": torch.randn(1)})


def test_the_empty_plan_changes_nothing() -> None:
    weights = state()
    result = WeightPlan().apply(weights)
    assert list(result) == list(weights)
    assert all(result[name] is weights[name] for name in weights)
    assert result is not weights
    assert WeightPlan().inverse() == WeightPlan.from_json(WeightPlan().to_json()) == WeightPlan()


# --- JSON, digest, text


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d | {"format": "another"},
        lambda d: d | {"version": 2},
        lambda d: d | {"extra": 1},
        lambda d: {k: v for k, v in d.items() if k != "sources"},
        lambda d: d | {"sources": {}},
        lambda d: d | {"sources": [{"name": "a", "shape": [2, "3"], "dtype": None}]},
        lambda d: d | {"sources": [{"name": "a", "shape": [2, True], "dtype": None}]},
        lambda d: d | {"sources": [{"name": 1, "shape": [2, 3], "dtype": None}]},
        lambda d: d | {"sources": [{"name": "a", "shape": [2, -3], "dtype": None}]},
        lambda d: d | {"sources": d["sources"][1:]},
        lambda d: d | {"transforms": [1]},
        lambda d: d | {"transforms": [d["transforms"][0] | {"rows": []}]},
        lambda d: [d],
    ],
)
def test_json_that_is_no_plan_is_refused(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError):
        WeightPlan.from_json(json.dumps(change(json.loads(gate_up().to_json()))))


@pytest.mark.parametrize("text", [None, "", "{", "null", "[" * 100_000, "NaN", '"fxfuse.weight_plan"'])
def test_text_that_is_no_plan_is_refused(text: Any) -> None:
    with pytest.raises(PlanError):
        WeightPlan.from_json(text)


def test_digest_ignores_order_and_notices_everything_else() -> None:
    plan = gate_up()
    assert WeightPlan(plan.sources[::-1], plan.transforms[::-1]).digest == plan.digest
    others = [gate_up(3), gate_up(dtype="bfloat16"), gate_up(width=4), plan.inverse(), WeightPlan()]
    swapped = [
        replace(t, rows=RowMap.concat([(t.rows.sources[1], 2), (t.rows.sources[0], 4)]))
        for t in plan.transforms
    ]
    others.append(WeightPlan(plan.sources, tuple(swapped)))
    assert len({plan.digest, *(other.digest for other in others)}) == 7


def test_digest_is_the_same_in_every_process() -> None:
    # the plan through JSON, and one built anew from a set, whose order the hash seed decides
    program = (
        "import sys; from fxfuse.passes.weights import WeightPlan;"
        "p = WeightPlan.from_json(sys.stdin.read());"
        "named = {s.name: s for s in p.sources}; moved = {t.target.name: t for t in p.transforms};"
        "q = WeightPlan(tuple(named[n] for n in set(named)), tuple(moved[n] for n in set(moved)));"
        "print(q.digest)"
    )
    plan = gate_up(8)
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            input=plan.to_json(),
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {plan.digest}


def test_text_groups_the_layers() -> None:
    text = str(
        WeightPlan(
            gate_up(4).sources[:4] + gate_up(4).sources[6:],
            (*gate_up(2).transforms, gate_up(4).transforms[3]),
        )
    )
    assert text.count("gate_up_proj") == 1
    assert "model.layers.{0..1,3}.mlp.gate_up_proj.weight [6, 3]" in text
    assert len(gate_up(4)) == 4
