"""Blocks as people write them who have never seen the generator, each with the pass that matches it."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equality import difference
from strangers_steps import DELTA_STEPS, NO_STEPS, RETURNED, STEPS, normal, step_inputs
from torch import Tensor, nn

from fxfuse import rewrite

B, T, H, D = 2, 5, 12, 8
EPS = 1e-6


class Block(nn.Module):
    """Parameters of all blocks, and the function that reads some of them."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute
        generator = torch.Generator().manual_seed(0)
        shapes = {"w": (H,), "wg": (16, H), "wu": (16, H), "wd": (H, 16), "wq": (16, H), "wk": (D, H)}
        shapes |= {"wv": (D, H), "bq": (16,), "bk": (D,), "bv": (D,), "A_log": (2,), "dt_bias": (2,)}
        shapes |= {"taps": (H, 1, 4), "wa": (2, H), "wb": (2, H)}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, *inputs: Tensor) -> Any:
        made = self.compute(self, *inputs)
        # What leaves the graph keeps its strides, which forbids some rewrites: a copy does not care.
        return [(y * 2).contiguous() for y in (made if isinstance(made, (list, tuple)) else [made])]


def hidden() -> list[Tensor]:
    return [torch.randn(B, T, H, generator=torch.Generator().manual_seed(1))]


def two(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for _ in range(2)]


# RMSNorm

NORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "F.rms_norm": lambda m, x: F.rms_norm(x, (H,), m.w, EPS),
    "torch.rms_norm, named": lambda m, x: torch.rms_norm(x, normalized_shape=[H], weight=m.w, eps=EPS),
    "F.rms_norm without weight, times it": lambda m, x: F.rms_norm(x, (H,), eps=EPS) * m.w,
    "F.rms_norm with 1 + w": lambda m, x: F.rms_norm(x, (H,), 1 + m.w, EPS),
    "F.rms_norm, w.add(1) outside": lambda m, x: F.rms_norm(x, [H], None, EPS).mul(m.w.add(1)),
    "x.square().mean": lambda m, x: x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * m.w,
    "divided by sqrt": lambda m, x: m.w * (x / torch.sqrt(torch.mean(x.pow(2), -1, keepdim=True) + EPS)),
    "norm squared over n": lambda m, x: x * (x.norm(2, -1, keepdim=True) ** 2 / H + EPS) ** -0.5 * m.w,
    "vector_norm": lambda m, x: (
        m.w * x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / H + EPS).sqrt()
    ),
    "einsum of squares": lambda m, x: (
        x * torch.rsqrt(torch.einsum("bth,bth->bt", x, x)[..., None] / H + EPS) * m.w
    ),
    "einsum with ellipsis": lambda m, x: (
        x * torch.rsqrt(torch.einsum("...h,...h->...", x, x).unsqueeze(-1) * (1 / H) + EPS) * m.w
    ),
    "vecdot": lambda m, x: x * torch.rsqrt(torch.linalg.vecdot(x, x).unsqueeze(-1) / H + EPS) * m.w,
    "distributed 1 + w": lambda m, x: (lambda n: n + n * m.w)(
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    ),
    "addcmul": lambda m, x: (lambda n: torch.addcmul(n, n, m.w))(
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    ),
    "add(alpha)": lambda m, x: (
        x * torch.rsqrt(torch.add(x.pow(2).mean(-1, True), EPS, alpha=1)) * torch.add(m.w, 1, alpha=1)
    ),
    "1 - (-w)": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS) * (1 - (-m.w)),
    "weight first": lambda m, x: (m.w + 1.0) * x * (x.pow(2).sum(-1, True).div(H).add(EPS)).pow(-0.5),
    "in place": lambda m, x: x.pow(2).mean(-1, keepdim=True).add_(EPS).rsqrt_().mul(x).mul_(m.w),
    "torch.div, named": lambda m, x: (
        torch.div(x, other=torch.sqrt(torch.mean(x * x, dim=(-1,), keepdim=True) + EPS)) * m.w
    ),
    "double precision of the exponent": lambda m, x: torch.mul(
        m.w, torch.mul(x, torch.pow(torch.mean(torch.pow(x, 2.0), [-1], True) + EPS, exponent=-0.5))
    ),
    "weight broadcast by hand": lambda m, x: (
        x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * m.w[None, None, :].expand(B, T, H)
    ),
    "mean, view": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1).view(B, T, 1) + EPS) * m.w,
    "epsilon as a tensor": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, True) + torch.tensor(EPS)) * m.w,
    "einsum with the weight": lambda m, x: torch.einsum(
        "...d,d->...d", x * torch.rsqrt(x.pow(2).mean(-1, True) + EPS), 1 + m.w
    ),
    "absolute values squared": lambda m, x: x * torch.rsqrt((x.abs() ** 2).mean(-1, True) + EPS) * m.w,
    "a row times itself": lambda m, x: (
        x * torch.rsqrt((x[..., None, :] @ x[..., None])[..., 0] / H + EPS) * m.w
    ),
    "a row times its column": lambda m, x: (
        m.w * x / ((x.unsqueeze(-2) @ x.unsqueeze(-1)).squeeze(-1) / H).add(EPS).sqrt()
    ),
    "numbers as tensors": lambda m, x: (
        x
        * ((x * x).sum(-1, True) * torch.tensor(1.0 / H) + torch.tensor(EPS)).rsqrt()
        * (torch.tensor(1.0) * m.w)
    ),
    "of rows": lambda m, x: (lambda r: (r * torch.rsqrt(r.pow(2).mean(1, True) + EPS) * m.w).view(B, T, H))(
        x.reshape(-1, H)
    ),
    "linalg.norm": lambda m, x: m.w * x / (torch.linalg.norm(x, dim=-1, keepdim=True) ** 2 / H + EPS).sqrt(),
    "expand_as": lambda m, x: torch.mul(
        x, (x.square().mean(dim=2, keepdim=True) + EPS).rsqrt().expand_as(x)
    ).mul(m.w.expand_as(x)),
    "an einsum over rows": lambda m, x: (
        torch.einsum("...h,...->...h", x, torch.rsqrt(x.square().mean(-1) + EPS)) * m.w
    ),
    "a tensor full of epsilons": lambda m, x: (lambda v: x * (v + torch.full_like(v, EPS)).rsqrt() * m.w)(
        x.square().mean(-1, keepdim=True)
    ),
    "ones divided, ones added": lambda m, x: (
        lambda v: x * (torch.ones_like(v) / (v + EPS).sqrt()) * (m.w + torch.ones(H))
    )(x.square().mean(-1, keepdim=True)),
    "the exponential of half a logarithm": lambda m, x: (
        x * torch.exp(-0.5 * torch.log(x.square().mean(-1, keepdim=True) + EPS)) * m.w
    ),
    "a row times itself, two dimensions taken away": lambda m, x: (
        x * torch.rsqrt((x.unsqueeze(-2) @ x.unsqueeze(-1))[..., 0, 0].unsqueeze(-1) / H + EPS) * m.w
    ),
    "a linear of equal weights": lambda m, x: (
        x * torch.rsqrt(F.linear(x.square(), x.new_full((1, H), 1 / H)) + EPS) * m.w
    ),
    "a product with ones": lambda m, x: x * torch.rsqrt(x.square() @ torch.ones(H, 1) / H + EPS) * m.w,
    "the sum and a larger epsilon": lambda m, x: (
        x * H**0.5 * torch.rsqrt(x.square().sum(-1, keepdim=True) + H * EPS) * m.w
    ),
    "divided before it is squared": lambda m, x: (
        x * torch.rsqrt(((x / math.sqrt(H)) ** 2).sum(-1, keepdim=True) + EPS) * m.w
    ),
    "root of the inverse": lambda m, x: x * ((x * x).mean(-1, keepdim=True) + EPS).reciprocal().sqrt() * m.w,
}
LATE_DIMENSIONS: dict[str, Callable[[Any, Tensor], Any]] = {
    "of a quotient": lambda m, x: (
        x * torch.rsqrt((x.square().sum(-1) / x.shape[-1]).unsqueeze(-1) + EPS) * m.w
    ),
    "of a product with 1 / n": lambda m, x: (
        x * torch.rsqrt((x.square().sum(-1) * (1.0 / x.shape[-1])).unsqueeze(-1) + EPS) * m.w
    ),
    "of a product with n to the power of -1": lambda m, x: (
        x * torch.rsqrt((torch.sum(x * x, -1) * x.shape[-1] ** -1)[..., None] + EPS) * m.w
    ),
    "of the inverse root": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1) + EPS)[..., None] * (1 + m.w),
    "of a root, viewed": lambda m, x: m.w * x / (x.norm(dim=-1) ** 2 / H + EPS).sqrt().view(*x.shape[:-1], 1),
    "of a vector_norm": lambda m, x: (
        x * (torch.linalg.vector_norm(x, dim=-1).square() / H).add(EPS).rsqrt().unsqueeze(dim=-1) * m.w
    ),
    "of an einsum": lambda m, x: (
        x * (torch.einsum("...h,...h->...", x, x) / H + EPS).pow(-0.5)[..., None] * m.w
    ),
    "of a vecdot": lambda m, x: m.w * (x / (torch.linalg.vecdot(x, x) / H + EPS).sqrt().unsqueeze(-1)),
    "of a mean in float32": lambda m, x: (
        x.float() * (x.float().pow(2).mean(-1, dtype=torch.float32) + EPS).rsqrt().unsqueeze(-1) * m.w
    ).type_as(x),
}

