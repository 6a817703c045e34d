"""Names of merged parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse.errors import PlanError
from fxfuse.passes.weights.naming import fused_name

LINEAR_ATTENTION = "model.layers.0.linear_attn."


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            [f"{LINEAR_ATTENTION}in_proj_{part}.weight" for part in ("qkv", "z", "b", "a")],
            f"{LINEAR_ATTENTION}in_proj_qkv_z_b_a.weight",
        ),
        (["a.q_proj.weight", "a.k_proj.weight", "a.v_proj.weight"], "a.q_k_v_proj.weight"),
        (["a.q_proj.bias", "a.k_proj.bias", "a.v_proj.bias"], "a.q_k_v_proj.bias"),
        (["mlp.gate_proj.weight", "mlp.up_proj.weight"], "mlp.gate_up_proj.weight"),
        (["x.in_proj_qkvz.weight", "x.in_proj_ba.weight"], "x.in_proj_qkvz_ba.weight"),
        (["x.alpha.weight", "x.beta.weight"], "x.alpha_beta.weight"),
        (
            ["mlp.shared_expert.gate_proj.weight", "mlp.gate.weight"],
            "mlp.shared_expert_gate_proj_gate.weight",
        ),
        (["gate.weight", "shared_expert_gate.weight"], "gate_shared_expert_gate.weight"),
        (["mlp.gate.weight", "mlp.gate.inner.weight"], "mlp.gate_gate_inner.weight"),
        (["blocks.0.weight", "blocks.1.weight"], "blocks.0_1.weight"),
        (["w_q", "w_k"], "w_q_k"),
        (["m.w_in", "m.w_out"], "m.w_in_out"),
    ],
)
def test_name_of_a_merge(names: list[str], expected: str) -> None:
    assert fused_name(names) == expected


PATH = st.lists(
    st.lists(st.sampled_from(["in", "proj", "q", "k", "gate", "0"]), min_size=1, max_size=4).map("_".join),
    min_size=1,
    max_size=4,
).map(".".join)


@given(
    st.lists(PATH, min_size=2, max_size=5, unique=True),
    st.sampled_from(["", ".weight", ".bias"]),
    st.booleans(),
)
def test_a_merge_is_never_named_like_a_member(paths: list[str], leaf: str, same_parent: bool) -> None:
    names = [("model." if same_parent else "") + path + leaf for path in paths]
    name = fused_name(names)
    assert name not in names
    assert name.endswith(leaf)
    assert all(name.split("."))
    if same_parent:
        assert name.startswith("model.")


@pytest.mark.parametrize(
    "names", [[], ["a.weight"], ["a.weight", "a.weight"], ["a..weight", "b.weight"], ["", "a"]]
)
def test_names_that_no_merge_has_are_refused(names: list[str]) -> None:
    with pytest.raises(PlanError, match="two or more distinct dotted names"):
        fused_name(names)
