"""From attention's projections to what attention reads, in one launch, writing k and v into a static cache.

Per head: query and gate taken apart, zero-centred RMSNorm of q and k, rotary embedding of the first R
features, x·cos + rotate_half(x)·sin, in float32 and rounded once. Formulas: `rms_norm`; Su et al.,
"RoFormer" (2021), with the halves of GPT-NeoX; partial rotation as in Qwen3-Next.

`qk_norm_rope` is the same without a copy of the gate, for consumers that read it where the projection left
it, as `sigmoid_gate_mul` does. Without weights both rotate only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import qk_norm_rope_gate_kernel, triton_kernel
from fxfuse.runtime.ops.activations import wide
from fxfuse.runtime.ops.arguments import check_tensors, check_written
from fxfuse.runtime.ops.listed_once import operator

MAX_HEAD_DIM = 1024
CACHES = ("key_cache", "value_cache")


class Given(NamedTuple):
    """What both operators take.

    Attributes:
        query: [B, T, nh, D], or each head's query and gate, [B, T, nh, 2·D]; key, value: [B, T, nkv, D]; any
            float dtypes and strides.
        q_weight, k_weight: [D], zero-centred, or None both where nothing is normed.
        cos, sin: [B or 1, T, R], R even and at most D.
        key_cache, value_cache: [B, nkv, L, D], L of each its own, in place at the positions. Where there is
            no static cache they are empty tensors with L = T.
        positions: integers [T], or one alone for the first of T that follow each other. All have to be
            inside the cache; on a GPU one that is not is not written.
        eps: of the norms.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    positions: Tensor
    eps: float

    @property
    def weights(self) -> tuple[Tensor | None, Tensor | None]:
        return self.q_weight, self.k_weight

    def halves(self) -> tuple[Given, Tensor]:
        """The same with the query alone, and the gate."""
        query, gate = self.query.chunk(2, dim=-1)
        return self._replace(query=query), gate


def _normed_and_rotated(x: Tensor, weight: Tensor | None, given: Given) -> Tensor:
    value = wide(x)
    if weight is not None:
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + given.eps) * (1.0 + wide(weight))
    rotary = given.cos.shape[-1]
    turned, rest = value[..., :rotary], value[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    other = torch.cat([-second, first], dim=-1)
    turned = turned * wide(given.cos).unsqueeze(2) + other * wide(given.sin).unsqueeze(2)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)


def reference(*arguments: Any) -> Tensor:
    """All but the gate, in plain torch, of the fields of `Given`.

    Returns:
        [B, nh, T, D] in the dtype of query, contiguous.
    """
    given = Given(*arguments)
    length, places = given.query.shape[1], given.positions.reshape(-1)
    if places.numel() != length:
        places = places + torch.arange(length, device=places.device, dtype=places.dtype)
    rotated = _normed_and_rotated(given.key, given.k_weight, given).transpose(1, 2)
    given.key_cache.index_copy_(2, places, rotated.to(given.key_cache.dtype))
    value = given.value.transpose(1, 2).to(given.value_cache.dtype)
    given.value_cache.index_copy_(2, places, value)
    return _normed_and_rotated(given.query, given.q_weight, given).transpose(1, 2).contiguous()


def gate_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`reference` of the query's first halves, and its second halves copied."""
    given, gate = Given(*arguments).halves()
    return reference(*given), gate.clone(memory_format=torch.contiguous_format)


def launch(*arguments: Any) -> Tensor:
    """`reference` by the Triton kernel, one launch."""
    return qk_norm_rope_gate_kernel.launch(Given(*arguments), None)[0]