# SwiGLU and gates

SWIGLUS: dict[str, Callable[[Any, Tensor], Any]] = {
    "F.silu(inplace=True)": lambda m, x: (F.silu(x @ m.wg.T, inplace=True) * (x @ m.wu.T)) @ m.wd.T,
    "g.sigmoid() * g * u": lambda m, x: (lambda g: g.sigmoid() * g * F.linear(x, m.wu))(F.linear(x, m.wg)),
    "u * g / (1 + exp(-g))": lambda m, x: (lambda g: F.linear(x, m.wu) * g / (1 + (-g).exp()))(
        F.linear(x, m.wg)
    ),
    "nn.Sequential(SiLU)": lambda m, x: nn.Sequential(nn.SiLU())(x.matmul(m.wg.t())).mul(x.matmul(m.wu.t())),
    "torch.ops.aten.silu": lambda m, x: torch.ops.aten.silu(F.linear(x, m.wg)) * F.linear(x, m.wu),
    "F.glu of what is beside it": lambda m, x: (lambda g, u: F.glu(torch.cat([g * u, g], dim=-1)))(
        F.linear(x, m.wg), F.linear(x, m.wu)
    ),
    "one projection, chunk": lambda m, x: (lambda g, u: F.silu(g) * u)(
        *F.linear(x, torch.cat([m.wg, m.wu])).chunk(2, dim=-1)
    ),
    "mul_ on sigmoid": lambda m, x: (lambda g: g.sigmoid().mul_(g).mul_(F.linear(x, m.wu)))(
        F.linear(x, m.wg)
    ),
    "tensor_split": lambda m, x: (lambda g, u: torch.mul(input=u, other=nn.functional.silu(input=g)))(
        *F.linear(x, torch.cat([m.wg, m.wu])).tensor_split(2, -1)
    ),
    "g - g * sigmoid(-g)": lambda m, x: (lambda g: (g - g * torch.sigmoid(-g)) * F.linear(x, m.wu))(
        F.linear(x, m.wg)
    ),
    "g * exp(g) / (1 + exp(g))": lambda m, x: (
        lambda g: g * (torch.exp(g) / (1 + torch.exp(g))) * F.linear(x, m.wu)
    )(F.linear(x, m.wg)),
    "F.glu of twice the same": lambda m, x: (lambda g: F.glu(torch.cat([g, g], -1), -1) * F.linear(x, m.wu))(
        F.linear(x, m.wg)
    ),
    "einsum of both": lambda m, x: torch.einsum(
        "...i,...i->...i", F.silu(F.linear(x, m.wg)), F.linear(x, m.wu)
    ),
    "half of 1 + tanh, in one product": lambda m, x: (
        lambda g: 0.5 * g * (1 + torch.tanh(g / 2)) * F.linear(x, m.wu)
    )(F.linear(x, m.wg)),
    "half of tanh": lambda m, x: (lambda g: 0.5 * (torch.tanh(0.5 * g) + 1) * g * F.linear(x, m.wu))(
        F.linear(x, m.wg)
    ),
    "g * exp(logsigmoid(g))": lambda m, x: (lambda g: g * F.logsigmoid(g).exp() * F.linear(x, m.wu))(
        F.linear(x, m.wg)
    ),
}

GATES: dict[str, Callable[..., Any]] = {
    "joined heads": lambda m, y, g: y.flatten(2) * torch.sigmoid(g.flatten(2)),
    "F.glu": lambda m, y, g: F.glu(torch.cat((y, g), dim=-1), dim=-1),
    "out of place of in place": lambda m, y, g: y.mul(g.clone().sigmoid_()),
    "special.expit": lambda m, y, g: torch.special.expit(g) * y,
    "divided": lambda m, y, g: y / (1 + torch.exp(-g)),
    "divided by 1 + exp, reciprocal": lambda m, y, g: torch.reciprocal(1 + torch.exp(g.neg())) * y,
    "softmax with zero": lambda m, y, g: (
        y * F.softmax(torch.stack([g, torch.zeros_like(g)], dim=-1), dim=-1)[..., 0]
    ),
    "softmax after zero": lambda m, y, g: torch.stack([torch.zeros_like(g), g]).softmax(0)[1] * y,
    "a half and half of tanh": lambda m, y, g: y * (0.5 + 0.5 * torch.tanh(0.5 * g)),
    "signs inside and outside": lambda m, y, g: -(-y * g.sigmoid()) * 1,
    "double negation": lambda m, y, g: -((-y) * g.sigmoid()),
    "the complement": lambda m, y, g: y * (1 - torch.sigmoid(-g)),
    "einsum": lambda m, y, g: torch.einsum("bthd,bthd->bthd", y, g.sigmoid()),
}

# Linears of one input

