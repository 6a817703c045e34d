"""Attention of one query becomes reductions: only of one, with every mask, and no less exact."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse import Rewritten, rewrite
from fxfuse.passes import one_query_attention
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced

PASS = "one_query_attention"
HEADS, GROUPS, WIDTH = 6, 2, 8


class Attention(nn.Module):
    def __init__(self, heads: int = HEADS, **options: Any) -> None:
        super().__init__()
        self.heads, self.options = (HEADS, heads, heads), options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """The queries, keys and values of every head side by side: [batch, length, heads · width]."""
        q, k, v = (
            x.unflatten(-1, (n, WIDTH)).transpose(1, 2) for x, n in zip((q, k, v), self.heads, strict=True)
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


def drawn(
    batch: int = 2, queries: int = 1, keys: int = 9, heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    shapes = [(batch, queries, HEADS), (batch, keys, heads), (batch, keys, heads)]
    return [torch.randn((b, n, h * WIDTH), generator=generator).to(dtype) for b, n, h in shapes]


def matched(rewritten: Rewritten) -> int:
    return len(rewritten.report.graphs[0].outcomes[PASS].matches)


def masks(batch: int, keys: int) -> dict[str, Tensor | None]:
    some = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    some[0, ..., : keys // 2] = False
    none = some.clone()
    none[1] = False
    return {
        "no mask": None,
        "some keys": some,
        "no key at all": none,
        "added": torch.where(some, 0.0, -1e4),
        "of the heads": some.expand(batch, HEADS, 1, keys),
        "of no batch": some[0, 0],
    }


@pytest.mark.parametrize("keys", [1, 9, 64])
@pytest.mark.parametrize("kind", list(masks(2, 9)))
@pytest.mark.parametrize("heads", [HEADS, GROUPS])
def test_with_every_mask(kind: str, keys: int, heads: int) -> None:
    module = Attention(heads, enable_gqa=heads != HEADS)
    inputs = drawn(keys=keys, heads=heads)
    if (mask := masks(2, keys)[kind]) is not None:
        inputs.append(mask)
    rewritten = rewrite(module, inputs, passes=PASS)
    assert matched(rewritten) == 1
    with torch.no_grad():
        exact = module(*[x.double() if x.is_floating_point() else x for x in inputs])
        got = rewritten.graph_module(*inputs)
    assert got.shape == exact.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=1e-6, rtol=1e-5)


def test_other_lengths_than_the_first() -> None:
    rewritten = rewrite(Attention(scale=0.3), drawn(keys=9), passes=PASS)
    for keys in (2, 30):
        inputs = drawn(keys=keys)
        expected = Attention(scale=0.3)(*inputs)
        torch.testing.assert_close(rewritten.graph_module(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_less_exact(dtype: torch.dtype) -> None:
    inputs = drawn(keys=300, dtype=dtype)
    rewritten = rewrite(Attention(), inputs, passes=PASS)
    exact = Attention()(*[x.double() for x in inputs])
    ours, theirs = rewritten.graph_module(*inputs), Attention()(*inputs)
    assert ours.dtype == dtype
    assert (ours - exact).pow(2).mean() <= (theirs - exact).pow(2).mean() * 1.05


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({}, drawn(queries=2)),
        ({"is_causal": True}, drawn()),
        ({"dropout_p": 0.5}, drawn()),
        ({}, [x.double() for x in drawn()]),
        ({}, [*drawn(batch=1, keys=1, queries=2), torch.ones(2, 1, dtype=torch.bool)]),
    ],
)
def test_other_attention_stays(options: dict[str, Any], inputs: list[Tensor]) -> None:
    rewritten = rewrite(Attention(**options), inputs, passes=PASS)
    assert matched(rewritten) == 0
    assert rewritten.report.misses == []  # no pass was undone either


def test_with_gradients_and_elsewhere_it_stays() -> None:
    program = traced(Attention(), {}, drawn(), Options())
    assert len(one_query_attention.run(program.copy()).matches) == 1
    assert one_query_attention.run(replace(program.copy(), grad_enabled=True)).matches == []
    program = traced(Attention(), {}, [x.to("meta") for x in drawn()], Options())
    assert one_query_attention.run(program).matches == []
