"""Qwen3.5 and Qwen3-Next projections, against views and transformers' own un-grouping."""

from typing import Any

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fxfuse.errors import PlanError
from fxfuse.passes.weights import Draft
from fxfuse.runtime.layouts.grouped_heads import to_flat, to_groups

GDN = "model.layers.0.linear_attn."
RATIOS = pytest.mark.parametrize("r", [1, 2, 3, 4, 8])


def grouped(flat: dict[str, torch.Tensor], heads: int, r: int) -> dict[str, torch.Tensor]:
    """view(Hk, 2dk + 2·r·dv, H) and view(Hk, 2r, H), built by head."""
    keys, values = heads * 3, heads * r * 5
    q, k, v = flat[GDN + "in_proj_qkv.weight"].split([keys, keys, values])
    parts = [t.view(heads, -1, t.shape[-1]) for t in (q, k, v, flat[GDN + "in_proj_z.weight"])]
    gates = [flat[GDN + f"in_proj_{n}.weight"].view(heads, r, -1) for n in "ba"]
    result = {name: t for name, t in flat.items() if not name.startswith(GDN + "in_proj")}
    result[GDN + "in_proj_qkvz.weight"] = torch.cat(parts, 1).flatten(0, 1)
    result[GDN + "in_proj_ba.weight"] = torch.cat(gates, 1).flatten(0, 1)
    return result


@RATIOS
def test_both_directions_are_the_views_by_key_head(r: int, make: Any, equal_and_back: Any) -> None:
    c = make.config(r)
    flat = make.weights(c)
    expected = grouped(flat, c.linear_num_key_heads, r)
    plan = Draft(make.specs(flat)).then(to_groups(make.decoder(flat, c))).plan()
    got = equal_and_back(plan, flat, expected)
    back = Draft(make.specs(got)).then(to_flat(make.decoder(got, c))).plan()
    equal_and_back(back, got, flat)
    assert {(t.target.name, t.panels) for t in back.transforms} == {
        (t.target.name, t.panels) for t in plan.inverse().transforms
    }


@RATIOS
def test_transformers_ungroups_what_the_plan_grouped(r: int, make: Any) -> None:
    c = make.config(r)
    flat = make.weights(c)
    got = Draft(make.specs(flat)).then(to_groups(make.decoder(flat, c))).plan().apply(flat)
    names = {
        "hidden_size",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
    }
    with torch.device("meta"):
        layer = Qwen3NextGatedDeltaNet(Qwen3NextConfig(**{n: getattr(c, n) for n in names}), 0)
    qkvz = got[GDN + "in_proj_qkvz.weight"].t()[None]
    ba = got[GDN + "in_proj_ba.weight"].t()[None]
    q, k, v, z, b, a = layer.fix_query_key_value_ordering(qkvz, ba)
    ours = torch.cat([t.flatten(2) for t in (q, k, v)], -1)[0].t()
    assert torch.equal(ours, flat[GDN + "in_proj_qkv.weight"])
    assert torch.equal(z.flatten(2)[0].t(), flat[GDN + "in_proj_z.weight"])
    assert torch.equal(b[0].t(), flat[GDN + "in_proj_b.weight"])
    assert torch.equal(a[0].t(), flat[GDN + "in_proj_a.weight"])


def test_rows_that_the_config_does_not_give_are_refused(make: Any) -> None:
    flat = make.weights(make.config(2))
    with pytest.raises(PlanError, match=r"in_proj_qkv\.weight: shape .* has 64 rows, the config gives 84"):
        to_groups(make.decoder(flat, make.config(3)))
    del flat[GDN + "in_proj_a.weight"]
    with pytest.raises(PlanError, match=r"in_proj_a\.weight: missing, while the other"):
        to_groups(make.decoder(flat, make.config(2)))