LINEARS: dict[str, Callable[[Any, Tensor], Any]] = {
    "left multiplication": lambda m, x: [(m.wq @ x.mT).mT, (m.wk @ x.mT).mT, (m.wv @ x.transpose(1, 2)).mT],
    "bmm": lambda m, x: [torch.bmm(x, w.t().expand(B, -1, -1)) for w in (m.wq, m.wk, m.wv)],
    "baddbmm of a copy": lambda m, x: [
        torch.baddbmm(b, x, w.t().contiguous()[None].expand(B, -1, -1))
        for w, b in ((m.wq, m.bq), (m.wk, m.bk), (m.wv, m.bv))
    ],
    "baddbmm": lambda m, x: [
        torch.baddbmm(b, x, w.mT.unsqueeze(0).repeat_interleave(1, 0).expand(B, H, -1))
        for w, b in ((m.wq, m.bq), (m.wk, m.bk), (m.wv, m.bv))
    ],
    "addmm on rows": lambda m, x: [
        torch.addmm(b, x.flatten(0, 1), w.T).unflatten(0, (B, T))
        for w, b in ((m.wq, m.bq), (m.wk, m.bk), (m.wv, m.bv))
    ],
    "einsum, three ways": lambda m, x: [
        torch.einsum("b t h, o h -> b t o", x, m.wq),
        torch.einsum("oh,...h->...o", m.wk, x),
        torch.einsum("bth,ho->bto", x, m.wv.t()),
    ],
    "tensordot and inner": lambda m, x: [
        torch.tensordot(x, m.wq, dims=([2], [1])),
        torch.inner(x, m.wk),
        torch.tensordot(x, m.wv.t(), 1),
    ],
    "mixed, named": lambda m, x: [
        F.linear(input=x, weight=m.wq, bias=m.bq),
        torch.add(torch.matmul(input=x, other=m.wk.T), m.bk),
        m.bv + x.reshape(-1, H).mm(m.wv.t()).view(B, T, D),
    ],
    "a copy for each": lambda m, x: [F.linear(x.clone(), w) for w in (m.wq, m.wk, m.wv)],
    "detached": lambda m, x: [F.linear(x.detach(), w) for w in (m.wq, m.wk, m.wv)],
    "out=": lambda m, x: [
        torch.matmul(x, w.t(), out=torch.empty(B, T, w.shape[0])) for w in (m.wq, m.wk, m.wv)
    ],
    "out=, of x's own making": lambda m, x: [
        torch.matmul(x, w.t(), out=x.new_empty(B, T, w.shape[0])) for w in (m.wq, m.wk, m.wv)
    ],
    "copies of the transposes": lambda m, x: [x @ w.T.contiguous() for w in (m.wq, m.wk, m.wv)],
    "heads in an einsum": lambda m, x: [
        torch.einsum("bti,hki->bthk", x, m.wq.view(2, 8, H)),
        torch.einsum("hki,bti->bthk", m.wk.unflatten(0, (2, 4)), x),
        torch.einsum("bti,oi->bto", x, m.wv),
    ],
    "convolutions of one tap": lambda m, x: [
        F.conv1d(x.mT, w[:, :, None], b).mT for w, b in ((m.wq, m.bq), (m.wk, m.bk), (m.wv, m.bv))
    ],
    "nothing added": lambda m, x: [
        torch.addmm(torch.zeros(16), x.reshape(-1, H), m.wq.T).view(B, T, -1),
        torch.baddbmm(torch.zeros(1, 1, D), x, m.wk.T.expand(B, -1, -1)),
        x @ m.wv.T,
    ],
    "one row at a time": lambda m, x: [(x.unsqueeze(-2) @ w.t()).squeeze(-2) for w in (m.wq, m.wk, m.wv)],
}


# Rotated attention over heads that share a key, and the gates of the delta rule


def rotate_cat(x: Tensor) -> Tensor:
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotate_stack(x: Tensor) -> Tensor:
    first, second = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.stack((second.neg(), first), dim=-2).flatten(-2)


