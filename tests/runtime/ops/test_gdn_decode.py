"""One token of Gated DeltaNet as an operator: transformers' modules are the original."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from fxfuse.runtime.ops.gdn_decode import Parts, gdn_decode, reference, refusal, views_of_row

HIDDEN, HEADS, DK, DV, EPS = 32, 2, 16, 8, 1e-6
LAYERS = {
    "contiguous": (Qwen3_5GatedDeltaNet, Qwen3_5TextConfig),
    "interleaved": (Qwen3NextGatedDeltaNet, Qwen3NextConfig),
}


def tensor(states: Any) -> Tensor:
    """A layer's state, which transformers keeps by number since 5.18."""
    return states if isinstance(states, Tensor) else states[0]


class Original:
    """A layer of transformers, its output projection left out, and the cache that it decodes with."""

    def __init__(self, layout: str, ratio: int, dtype: torch.dtype, prompt: int = 5) -> None:
        torch.manual_seed(ratio)
        kind, configuration = LAYERS[layout]
        self.config = configuration(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=HEADS,
            linear_num_value_heads=HEADS * ratio,
            linear_key_head_dim=DK,
            linear_value_head_dim=DV,
            rms_norm_eps=EPS,
        )
        self.interleaved = layout == "interleaved"
        self.layer = kind(self.config, 0).eval().requires_grad_(False)
        self.layer.norm.weight.data.normal_(1.0, 0.2)
        self.layer.dt_bias.data.normal_()
        self.layer.to(dtype)
        self.layer.out_proj = nn.Identity()
        self.cache = DynamicCache(config=self.config)
        self.dtype = dtype
        self.step(torch.randn(2, prompt, HIDDEN))

    def step(self, hidden: Tensor) -> Tensor:
        """[B, T, HV·dv] of the next tokens."""
        return self.layer(hidden.to(self.dtype), cache_params=self.cache)

    def states(self) -> tuple[Tensor, Tensor]:
        layer = self.cache.layers[0]
        return tensor(layer.conv_states), tensor(layer.recurrent_states)

    def arguments(self, hidden: Tensor, round_beta: bool) -> list[Any]:
        """What the operator takes for the next token, with copies of the states."""
        layer, hidden = self.layer, hidden[:, 0].to(self.dtype)
        names = ("qkvz", "ba") if self.interleaved else ("qkv", "z", "b", "a")
        row = torch.cat([getattr(layer, f"in_proj_{name}")(hidden) for name in names], dim=-1)
        values = layer.num_v_heads
        qkvz, ba = row[:, : -2 * values], row[:, -2 * values :]
        parts = views_of_row(qkvz, ba, HEADS, values, DK, DV, self.interleaved)
        assert all(x.untyped_storage().data_ptr() == row.data_ptr() for x in parts)
        conv_state, state = (x.clone() for x in self.states())
        weights = (layer.conv1d.weight.squeeze(1), None, layer.A_log, layer.dt_bias, layer.norm.weight)
        return [*parts, conv_state, *weights, state, EPS, round_beta]


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("layout", LAYERS)
def test_output_and_states_are_those_of_transformers(layout: str, ratio: int) -> None:
    original = Original(layout, ratio, torch.float32)
    for hidden in torch.randn(3, 2, 1, HIDDEN):
        given = original.arguments(hidden, False)
        out = gdn_decode(*given)
        torch.testing.assert_close(out.flatten(1), original.step(hidden)[:, 0], atol=1e-6, rtol=1e-4)
        conv_state, state = original.states()
        assert torch.equal(given[6], conv_state)
        torch.testing.assert_close(given[12], state, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_column_that_no_token_sees_may_be_kept_or_not(more: int) -> None:
    given = Original("contiguous", 2, torch.float32).arguments(torch.randn(2, 1, HIDDEN), False)
    other, oldest = copy.deepcopy(given), torch.randn(2, given[6].shape[1], 1)
    other[6] = given[6][..., 1:].clone() if more < 0 else torch.cat([oldest, given[6]], dim=-1)
    assert torch.equal(gdn_decode(*other), gdn_decode(*given)) and torch.equal(other[12], given[12])
    shared = min(other[6].shape[-1], given[6].shape[-1])
    assert torch.equal(other[6][..., -shared:], given[6][..., -shared:])


@pytest.mark.parametrize("layout", LAYERS)
def test_its_error_is_no_larger_than_that_of_transformers_in_bfloat16(layout: str, no_worse: Any) -> None:
    original = Original(layout, 2, torch.bfloat16)
    hidden = torch.randn(2, 1, HIDDEN)
    given = original.arguments(hidden, False)
    exact_given = [x.double() if isinstance(x, Tensor) else x for x in given]
    exact, out = reference(*exact_given), gdn_decode(*given)
    no_worse(out.flatten(1), original.step(hidden)[:, 0], exact.flatten(1))
    no_worse(given[12], original.states()[1], exact_given[12])
    assert torch.equal(given[6], original.states()[0])


def test_a_thousand_steps_stay_near_float64() -> None:
    original = Original("contiguous", 2, torch.bfloat16)
    given = original.arguments(torch.randn(2, 1, HIDDEN), False)
    exact_given = [x.double() if isinstance(x, Tensor) else x for x in given]
    for _ in range(1000):
        for i in range(6):
            given[i] = torch.randn(given[i].shape).bfloat16()
            exact_given[i] = given[i].double()
        out, exact = reference(*given), reference(*exact_given)
    torch.testing.assert_close(given[12].double(), exact_given[12], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(out.double(), exact, atol=1e-4, rtol=2**-7)


def test_the_switch_rounds_the_rate_as_eager_does() -> None:
    original = Original("contiguous", 2, torch.bfloat16)
    given = original.arguments(torch.randn(2, 1, HIDDEN), True)
    by_hand = copy.deepcopy(given)
    # Logits whose sigmoid in float32 is the rounded one.
    by_hand[4] = torch.logit(by_hand[4].sigmoid().double()).float()
    by_hand[-1] = False
    plain = copy.deepcopy(given)
    plain[-1] = False
    for arguments in (given, by_hand, plain):
        gdn_decode(*arguments)
    torch.testing.assert_close(given[12], by_hand[12], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(given[12], plain[12], atol=1e-6, rtol=1e-5)


def test_wrong_shapes_and_what_the_kernel_does_not_take_are_named() -> None:
    given = Original("contiguous", 2, torch.float32).arguments(torch.randn(2, 1, HIDDEN), False)
    with pytest.raises(ValueError, match=r"b is \(2, 2, 1\), not \(2, 2, 2\)"):
        gdn_decode(*given[:4], given[4][..., :1], *given[5:])
    with pytest.raises(ValueError, match="conv_state has 2 columns, not 3 or more"):
        gdn_decode(*given[:6], given[6][..., 2:], *given[7:])
    wide = torch.empty(1, 1, 1, 256)
    assert "a state of 256 x 256" in (refusal(wide[0], wide[0], wide) or "")
    assert "cpu" in (refusal(*given[:3]) or "")


def test_the_views_of_a_row_are_the_parts_of_its_layout() -> None:
    row = torch.arange(2 * (2 * 3 + 2 * 4 * 5) + 2 * 4 + 100.0)[None]
    wide = 2 * 2 * 3 + 2 * 4 * 5
    parts = views_of_row(row[:, :wide], row[:, wide : wide + 8], 2, 4, 3, 5, True)
    assert parts.query[0, 1].tolist() == [26.0, 27.0, 28.0] and parts.z[0, 1, 1, 0] == 26 + 6 + 10 + 5
    assert parts.b.tolist() == [[[52.0, 53.0], [56.0, 57.0]]] and isinstance(parts, Parts)


@pytest.mark.parametrize("fewer", [0, 1])
@pytest.mark.parametrize("layout", LAYERS)
def test_the_operator_keeps_torchs_rules(layout: str, fewer: int) -> None:
    given = Original(layout, 2, torch.bfloat16).arguments(torch.randn(2, 1, HIDDEN), False)
    given[6] = given[6][..., fewer:].clone()
    torch.library.opcheck(gdn_decode, tuple(given))