def gate_launch(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`gate_reference` by the Triton kernel, one launch."""
    return qk_norm_rope_gate_kernel.launch(*Given(*arguments).halves())


def unsupported(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel takes these on no device, or None."""
    if key.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {key.shape[-1]}: one program holds at most {MAX_HEAD_DIM}"
    return triton_kernel.unsupported(query, key, *rest)


def refusal(query: Tensor, key: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel does not take these here, or None."""
    return unsupported(query, key, *rest) or triton_kernel.refusal(query, key, *rest)


LAYOUTS = {
    "query": "[B, T, nh, D]",
    **dict.fromkeys(("key", "value"), "[B, T, nkv, D]"),
    **dict.fromkeys(("q_weight", "k_weight"), "[D]"),
    **dict.fromkeys(("cos", "sin"), "[B, T, R]"),
    **dict.fromkeys(CACHES, "[B, nkv, L, D]"),
}


def _check(name: str, given: Given) -> None:
    check_tensors(name, **{each: (layout, getattr(given, each)) for each, layout in LAYOUTS.items()})
    batch, length, _, head_dim = given.query.shape
    kv_heads, rotary = given.key.shape[2], given.cos.shape[-1]
    caches = [(batch, kv_heads, cache.shape[2], head_dim) for cache in (given.key_cache, given.value_cache)]
    expected: dict[str, tuple[tuple[int, ...], ...]] = {
        "key": ((batch, length, kv_heads, head_dim),),
        "value": ((batch, length, kv_heads, head_dim),),
        "q_weight": ((head_dim,),),
        "k_weight": ((head_dim,),),
        "cos": ((batch, length, rotary), (1, length, rotary)),
        "sin": ((batch, length, rotary), (1, length, rotary)),
        "key_cache": (caches[0],),
        "value_cache": (caches[1],),
    }
    found = {what: getattr(given, what) for what in expected}
    wrong = [
        f"{what} is {tuple(x.shape)}, not {' or '.join(map(str, expected[what]))}"
        for what, x in found.items()
        if x is not None and tuple(x.shape) not in expected[what]
    ]
    if (given.q_weight is None) != (given.k_weight is None):
        wrong.append("one of the norms has a weight, the other has none")
    if rotary % 2 or rotary > head_dim:
        wrong.append(f"{rotary} rotated features: an even number, at most {head_dim}")
    if given.positions.is_floating_point():
        wrong.append(f"positions are of {given.positions.dtype}, not integers")
    if given.positions.numel() not in (1, length):
        wrong.append(
            f"{given.positions.numel()} positions: one for each of {length} tokens, or the first alone"
        )
    if wrong:
        raise ShapeError(f"{name} with query {tuple(given.query.shape)}: {'; '.join(wrong)}")


def _check_halves(given: Given) -> None:
    check_tensors("qk_norm_rope_gate", query=("[B, T, nh, 2·D]", given.query))
    features = given.query.shape[-1]
    if features % 2:
        raise ShapeError(
            f"qk_norm_rope_gate: heads of {features} features have no query and gate of one size"
        )
    _check("qk_norm_rope_gate", given.halves()[0])


def _check_written(name: str, given: Given) -> None:
    check_written(name, **{each: getattr(given, each) for each in CACHES})


def _run(given: Given) -> Tensor:
    """The query, as one node of a graph, and the caches in place; shapes and dtypes as in `Given`."""
    _check("qk_norm_rope", given)
    _check_written("qk_norm_rope", given)
    return (launch if refusal(*given[:-1]) is None else reference)(*given)


def _fake(given: Given) -> Tensor:
    _check("qk_norm_rope", given)
    batch, length, heads, head_dim = given.query.shape
    return given.query.new_empty((batch, heads, length, head_dim))


def _run_gate(given: Given) -> tuple[Tensor, Tensor]:
    """(query [B, nh, T, D], gate [B, T, nh, D]) from each head's query and gate."""
    _check_halves(given)
    _check_written("qk_norm_rope_gate", given)
    return (gate_launch if refusal(*given[:-1]) is None else gate_reference)(*given)


def _fake_gate(given: Given) -> tuple[Tensor, Tensor]:
    _check_halves(given)
    batch, length, heads, features = given.query.shape
    new = given.query.new_empty
    return new((batch, heads, length, features // 2)), new((batch, length, heads, features // 2))


qk_norm_rope = operator("qk_norm_rope", _run, _fake, Given, mutates=CACHES)
qk_norm_rope_gate = operator("qk_norm_rope_gate", _run_gate, _fake_gate, Given, mutates=CACHES)