def rotate_roll(x: Tensor) -> Tensor:
    return torch.cat([-x.roll(D // 2, -1)[..., : D // 2], x[..., : D // 2]], -1)


def filled(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., : D // 2] = -x[..., D // 2 :]
    out[..., D // 2 :] = x[..., : D // 2]
    return out


def by_a_matrix(x: Tensor) -> Tensor:
    turning = torch.zeros(D, D)
    turning[D // 2 :, : D // 2] = -torch.eye(D // 2)
    turning[: D // 2, D // 2 :] = torch.eye(D // 2)
    return x @ turning


def attention(
    turn: Callable[[Tensor], Tensor] = rotate_cat,
    rotate: Callable[..., Tensor] | None = None,
    repeat: Callable[[Tensor], Tensor] = lambda k: k.repeat_interleave(2, dim=1),
    norm: Callable[[Tensor, Tensor], Tensor] | None = None,
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Callable[..., Any]:
    def compute(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        norms = norm or (lambda y, w: y * torch.rsqrt(y.pow(2).mean(-1, True) + EPS) * (1 + w))
        turned = rotate or (lambda y, c, s: y * c + turn(y) * s)
        c, s = cos[None, None], sin[None, None]
        q = norms(F.linear(x, m.wq).view(B, T, 2, D), m.bk).transpose(1, 2)
        k = norms(F.linear(x, m.wk).view(B, T, 1, D), m.bv).transpose(1, 2)
        v = F.linear(x, m.wv).view(B, T, 1, D).transpose(1, 2)
        y = attend(turned(q, c, s), repeat(turned(k, c, s)), repeat(v))
        return y.transpose(1, 2).reshape(B, T, 2 * D)

    return compute


def by_halves(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = y.chunk(2, -1)
    half = D // 2
    c1, c2, s1, s2 = c[..., :half], c[..., half:], s[..., :half], s[..., half:]
    return torch.cat([a * c1 - b * s1, torch.addcmul(b * c2, a, s2)], dim=-1)


def with_half_tables(join: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """cos and sin of half the width, made whole on the way."""
    return lambda y, c, s: y * join(c[..., : D // 2]) + rotate_cat(y) * join(s[..., : D // 2])


def by_half_tables(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    (a, b), c, s = y.chunk(2, -1), c[..., : D // 2], s[..., : D // 2]
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


def stacked_halves(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    (a, b), c, s = y.chunk(2, -1), c[..., : D // 2], s[..., : D // 2]
    return torch.stack([a * c - b * s, a * s + b * c], dim=-2).flatten(-2)


def by_signs(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    signs = torch.tensor([-1.0] * (D // 2) + [1.0] * (D // 2))
    return y * c + torch.cat([y[..., D // 2 :], y[..., : D // 2]], -1) * signs * s


def as_complex_numbers(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = D // 2
    y = torch.complex(y[..., :half], y[..., half:]) * torch.complex(c[..., :half], s[..., :half])
    return torch.cat([y.real, y.imag], dim=-1)


def halves_of(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], dim=-1)


def as_viewed_numbers(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = D // 2
    z = torch.view_as_complex(y.unflatten(-1, (2, half)).transpose(-1, -2).contiguous())
    z = z * torch.complex(c[..., :half], s[..., :half])
    return torch.view_as_real(z).mT.flatten(-2)


def as_viewed_pairs(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = D // 2
    z = torch.view_as_complex(torch.stack(y.chunk(2, -1), dim=-1))
    e = torch.view_as_complex(torch.stack([c[..., :half], s[..., :half]], dim=-1))
    return torch.cat(torch.view_as_real(z * e).unbind(-1), dim=-1)


def by_a_conjugate(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = D // 2
    e = torch.complex(c[..., :half], -s[..., :half]).conj()
    return halves_of(torch.complex(y[..., :half], y[..., half:]) * e)


def between_conjugates(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = D // 2
    z, e = torch.complex(y[..., :half], y[..., half:]), torch.complex(c[..., :half], s[..., :half])
    return halves_of((z.conj() * e.conj()).conj())


def the_other_way(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = D // 2
    z, e = torch.complex(y[..., :half], y[..., half:]), torch.complex(c[..., :half], s[..., :half])
    return halves_of(z * e.conj())


def of_the_conjugate(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    half = D // 2
    z, e = torch.complex(y[..., :half], y[..., half:]), torch.complex(c[..., :half], s[..., :half])
    return halves_of(z.conj() * e)


def first_half_into_a_clone(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    turned, out, c, s = y[..., : D // 2], y.clone(), c[..., : D // 2], s[..., : D // 2]
    a, b = turned.chunk(2, -1)
    out[..., : D // 2] = turned * c + torch.cat([-b, a], -1) * s
    return out


def first_half_by_wider_tables(y: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b, rest = y.split([D // 4, D // 4, D // 2], -1)
    c = F.pad(c[..., : D // 2], (0, D // 2), value=1.0)
    s = F.pad(s[..., : D // 2], (0, D // 2))
    return y * c + torch.cat([-b, a, torch.zeros_like(rest)], -1) * s


def in_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (1, 2))
    p = (torch.einsum("bngqd,bnkd->bngqk", q, k) * D**-0.5).softmax(-1)
    return torch.einsum("bngqk,bnkd->bngqd", p, v).flatten(1, 2)


def in_reshaped_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (torch.einsum("bngqd,bnkd->bngqk", q.reshape(B, 1, 2, T, D), k) * D**-0.5).softmax(-1)
    return torch.einsum("bngqk,bnkd->bngqd", p, v).reshape(B, 2, T, D)


def attention_by_hand(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = (F.linear(x, w).view(B, T, -1, D).transpose(1, 2) for w in (m.wq, m.wk, m.wv))
    c, s = cos[None, None], sin[None, None]
    q, k = (y * c + rotate_cat(y) * s for y in (q, k))
    return (torch.softmax(q @ k.mT * D**-0.5, -1) @ v).transpose(1, 2).reshape(B, T, 2 * D)


ATTENTIONS: dict[str, Callable[..., Any]] = {
    "rotate_half by cat": attention(),
    "rotate_half by stack": attention(turn=rotate_stack),
    "rotate_half by roll": attention(turn=rotate_roll),
    "addcmul": attention(rotate=lambda y, c, s: torch.addcmul(y * c, rotate_cat(y), s)),
    "by halves": attention(rotate=by_halves),
    "by half tables": attention(rotate=by_half_tables),
    "half tables joined": attention(rotate=with_half_tables(lambda t: torch.cat([t, t], dim=-1))),
    "half tables repeated": attention(rotate=with_half_tables(lambda t: t.repeat(1, 1, 1, 2))),
    "signs by a constant": attention(rotate=by_signs),
    "expand": attention(repeat=lambda k: k.expand(-1, 2, -1, -1)),
    "five dimensions": attention(repeat=lambda k: k[:, :, None].expand(B, 1, 2, T, D).flatten(1, 2)),
    "repeat": attention(repeat=lambda k: k.unsqueeze(2).repeat(1, 1, 2, 1, 1).reshape(B, 2, T, D)),
    "stacked": attention(repeat=lambda k: torch.stack([k, k], dim=2).flatten(1, 2)),
    "tiled": attention(repeat=lambda k: k.unsqueeze(2).tile(1, 1, 2, 1, 1).flatten(1, 2)),
    "F.rms_norm": attention(norm=lambda y, w: F.rms_norm(y, (D,), 1 + w, EPS)),
    "attention by hand": attention_by_hand,
    "rotate_half into empty memory": attention(turn=filled),
    "rotate_half by a matrix": attention(turn=by_a_matrix),
    "complex numbers": attention(rotate=as_complex_numbers),
    "memory as complex numbers": attention(rotate=as_viewed_numbers),
    "stacked pairs as complex numbers": attention(rotate=as_viewed_pairs),
    "a conjugate": attention(rotate=by_a_conjugate),
    "complex numbers between conjugates": attention(rotate=between_conjugates),
    "the first half, into a clone": attention(rotate=first_half_into_a_clone),
    "the first half, by wider tables": attention(rotate=first_half_by_wider_tables),
    "groups of heads, by einsum": attention(repeat=lambda k: k, attend=in_groups),
    "groups of heads whose halves were stacked": attention(
        rotate=stacked_halves, repeat=lambda k: k, attend=in_reshaped_groups
    ),
    "norms by a linear of ones": attention(
        norm=lambda y, w: (
            y * torch.rsqrt(F.linear(y.square(), torch.ones(1, y.shape[-1])) / D + EPS) * (1 + w)
        )
    ),
    "norms with plain weights": attention(
        norm=lambda y, w: y * torch.rsqrt(y.pow(2).mean(-1, True) + EPS) * w
    ),
}


def gates(
    softplus: Callable[[Tensor], Tensor],
    rate: Callable[[Tensor], Tensor] = torch.sigmoid,
    decay: Callable[[Tensor, Tensor], Tensor] = lambda speed, time: -speed * time,
) -> Callable[..., Any]:
    def compute(m: Any, x: Tensor) -> Any:
        g = decay(m.A_log.float().exp(), softplus(F.linear(x, m.wa).float() + m.dt_bias))
        beta = rate(F.linear(x, m.wb))
        q = F.linear(x, m.wq).unflatten(-1, (2, D))
        return torch.ops.fxfuse.chunk_gated_delta_rule(q, q, q, g, beta, None, True)

    return compute


GDN_GATES: dict[str, Callable[..., Any]] = {
    "log1p(exp)": gates(lambda a: torch.log1p(torch.exp(a))),
    "log(1 + exp)": gates(lambda a: (1 + a.exp()).log()),
    "logaddexp": gates(lambda a: torch.logaddexp(a, torch.zeros_like(a))),
    "logaddexp with a number": gates(lambda a: torch.logaddexp(torch.zeros(()), a)),
    "-logsigmoid(-a)": gates(lambda a: -F.logsigmoid(-a)),
    "-logsigmoid(-a), negated": gates(lambda a: -F.logsigmoid(-a), decay=lambda speed, time: speed * -time),
    "where": gates(lambda a: torch.where(a > 20, a, a.exp().log1p())),
    "where, the other way": gates(lambda a: torch.where(a <= 20.0, torch.log1p(a.exp()), a)),
    "relu + log1p": gates(lambda a: a.relu() + (-a.abs()).exp().log1p()),
    "clamp + log1p": gates(lambda a: a.clamp(min=0) + torch.log1p(torch.exp(-torch.abs(a)))),
    "F.softplus, named": gates(lambda a: F.softplus(input=a, beta=1, threshold=20)),
    "rate by tanh": gates(F.softplus, lambda b: (b / 2).tanh().add(1).div(2)),
    "rate by exp": gates(F.softplus, lambda b: 1.0 / (1.0 + torch.exp(-b))),
    "a + log1p(exp(-a))": gates(lambda a: a + torch.log1p(torch.exp(-a))),
    "a - logsigmoid(a)": gates(lambda a: torch.sub(a, F.logsigmoid(a))),
    "rate by its complement": gates(F.softplus, lambda b: 1 - torch.sigmoid(-b)),
}


GDN_GATES |= {
    f"{name} + log1p": gates(lambda a, part=part: part(a) + (-a.abs()).exp().log1p())  # type: ignore[misc]
    for name, part in {
        "maximum": lambda a: torch.maximum(a, torch.zeros_like(a)),
        "maximum of a constant": lambda a: torch.maximum(torch.tensor(0.0), a),
        "max": lambda a: torch.max(a, a.new_zeros(1)),
        "fmax": lambda a: torch.fmax(a, torch.full((), 0.0)),
        "clip": lambda a: torch.clip(a, min=0.0),
        "clamp, a tensor": lambda a: torch.clamp(a, min=torch.zeros_like(a)),
        "a * (a > 0)": lambda a: a * (a > 0),
        "(a >= 0) as a number, times a": lambda a: (a >= 0).to(a.dtype) * a,
        "a where it is positive, else 0": lambda a: torch.where(a > 0, a, 0.0),
        "0 where a is negative": lambda a: torch.where(a < 0, torch.zeros(()), a),
        "masked_fill": lambda a: a.masked_fill(a < 0, 0),
        "half of a + |a|": lambda a: (a + a.abs()) / 2,
        "threshold": lambda a: F.threshold(a, 0, 0),
        "minimum of negatives": lambda a: -torch.minimum(-a, torch.zeros_like(a)),
        "a less its negative part": lambda a: a - a.clamp(max=0),
    }.items()
}
GDN_GATES |= {
    "logaddexp with a constant": gates(lambda a: torch.logaddexp(a, torch.tensor(0.0))),
    "where, exp of a bounded": gates(
        lambda a: torch.where(a > 20.0, a, torch.log1p(torch.exp(torch.clamp(a, max=20.0))))
    ),
    "where, exp of a bounded, the other way": gates(
        lambda a: torch.where(a <= 20.0, a.clamp_max(30.0).exp().log1p(), a)
    ),
    "relu + softplus": gates(lambda a: a.relu() + F.softplus(-a.abs())),
    "relu - logsigmoid": gates(lambda a: a.relu() - F.logsigmoid(a.abs())),
    "logsumexp with zeros": gates(lambda a: torch.logsumexp(torch.stack([a, torch.zeros_like(a)]), 0)),
    "logsumexp along the last dimension": gates(
        lambda a: torch.logsumexp(torch.cat([a[..., None], a.new_zeros(*a.shape, 1)], -1), -1)
    ),
    "-log(sigmoid(-a))": gates(lambda a: -torch.log(torch.sigmoid(-a))),
    "log of the inverse sigmoid": gates(lambda a: torch.log(1 / torch.sigmoid(-a))),
    "log(sigmoid(-a)) times the speed": gates(
        lambda a: torch.sigmoid(-a).log(), decay=lambda speed, time: speed * time
    ),
    "the least of a and -a": gates(lambda a: a.clamp(min=0) + torch.minimum(a, -a).exp().log1p()),
    "expm1": gates(lambda a: torch.log(torch.expm1(a) + 2)),
    "to the base of 2": gates(lambda a: torch.log2(1 + torch.exp2(a / math.log(2))) * math.log(2)),
    "relu + log(1 + exp)": gates(lambda a: a.relu() + torch.log(1 + torch.exp(-a.abs()))),
}


def last_tap_first(m: Any, x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    y = m.taps[:, 0, 3].view(1, -1, 1) * x
    for i in range(3):
        y = y + m.taps[:, 0, i].view(1, -1, 1) * F.pad(x, (3 - i, 0))[..., :T]
    return y * torch.sigmoid(y)


def addcmul_over_taps(m: Any, x: Tensor) -> Tensor:
    padded = torch.cat([x.new_zeros(B, 3, H), x], dim=1)
    y = padded[:, :T] * m.taps[:, 0, 0]
    for k in range(1, 4):
        y = torch.addcmul(y, padded.narrow(1, k, T), m.taps[:, 0, k])
    return F.silu(y + m.w)


def convolved(write: Callable[..., Tensor]) -> Callable[..., Any]:
    """[B, T, C] again, as projections want it."""
    return lambda m, x: write(m, x).transpose(1, 2)


CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "padded, cut": convolved(lambda m, x: F.silu(F.conv1d(x.mT, m.taps, padding=3, groups=H)[..., :T])),
    "padded before": convolved(lambda m, x: F.silu(F.conv1d(F.pad(x.mT, [3, 0]), m.taps, groups=H))),
    "zeros before": convolved(
        lambda m, x: F.silu(
            F.conv1d(torch.cat([x.new_zeros(B, H, 3), x.transpose(1, 2)], 2), m.taps, groups=H)
        )
    ),
    "cut from behind": convolved(lambda m, x: F.silu(F.conv1d(x.mT, m.taps, padding=3, groups=H)[:, :, :-3])),
    "silu by sigmoid": convolved(
        lambda m, x: (lambda y: y * y.sigmoid())(
            F.conv1d(x.permute(0, 2, 1), m.taps, None, 1, 3, 1, H).narrow(-1, 0, T)
        )
    ),
    "silu in place": convolved(
        lambda m, x: F.silu(F.conv1d(x.mT, m.taps, padding=(3,), groups=H)[..., :T], inplace=True)
    ),
    "shifted products, tokens first": lambda m, x: sum(
        F.pad(x, (0, 0, 3, 0))[:, k : k + T] * m.taps[:, 0, k] for k in range(4)
    ),
    "shifted products": convolved(
        lambda m, x: F.silu(
            sum(F.pad(x.mT, (3, 0))[..., k : k + T] * m.taps[:, 0, k][:, None] for k in range(4))
        )
    ),
    "the last tap first": lambda m, x: F.linear(last_tap_first(m, x).mT, m.wk),
    "windows, einsum": convolved(
        lambda m, x: F.silu(torch.einsum("bctk,ck->bct", F.pad(x.mT, (3, 0)).unfold(-1, 4, 1), m.taps[:, 0]))
    ),
    "windows, sum": convolved(
        lambda m, x: (F.pad(x.mT, (3, 0)).unfold(2, 4, 1) * m.taps).sum(-1) + m.w[:, None]
    ),
    "zeros before, addcmul": addcmul_over_taps,
}

# Linears whose features are put into another order


def reordered(project: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def compute(m: Any, x: Tensor) -> list[Tensor]:
        parts = project(x, m.wq).view(B, T, 2, 8).split([3, 3, 2], dim=-1)
        joined = torch.cat([part.reshape(B, T, -1) for part in parts], dim=-1)
        return [F.linear(joined, m.wd), project(x, m.wk).view(B, T, 2, 4) + 1]

    return compute


CHAINS: dict[str, Callable[..., Any]] = {
    "F.linear": reordered(F.linear),
    "rows by mm": reordered(lambda x, w: (x.reshape(-1, H) @ w.T).view(B, T, -1)),
    "rows by F.linear": reordered(lambda x, w: F.linear(x.flatten(0, 1), w).unflatten(0, (B, T))),
    "rows, put back at once": reordered(lambda x, w: torch.mm(x.view(-1, H), w.t())),
}

ANGLES = [torch.randn(T, D, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
SETS: dict[str, tuple[dict[str, Callable[..., Any]], Callable[[], list[Tensor]]]] = {
    "rms_norm": (NORMS, hidden),
    "swiglu": (SWIGLUS, hidden),
    "sigmoid_gate": (GATES, lambda: two(B, T, 2, D)),
    "same_input_linears": (LINEARS, hidden),
    "qk_norm_rope_gate": (ATTENTIONS, lambda: [*hidden(), *ANGLES]),
    "gdn_gates": (GDN_GATES, hidden),
    "causal_conv1d": (CONVOLUTIONS, hidden),
    "layout_chains": (CHAINS, hidden),
    **STEPS,
}
CASES = [(rule, name) for rule, (spellings, _) in SETS.items() for name in spellings]


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_a_strangers_spelling_is_matched_and_computes_the_same(rule: str, name: str) -> None:
    spellings, inputs = SETS[rule]
    module, given = Block(spellings[name]), inputs()
    rewritten = rewrite(module, given, passes=(rule,), dynamic=False)
    reasons = [miss.reason for miss in rewritten.report.misses]
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    matches = rewritten.report.graphs[0].outcomes[rule].matches
    assert len(matches) == 1, reasons or "no candidate was seen"
    if rule == "same_input_linears":
        assert matches[0].detail.startswith("3 linears")


@pytest.mark.parametrize("name", DELTA_STEPS)
def test_a_step_in_one_dtype(name: str) -> None:
    """Nothing but shapes tells a value from a key of as many features."""
    module, given = Block(DELTA_STEPS[name]), [x.float() for x in step_inputs()]
    rewritten = rewrite(module, given, passes=("recurrent_gated_delta_rule",), dynamic=False)
    reasons = [miss.reason for miss in rewritten.report.misses]
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == 1, reasons


@pytest.mark.parametrize("name", RETURNED)
def test_a_step_whose_state_is_returned(name: str) -> None:
    """It is not written over the one before, and leaves the graph as it is."""
    compute, expected = RETURNED[name]
    module, given = Block(compute), step_inputs()
    module.forward = lambda *inputs: compute(module, *inputs)  # type: ignore[method-assign]
    rewritten = rewrite(module, given, passes=("recurrent_gated_delta_rule",), dynamic=False)
    reasons = [miss.reason for miss in rewritten.report.misses]
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == expected, reasons


# What computes the same, or nearly, and is left alone on purpose; the key says why.


def pairs_side_by_side(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


LEFT_ALONE: dict[str, tuple[str, Callable[..., Any]]] = {
    **NO_STEPS,
    "the default epsilon of nn.RMSNorm is another one in each dtype": (
        "rms_norm",
        lambda m, x: F.rms_norm(x, (H,), m.w),
    ),
    "F.normalize bounds the norm by its epsilon and adds none": (
        "rms_norm",
        lambda m, x: F.normalize(x, dim=-1, eps=EPS) * H**0.5 * m.w,
    ),
    "the logarithm of another base": (
        "rms_norm",
        lambda m, x: x * torch.exp(-0.5 * torch.log2(x.square().mean(-1, keepdim=True) + EPS)) * m.w,
    ),
    "weights that are not all 1 / n": (
        "rms_norm",
        lambda m, x: x * torch.rsqrt(F.linear(x.square(), x.new_full((1, H), 2 / H)) + EPS) * m.w,
    ),
    "softmax with one": (
        "sigmoid_gate",
        lambda m, y, g: y * torch.stack([g, torch.ones_like(g)]).softmax(0)[0],
    ),
    "the other share of a softmax": (
        "sigmoid_gate",
        lambda m, y, g: y * torch.stack([g, torch.zeros_like(g)]).softmax(0)[1] * y,
    ),
    "tanh of the whole": ("sigmoid_gate", lambda m, y, g: y * (0.5 + 0.5 * torch.tanh(g))),
    "g + g * sigmoid(-g)": (
        "swiglu",
        lambda m, x: (lambda g: (g + g * torch.sigmoid(-g)) * F.linear(x, m.wu))(F.linear(x, m.wg)),
    ),
    "the exponential of another": (
        "sigmoid_gate",
        lambda m, y, g: y * (torch.exp(g) / (1 + torch.exp(g * 2))),
    ),
    "an epsilon outside the root is another function": (
        "rms_norm",
        lambda m, x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + EPS) * m.w,
    ),
    "variance and squared mean cancel": (
        "rms_norm",
        lambda m, x: x * torch.rsqrt(x.var(-1, True, keepdim=True) + x.mean(-1, True).square() + EPS) * m.w,
    ),
    "softplus of another beta": ("gdn_gates", gates(lambda a: F.softplus(a, beta=2.0))),
    "softplus that is linear too early": (
        "gdn_gates",
        gates(lambda a: torch.where(a > 1.0, a, a.exp().log1p())),
    ),
    "softplus of what is no positive part": (
        "gdn_gates",
        gates(lambda a: torch.maximum(a, torch.full_like(a, 0.1)) + (-a.abs()).exp().log1p()),
    ),
    "softplus and whole numbers far out": (
        "gdn_gates",
        gates(lambda a: F.softplus(a) + torch.div(a, 200, rounding_mode="trunc")),
    ),
    "softplus and integers far out": ("gdn_gates", gates(lambda a: F.softplus(a) + (a / 1e7).trunc())),
    "softplus that ends far out": ("gdn_gates", gates(lambda a: F.softplus(a) * torch.sigmoid(500 - a))),
    "softplus and an exponential far out": ("gdn_gates", gates(lambda a: F.softplus(a) + (a - 200).exp())),
    "softplus that is bounded below its threshold": (
        "gdn_gates",
        gates(lambda a: torch.where(a > 20.0, a, a.clamp(max=2.0).exp().log1p())),
    ),
    **{
        f"softplus {name}": ("gdn_gates", gates(softplus))
        for name, softplus in {
            "that is linear from ten on": lambda a: torch.where(a > 10.0, a, a.exp().log1p()),
            "that F.softplus has linear from ten on": lambda a: F.softplus(a, 1.0, 10.0),
            "with another threshold": lambda a: F.threshold(a, 0.1, 0) + (-a.abs()).exp().log1p(),
            "with another value below zero": lambda a: a.masked_fill(a < 0, 0.01) + (-a.abs()).exp().log1p(),
            "with a third of a + |a|": lambda a: (a + a.abs()) / 3 + (-a.abs()).exp().log1p(),
            "of what is bounded": lambda a: F.softplus(a.clamp(max=12.0)),
            "of a sum with one": lambda a: torch.logsumexp(torch.stack([a, torch.ones_like(a)]), 0),
            "of neighbours": lambda a: torch.logsumexp(torch.stack([a, a.flip(-1)]), 0),
            "of twice as much": lambda a: -torch.log(torch.sigmoid(-2 * a)),
            "with the other sign": lambda a: torch.log(torch.sigmoid(-a)),
        }.items()
    },
    "softplus where it is larger than one": (
        "gdn_gates",
        gates(lambda a: a * (a > 1) + (-a.abs()).exp().log1p()),
    ),
    "a rotation the other way": ("qk_norm_rope_gate", attention(rotate=the_other_way)),
    "a rotation of the conjugate": ("qk_norm_rope_gate", attention(rotate=of_the_conjugate)),
    "a rotation of pairs side by side": ("qk_norm_rope_gate", attention(turn=pairs_side_by_side)),
    "a linear as a sum of products is no matrix product": (
        "same_input_linears",
        lambda m, x: [(x.unsqueeze(-2) * w).sum(-1) for w in (m.wk, m.wv)],
    ),
    "shifted products that see what comes": (
        "causal_conv1d",
        lambda m, x: sum(F.pad(x, (0, 0, 0, 3))[:, k : k + T] * m.taps[:, 0, k] for k in range(4)),
    ),
    "shifted products of too few columns": (
        "causal_conv1d",
        lambda m, x: sum(F.pad(x, (0, 0, 2, 1))[:, k : k + T] * m.taps[:, 0, k] for k in range(4)),
    ),
    "shifted products in front of which stand ones": (
        "causal_conv1d",
        lambda m, x: sum(F.pad(x, (0, 0, 3, 0), value=1.0)[:, k : k + T] * m.taps[:, 0, k] for k in range(4)),
    ),
    "a convolution that sees what comes": (
        "causal_conv1d",
        convolved(lambda m, x: F.conv1d(x.mT, m.taps, padding=3, groups=H)[..., 3:]),
    ),
}


@pytest.mark.parametrize("why", LEFT_ALONE)
def test_what_is_left_alone_on_purpose(why: str) -> None:
    rule, compute = LEFT_ALONE[why]
    module, given = Block(compute), SETS[rule][1]()
    rewritten = rewrite(module, given, passes=(rule,), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == 0


@pytest.mark.parametrize(
    ("softplus", "expected"),
    [
        (lambda a: torch.where(a > 20.0, a, a.exp().log1p()), 1),
        (lambda a: torch.where(a > 12.0, a, a.exp().log1p()), 0),
        (lambda a: F.softplus(a, 1.0, 11.0), 0),
        (lambda a: F.softplus(a) + 1e-3 * torch.exp(-4 * (a - 7).square()), 0),
    ],
)
def test_a_softplus_of_few_heads_is_looked_at_everywhere(
    softplus: Callable[[Tensor], Tensor], expected: int
) -> None:
    """Two random values in a trial would not meet the one place where it is another function."""
    module, given = Block(gates(softplus)), normal((1, 1, H))
    rewritten = rewrite(module, given, passes=("gdn_gates",), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == expected, rewritten.report.misses


@pytest.mark.parametrize("name", LATE_DIMENSIONS)
@pytest.mark.parametrize("sizes", [(B, T), (1, 1)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_root_mean_square_whose_dimension_comes_late(
    name: str, sizes: tuple[int, int], dynamic: bool
) -> None:
    module, given = Block(LATE_DIMENSIONS[name]), two(*sizes, H)[:1]
    rewritten = rewrite(module, given, passes=("rms_norm",), dynamic=dynamic)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == 1


@pytest.mark.parametrize("name", ["a linear of equal weights", "a product with ones", "numbers as tensors"])
def test_a_root_mean_square_by_weights_of_a_size_that_the_trace_has_found(name: str) -> None:
    module, given = Block(NORMS[name]), hidden()
    rewritten = rewrite(module, given, passes=("rms_norm",), dynamic=True)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == 1


@pytest.mark.parametrize(
    "again",
    [
        lambda total, w: (lambda root: (root[:, None] * w).sum(-1) * root)((total + EPS).rsqrt()),
        lambda total, w: (total + EPS).rsqrt()[:, None] * w + total.unsqueeze(-1),
        lambda total, w: (total + w.sum()).rsqrt()[:, None] * w,
        lambda total, w: (total.add_(1) + EPS).rsqrt()[..., None] * w,
    ],
)
def test_a_dimension_stays_late_where_a_sum_has_other_readers(again: Callable[..., Tensor]) -> None:
    module = Block(lambda m, x: again(x.square().sum(-1), m.w))
    given = two(T, H)[:1]
    rewritten = rewrite(module, given, passes=(), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None


def test_a_half_precision_norm_that_torch_export_has_traced() -> None:
    """It asserts the dtype in front of every cast."""
    compute = NORMS["x.square().mean"]
    module = Block(lambda m, x: compute(m, x.float()).to(x.dtype)).bfloat16()
    given = [x.bfloat16() for x in hidden()]
    exported = torch.export.export(module, tuple(given)).module()
    rewritten = rewrite(exported, given, passes=("rms_norm",), dynamic=False)
    assert rewritten.report.matched == 1, rewritten.report.misses


@pytest.mark.parametrize("batch", [1, 2])
def test_gates_of_one_token_without_a_dimension_of_time(batch: int) -> None:
    def compute(m: Any, q: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        g = (-m.A_log.exp() * F.softplus(a + m.dt_bias)).unsqueeze(1)
        rule = torch.ops.fxfuse.recurrent_gated_delta_rule
        return rule(q, q, q, g, torch.sigmoid(b)[:, None], state, True)

    q, state = two(batch, 1, 2, D)[0], two(batch, 2, D, D)[0]
    module, given = Block(compute), [q, *two(batch, 2), state]
    rewritten = rewrite(module, given, passes=("gdn_gates",), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == 1, rewritten.report.misses


def quarters(m: Any, x: Tensor) -> list[Tensor]:
    """Four features of each head, then the other four."""
    parts = [y.chunk(2, -1) for y in F.linear(x, m.wq).view(B, T, 2, 8).chunk(2, -1)]
    return [torch.cat([y.flatten(2) for y in pair], dim=-1) for pair in zip(*parts, strict=True)]


LEAVING: dict[str, tuple[str, Callable[..., Any]]] = {
    "a convolution": (
        "causal_conv1d",
        lambda m, x: F.silu(F.conv1d(x.mT, m.taps, padding=3, groups=H)[..., :T]),
    ),
    "shifted products": (
        "causal_conv1d",
        lambda m, x: sum(F.pad(x.mT, (3, 0))[..., k : k + T] * m.taps[:, 0, k][:, None] for k in range(4)),
    ),
    "a step of a convolution": (
        "causal_conv1d_update",
        lambda m, x, state: (
            lambda columns: (
                F.silu(F.conv1d(columns, m.taps, groups=H)[..., -2:]),
                state.copy_(columns[..., -4:]),
            )
        )(torch.cat([state, x], dim=-1))[0],
    ),
    "features in another order": (
        "layout_chains",
        lambda m, x: torch.cat(
            [part.reshape(B, T, -1) for part in F.linear(x, m.wq).view(B, T, 2, 8).split([3, 3, 2], dim=-1)],
            dim=-1,
        ),
    ),
    "features in another order, and others": ("layout_chains", quarters),
    "features in another order that are read by their strides": (
        "layout_chains",
        lambda m, x: quarters(m, x)[0].as_strided((B * T * 8,), (1,)),
    ),
    "a convolution that is read by its strides": (
        "causal_conv1d",
        lambda m, x: F.silu(F.conv1d(x.mT, m.taps, padding=3, groups=H)[..., :T]).as_strided(
            (B * H * T,), (1,)
        ),
    ),
    "features in another order, turned": (
        "layout_chains",
        lambda m, x: (
            torch.cat([y.flatten(2) for y in F.linear(x, m.wq).view(B, T, 2, 8).chunk(2, -1)], -1).mT
        ),
    ),
}


@pytest.mark.parametrize("what", LEAVING)
@pytest.mark.parametrize("pointwise", [False, True])
def test_what_leaves_the_graph_is_matched_and_laid_out_as_it_was(what: str, pointwise: bool) -> None:
    rule, compute = LEAVING[what]
    given = normal((B, H, 2), (B, H, 4)) if rule == "causal_conv1d_update" else hidden()
    module = Block(compute)
    module.forward = lambda *inputs: [  # type: ignore[method-assign]
        y * (2 if pointwise else 1) for y in _listed(compute(module, *inputs))
    ]
    rewritten = rewrite(module, given, passes=(rule,), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.graphs[0].outcomes[rule].matches, rewritten.report.misses
    memories = [
        {y.untyped_storage().data_ptr() for y in f(*(x.clone() for x in given))}
        for f in (module, rewritten.graph_module)
    ]
    assert len(memories[0]) == len(memories[1])


def test_rows_written_by_an_index_are_a_cache_of_the_prologue() -> None:
    """cache[:, :, p] = k counts negative positions from the end; the operator takes none."""

    def compute(m: Any, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, p: Tensor) -> Any:
        q, k, v = (F.linear(x, w).view(B, T, -1, D).transpose(1, 2) for w in (m.wq, m.wk, m.wv))
        c, s = cos[None, None], sin[None, None]
        keys[:, :, p] = k * c + rotate_cat(k) * s
        values[:, :, p] = v
        q = q * c + rotate_cat(q) * s
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True).transpose(1, 2)

    module, given = Block(compute), [*hidden(), *ANGLES, *two(B, 1, 9, D), torch.arange(T) - T]
    rewritten = rewrite(module, given, passes=("qk_norm_rope_gate",), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == 1, rewritten.report.misses


CACHES: dict[str, Callable[..., Any]] = {
    "a part of it is assigned": lambda cache, k, p, dim: (
        cache.narrow(dim, 2, k.shape[dim]).copy_(k),
        cache,
    ),
    "a part of it is assigned, and its start read": lambda cache, k, p, dim: (
        cache.narrow(dim, 2, k.shape[dim]).copy_(k),
        cache.narrow(dim, 0, k.shape[dim] + 2),
    ),
    "index_copy_": lambda cache, k, p, dim: (cache.index_copy_(dim, p, k),) * 2,
    "scatter_": lambda cache, k, p, dim: (
        (cache.scatter_(dim, p.view(*(-1 if i == dim else 1 for i in range(4))).expand_as(k), k),) * 2
    ),
    "appended to": lambda cache, k, p, dim: (None, torch.cat([cache, k], dim)),
}


def with_caches(write: Callable[..., Any], tokens_first: bool, joined: bool = False) -> Callable[..., Any]:
    def compute(m: Any, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, p: Tensor) -> Any:
        q, k, v = (F.linear(x, w).unflatten(-1, (-1, D)) for w in (m.wq, m.wk, m.wv))
        c, s = cos[:, None], sin[:, None]
        q, k = (y * c + rotate_cat(y) * s for y in (q, k))
        k, v = (y if tokens_first else y.transpose(1, 2) for y in (k, v))
        k, v = (write(cache, y, p, 1 if tokens_first else 2)[1] for cache, y in ((keys, k), (values, v)))
        both = [y.transpose(1, 2) if tokens_first else y for y in (k, v)]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), *both, enable_gqa=True).transpose(1, 2)
        return [y, k, v] if joined else y

    return compute


def given_caches(tokens_first: bool) -> list[Tensor]:
    caches = two(B, 9, 1, D) if tokens_first else two(B, 1, 9, D)
    return [*hidden(), *ANGLES, *caches, torch.arange(T) + 2]


def test_angles_are_not_written_between_query_and_key() -> None:
    def compute(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, v, k = (F.linear(x, w).view(B, T, -1, D).transpose(1, 2) for w in (m.wq, m.wv, m.wk))
        q = q * cos + rotate_cat(q) * sin
        read = q * 2
        cos.mul_(0.5)
        k = k * cos + rotate_cat(k) * sin
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), read

    module, given = Block(compute), [*hidden(), *ANGLES]
    rewritten = rewrite(module, given, passes=("qk_norm_rope_gate",), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None


@pytest.mark.parametrize("read", [False, True])
def test_a_value_may_be_projected_last(read: bool) -> None:
    def compute(m: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k = (F.linear(x, w).view(B, T, -1, D).transpose(1, 2) for w in (m.wq, m.wk))
        q, k = (y * cos + rotate_cat(y) * sin for y in (q, k))
        shown = [q * 2] if read else []
        v = F.linear(x, m.wv).view(B, T, -1, D).transpose(1, 2)
        return [F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *shown]

    module, given = Block(compute), [*hidden(), *ANGLES]
    rewritten = rewrite(module, given, passes=("qk_norm_rope_gate",), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == (not read)
    assert not any("undone" in miss.reason for miss in rewritten.report.misses)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_caches_of_the_prologue(name: str, tokens_first: bool, dynamic: bool) -> None:
    joined = name == "appended to"
    module, given = Block(with_caches(CACHES[name], tokens_first, joined)), given_caches(tokens_first)
    rewritten = rewrite(module, given, passes=("qk_norm_rope_gate",), dynamic=dynamic)
    assert difference(module, rewritten.graph_module, given, exact=False) is None
    assert rewritten.report.matched == 1, rewritten.report.misses
    (match,) = rewritten.report.graphs[0].outcomes["qk_norm_rope_gate"].matches
    assert joined or match.detail.endswith("cache in place")


@pytest.mark.parametrize("tokens_first", [False, True])
def test_every_other_row_of_a_cache_stays_one(tokens_first: bool) -> None:
    module = Block(
        with_caches(
            lambda c, k, p, dim: (c[(slice(None),) * dim + (slice(0, 9, 2),)].copy_(k), c), tokens_first
        )
    )
    given = given_caches(tokens_first)
    rewritten = rewrite(module, given, passes=("qk_norm_rope_gate",), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None


@pytest.mark.parametrize("name", ["a part of it is assigned", "index_copy_"])
def test_caches_that_are_returned_are_the_same_tensors(name: str) -> None:
    block = Block(with_caches(CACHES[name], True, joined=True))
    block.forward = lambda *inputs: block.compute(block, *inputs)  # type: ignore[method-assign]
    given = given_caches(True)
    rewritten = rewrite(block, given, passes=("qk_norm_rope_gate",), dynamic=False)
    assert rewritten.report.matched == 1, rewritten.report.misses
    _, keys, values = rewritten.graph_module(*given)
    assert keys is given[3] and values is given[4]


KEPT: dict[str, tuple[str, Callable[..., Any]]] = {
    "the dtype of a cast behind a convolution": (
        "causal_conv1d",
        lambda m, x: F.silu(F.conv1d(x.mT, m.taps, padding=3, groups=H)[..., :T]).half().mT.contiguous(),
    ),
    "the strides of a convolution": ("causal_conv1d", CONVOLUTIONS["padded, cut"]),
    "the strides of a product with the weight first": ("same_input_linears", LINEARS["left multiplication"]),
    "the strides of a gated tensor": (
        "sigmoid_gate",
        lambda m, y, g: y.transpose(1, 2) * g.mT.mT.transpose(1, 2).sigmoid(),
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_leaves_the_graph_looks_as_it_did(what: str) -> None:
    """Its dtype, and its strides behind calls that hand them on."""
    rule, compute = KEPT[what]
    module, given = Block(compute), SETS[rule][1]()
    module.forward = lambda *inputs: [y * 2 for y in _listed(compute(module, *inputs))]  # type: ignore[method-assign]
    rewritten = rewrite(module, given, passes=(rule,), dynamic=False)
    assert difference(module, rewritten.graph_module, given, exact=False) is None


def _listed(made: Any) -> list[Tensor]:
    return made if isinstance(made, list) else [made]
