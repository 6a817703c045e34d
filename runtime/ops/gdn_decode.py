"""One token of Gated DeltaNet in one launch: all that stands between the input and the output projection.

Convolution step with SiLU on q | k | v, gates, l2 norms, the delta rule on the state, gated RMSNorm. The
inputs are views of the projection's row wherever it put them (`views_of_row`); nothing is copied.

Formulas: those of `causal_conv1d_update`, `gdn_gates`, `recurrent_gated_delta_rule` and `gated_rms_norm`;
everything between the inputs and the output is in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import (
    causal_conv1d_update,
    gated_rms_norm,
    gdn_decode_kernel,
    gdn_gates,
    recurrent_gated_delta_rule,
    triton_kernel,
)
from fxfuse.runtime.ops.activations import wide
from fxfuse.runtime.ops.arguments import check_tensors, check_written
from fxfuse.runtime.ops.gdn_decode_kernel import MAX_TILE
from fxfuse.runtime.ops.listed_once import operator
from fxfuse.runtime.ops.triton_kernel import power_of_2


class Parts(NamedTuple):
    """What a row of the projections holds; r = HV / Hk value heads for each key head.

    Attributes:
        query, key: [B, Hk, dk]. value, z: [B, Hk, r, dv]. b, a: [B, Hk, r].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    z: Tensor
    b: Tensor
    a: Tensor


def views_of_row(
    qkvz: Tensor, ba: Tensor, key_heads: int, value_heads: int, dk: int, dv: int, interleaved: bool
) -> Parts:
    """The parts as views of the projections' output.

    Args:
        qkvz: [..., 2·Hk·dk + 2·HV·dv]; ba: [..., 2·HV]; they may be two slices of one row.
        interleaved: each key head's group [q | k | r·v | r·z] and [r·b | r·a] in turn, as in Qwen3-Next;
            otherwise all q | all k | all v | all z and all b | all a, as in Qwen3.5.
    """
    r = value_heads // key_heads
    if interleaved:
        q, k, v, z = qkvz.unflatten(-1, (key_heads, -1)).split([dk, dk, r * dv, r * dv], dim=-1)
        b, a = ba.unflatten(-1, (key_heads, -1)).split([r, r], dim=-1)
        return Parts(q, k, v.unflatten(-1, (r, dv)), z.unflatten(-1, (r, dv)), b, a)
    sizes = [key_heads * dk, key_heads * dk, value_heads * dv, value_heads * dv]
    q, k, v, z = qkvz.split(sizes, dim=-1)
    b, a = ba.split([value_heads, value_heads], dim=-1)
    q, k = (x.unflatten(-1, (key_heads, dk)) for x in (q, k))
    v, z = (x.unflatten(-1, (key_heads, r, dv)) for x in (v, z))
    return Parts(q, k, v, z, *(x.unflatten(-1, (key_heads, r)) for x in (b, a)))


