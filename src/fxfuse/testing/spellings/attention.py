"""Ways to write attention by the library's function, and the rotation of its queries and keys."""

import operator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fxfuse.testing.spellings.spelling import Spelling, require

if TYPE_CHECKING:
    from fxfuse.testing.speller import Speller


def _scaled(s: "Speller", q: Node, k: Node, v: Node, mask: Node | None, causal: bool) -> Node:
    scale = s.shape(q)[-1] ** -0.5
    return s.call(
        F.scaled_dot_product_attention, q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=causal, scale=scale
    )


def _by_name(s: "Speller", q: Node, k: Node, v: Node, mask: Node | None, causal: bool) -> Node:
    return s.call(F.scaled_dot_product_attention, query=q, key=k, value=v, attn_mask=mask, is_causal=causal)


def _by_position(s: "Speller", q: Node, k: Node, v: Node, mask: Node | None, causal: bool) -> Node:
    return s.call(F.scaled_dot_product_attention, q, k, v, mask, 0.0, causal)


ATTEND: dict[str, Spelling] = {
    "sdpa(q, k, v, attn_mask=)": lambda s, q, k, v, mask, causal: s.call(
        F.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=causal
    ),
    "sdpa, all by position": _by_position,
    "sdpa, all by name": _by_name,
    "sdpa(scale=)": _scaled,
    "torch._C._nn": lambda s, q, k, v, mask, causal: s.call(
        torch._C._nn.scaled_dot_product_attention, q, k, v, attn_mask=mask, is_causal=causal
    ),
    "torch.ops.aten": lambda s, q, k, v, mask, causal: s.call(
        torch.ops.aten.scaled_dot_product_attention, q, k, v, mask, 0.0, causal
    ),
}


def _masked(s: "Speller", scores: Node, mask: Node | None) -> Node:
    if mask is None:
        return scores
    if s.value(mask).dtype == torch.bool:
        return s.call("masked_fill", scores, s.call(operator.invert, mask), -torch.inf)
    return s.add(scores, mask)


def _by_hand(early: bool) -> Spelling:
    """The query is scaled, or the scores are."""

    def written(s: "Speller", q: Node, k: Node, v: Node, mask: Node | None, causal: bool) -> Node:
        require(not causal)
        scale = s.shape(q)[-1] ** -0.5
        q = s.mul(q, scale) if early else q
        scores = s.call(torch.matmul, q, s.spell("transpose", k, 2, 3))
        scores = _masked(s, scores if early else s.mul(scores, scale), mask)
        shares = s.call(F.softmax, scores, dim=-1, dtype=torch.float32)
        return s.call(operator.matmul, s.cast(shares, s.value(v).dtype, v), v)

    return written


ATTEND_OR_BY_HAND: dict[str, Spelling] = {
    **ATTEND,
    "softmax(q @ k.mT * scale) @ v": _by_hand(early=False),
    "softmax((q * scale) @ k.mT) @ v": _by_hand(early=True),
}

# (a, b) → (-b, a), by halves of the last dimension.


def _halves(s: "Speller", x: Node) -> list[Node]:
    half = s.shape(x)[-1] // 2
    return s.split(x, [half, half])


def _by_cat(s: "Speller", x: Node) -> Node:
    first, second = _halves(s, x)
    return s.cat([s.neg(second), first])


def _by_stack(s: "Speller", x: Node) -> Node:
    first, second = _halves(s, x)
    pair = [s.neg(second), first]
    return s.call("flatten", s.call(torch.stack, pair, dim=-2), -2)


def _by_pairs(s: "Speller", x: Node) -> Node:
    pairs = s.call("unflatten", x, -1, (2, -1))
    first, second = (s.call("select", pairs, -2, i) for i in range(2))
    return s.call(torch.cat, (s.neg(second), first), -1)


def _by_writing(s: "Speller", x: Node) -> Node:
    half = s.shape(x)[-1] // 2
    lower, upper = (Ellipsis, slice(None, half)), (Ellipsis, slice(half, None))
    out = s.call(torch.empty_like, x)
    s.call(operator.setitem, out, lower, s.neg(s.call(operator.getitem, x, upper)))
    s.call(operator.setitem, out, upper, s.call(operator.getitem, x, lower))
    return out


def _by_signs(s: "Speller", x: Node) -> Node:
    half = s.shape(x)[-1] // 2
    signs = s.call(torch.tensor, [-1.0] * half + [1.0] * half, dtype=s.value(x).dtype)
    first, second = _halves(s, x)
    return s.mul(s.cat([second, first]), signs)


HALF_TURN: dict[str, Spelling] = {
    "cat([-b, a])": _by_cat,
    "stack([-b, a]).flatten": _by_stack,
    "unflatten, select": _by_pairs,
    "roll, cat": lambda s, x: _rolled(s, x),
    "written into empty": _by_writing,
    "cat([b, a]) * signs": _by_signs,
}


def _rolled(s: "Speller", x: Node) -> Node:
    half = s.shape(x)[-1] // 2
    first, second = _halves(s, s.call(torch.roll, x, half, -1))
    return s.cat([s.neg(first), second])


# x·cos + half_turn(x)·sin


def _plain(s: "Speller", x: Node, cos: Node, sin: Node) -> Node:
    return s.add(s.mul(x, cos), s.mul(s.spell("half_turn", x), sin))


def _by_addcmul(s: "Speller", x: Node, cos: Node, sin: Node) -> Node:
    return s.call(torch.addcmul, s.mul(x, cos), s.spell("half_turn", x), sin)


def _half_by_half(s: "Speller", x: Node, cos: Node, sin: Node) -> Node:
    (a, b), (c1, c2), (s1, s2) = (_halves(s, y) for y in (x, cos, sin))
    lower = s.sub(s.mul(a, c1), s.mul(b, s1))
    return s.cat([lower, s.add(s.mul(b, c2), s.mul(a, s2))])


def _by_einsum(s: "Speller", x: Node, cos: Node, sin: Node) -> Node:
    require(s.shape(cos)[0] == s.shape(x)[0])
    flat: list[Any] = [s.call("squeeze", y, 1) for y in (cos, sin)]
    turned = s.spell("half_turn", x)
    products = [s.call(torch.einsum, "bhtr,btr->bhtr", y, c) for y, c in zip((x, turned), flat, strict=True)]
    return s.add(*products)


ROTATE: dict[str, Spelling] = {
    "x * cos + half * sin": _plain,
    "addcmul": _by_addcmul,
    "half by half": _half_by_half,
    "einsum": _by_einsum,
}