class Given(NamedTuple):
    """What the step takes, parts of a row first; value head h = group · r + i.

    Attributes:
        query, key: [B, Hk, dk]; value, z: [B, Hk, r, dv]; b, a: [B, Hk, r]; any float dtype, any strides.
        conv_state: [B, 2·Hk·dk + HV·dv, S], S >= K - 1, channels all q | all k | all v, in place.
        conv_weight: [C, K]; conv_bias: [C] or None. A_log, dt_bias: [HV]. norm_weight: [dv].
        state: [B, HV, dk, dv], in place.
        eps: of the norm. round_beta: round β to the dtype of b, as transformers' eager code does.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    z: Tensor
    b: Tensor
    a: Tensor
    conv_state: Tensor
    conv_weight: Tensor
    conv_bias: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    state: Tensor
    eps: float
    round_beta: bool = False


def reference(*arguments: Any) -> Tensor:
    """The step in plain torch, of the fields of `Given`.

    Returns:
        [B, HV, dv] in the dtype of z, contiguous.
    """
    given = Given(*arguments)
    batch, key_heads, ratio, dv = given.value.shape
    dk, heads = given.key.shape[-1], key_heads * ratio
    row = torch.cat([x.flatten(1) for x in (given.query, given.key, given.value)], dim=-1).unsqueeze(-1)
    moved = given.conv_state.to(torch.promote_types(row.dtype, given.conv_state.dtype))
    mixed = causal_conv1d_update.reference(wide(row), moved, given.conv_weight, given.conv_bias, True)
    given.conv_state.copy_(moved)
    q, k, v = mixed.squeeze(-1).split([key_heads * dk, key_heads * dk, heads * dv], dim=-1)
    g, beta = gdn_gates.reference(
        given.a.flatten(1), given.b.flatten(1), given.A_log, given.dt_bias, given.round_beta
    )
    out = recurrent_gated_delta_rule.reference(
        q.view(batch, 1, key_heads, dk),
        k.view(batch, 1, key_heads, dk),
        v.view(batch, 1, heads, dv),
        g.unsqueeze(1),
        beta.unsqueeze(1),
        given.state,
        True,
    ).squeeze(1)
    return gated_rms_norm.reference(out, given.z.flatten(1, 2), given.norm_weight, given.eps).to(
        given.z.dtype
    )


def unsupported(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel takes these, in the order of `Given`, on no device, or None."""
    dk, dv = key.shape[-1], value.shape[-1]
    if power_of_2(dk) * power_of_2(dv) > MAX_TILE:
        return f"a state of {dk} x {dv} does not fit the registers of one program"
    return triton_kernel.unsupported(query, key, value, *rest)


def refusal(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel does not take these here, or None."""
    return unsupported(query, key, value, *rest) or triton_kernel.refusal(query, key, value, *rest)


def launch(*arguments: Any) -> Tensor:
    """`reference` by the Triton kernel, one launch."""
    return gdn_decode_kernel.launch(Given(*arguments))


LAYOUTS = {
    **dict.fromkeys(("query", "key"), "[B, Hk, dk]"),
    **dict.fromkeys(("value", "z"), "[B, Hk, r, dv]"),
    **dict.fromkeys(("b", "a"), "[B, Hk, r]"),
    "conv_state": "[B, C, S]",
    "conv_weight": "[C, K]",
    "conv_bias": "[C]",
    **dict.fromkeys(("A_log", "dt_bias"), "[HV]"),
    "norm_weight": "[dv]",
    "state": "[B, HV, dk, dv]",
}


def _check(given: Given) -> None:
    check_tensors("gdn_decode", **{name: (layout, getattr(given, name)) for name, layout in LAYOUTS.items()})
    batch, key_heads, ratio, dv = given.value.shape
    dk, heads = given.key.shape[-1], key_heads * ratio
    channels, taps = 2 * key_heads * dk + heads * dv, given.conv_weight.shape[-1]
    columns = given.conv_state.shape[-1]
    expected = {
        "query": (batch, key_heads, dk),
        "key": (batch, key_heads, dk),
        "z": (batch, key_heads, ratio, dv),
        "b": (batch, key_heads, ratio),
        "a": (batch, key_heads, ratio),
        "conv_state": (batch, channels, columns),
        "conv_weight": (channels, taps),
        "conv_bias": (channels,),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm_weight": (dv,),
        "state": (batch, heads, dk, dv),
    }
    found = {name: getattr(given, name) for name in expected}
    wrong = [
        f"{name} is {tuple(x.shape)}, not {expected[name]}"
        for name, x in found.items()
        if x is not None and x.shape != expected[name]
    ]
    if not dk:
        wrong.append("heads of query and key have no features")
    if columns < taps - 1:
        wrong.append(f"conv_state has {columns} columns, not {taps - 1} or more")
    if wrong:
        raise ShapeError(f"gdn_decode with value {tuple(given.value.shape)}: {'; '.join(wrong)}")


def _run(given: Given) -> Tensor:
    """The step as one node of a graph, both states in place; shapes and dtypes as in `Given`."""
    _check(given)
    check_written("gdn_decode", conv_state=given.conv_state, state=given.state)
    return (launch if refusal(*given[:-2]) is None else reference)(*given)


def _fake(given: Given) -> Tensor:
    _check(given)
    batch, key_heads, ratio, dv = given.value.shape
    return given.z.new_empty((batch, key_heads * ratio, dv))


gdn_decode = operator("gdn_decode", _run, _fake, Given, mutates=("conv_state", "state"))
