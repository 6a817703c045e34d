"""Strides of every operator: of more than 2^31 elements of memory, and of zero.

Offsets are counted in 64 bits, whatever dimension is far apart; an expanded tensor is read where it is.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfuse.runtime.ops import (
    causal_conv1d,
    causal_conv1d_update,
    chunk_gated_delta_rule,
    gated_rms_norm,
    gdn_decode,
    gdn_gates,
    qk_norm_rope_gate,
    qkvzba_split,
    recurrent_gated_delta_rule,
    rms_norm,
    sigmoid_gate_mul,
    silu_mul,
)

Spread = Callable[[Tensor, int], Tensor]


@pytest.fixture()
def spread(tmp_path: Path) -> Iterator[Spread]:
    """spread(x, d): the values of x [..], the last along dimension d 2^31 elements behind the first.

    What is between takes no memory on a CPU: the elements are those of a sparse file.
    """
    made: list[Tensor] = []

    def room(elements: int, like: Tensor) -> Tensor:
        if like.is_cuda:
            if torch.cuda.mem_get_info()[0] < 2 * elements * like.element_size():
                pytest.skip("needs a device with room for 2^31 elements")
            filled = torch.utils.deterministic.fill_uninitialized_memory
            torch.utils.deterministic.fill_uninitialized_memory = False
            try:
                return torch.empty(elements, dtype=like.dtype, device=like.device)
            except torch.OutOfMemoryError:  # another process was faster
                pytest.skip("needs a device with room for 2^31 elements")
            finally:
                torch.utils.deterministic.fill_uninitialized_memory = filled
        made.append(like)
        name = str(tmp_path / str(len(made)))
        return torch.from_file(name, shared=True, size=elements, dtype=like.dtype)

    def spread_out(x: Tensor, dim: int) -> Tensor:
        if dim >= x.dim() or x.shape[dim] < 3 or not x.is_floating_point():
            return x
        near = x.clone(memory_format=torch.contiguous_format)
        strides = list(near.stride())
        # So much that the product with the last index does not fit 32 bits, while the stride itself does.
        strides[dim] = max(2**31 // (x.shape[dim] - 1) + 64, near.numel())
        last = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True))
        assert last >= 2**31 > strides[dim]
        far = room(last + 1, near).as_strided(x.shape, strides)
        return far.copy_(near)

    yield spread_out
    torch.cuda.empty_cache()  # gigabytes each, and several processes may share the device


def given(make: Any, name: str) -> list[Any]:
    """Arguments of an operator, most dimensions of three or more; half precision, to have less between."""

    def new(seed: int, *shape: int) -> Tensor:
        return make(seed, *shape, dtype=torch.float16)

    positions = torch.tensor([2, 0, 1], device=new(0, 1).device)
    attention = (
        *(new(1, 3, 3, 3, 4), new(2, 3, 3, 3, 4), new(3, 4), new(4, 4), new(5, 3, 3, 4), new(6, 3, 3, 4)),
        *(new(7, 3, 3, 3, 4), new(8, 3, 3, 3, 4), positions, 1e-6),
    )
    heads = (new(0, 3, 3, 3, 4), new(1, 3, 3, 3, 4), new(2, 3, 3, 9, 4))
    gates = (-new(3, 3, 3, 9).abs(), new(4, 3, 3, 9).sigmoid())
    per_head = (new(9, 9), new(10, 9))
    return {
        "rms_norm": [new(0, 3, 3, 3, 4), new(1, 4), 1e-6, True],
        "add_rms_norm": [new(0, 3, 3, 3, 4), new(2, 3, 3, 3, 4), new(1, 4), 1e-6, True],
        "gated_rms_norm": [new(0, 3, 3, 3, 4), new(2, 3, 3, 3, 4), new(1, 4), 1e-6],
        "silu_mul": [new(0, 3, 3, 3, 4), new(2, 3, 3, 3, 4)],
        "sigmoid_gate_mul": [new(0, 3, 3, 3, 4), new(2, 3, 3, 3, 4)],
        "gdn_gates": [new(0, 3, 3, 3, 9), new(2, 3, 3, 3, 9), *per_head, False],
        "qkvzba_split": [new(0, 3, 3, 3, 96), new(1, 3, 3, 3, 18), 3, 9, 4, 4, True],
        "causal_conv1d": [new(0, 3, 5, 4), new(1, 5, 3), new(2, 5), new(3, 3, 5, 3), None, True],
        "causal_conv1d_update": [new(0, 3, 5, 3), new(1, 3, 5, 4), new(2, 5, 3), new(3, 5), True],
        "recurrent_gated_delta_rule": [*heads, *gates, new(5, 3, 9, 4, 4), True],
        "chunk_gated_delta_rule": [*heads, *gates, new(5, 3, 9, 4, 4), True],
        "qk_norm_rope": [new(0, 3, 3, 3, 4), *attention],
        "qk_norm_rope_gate": [new(0, 3, 3, 3, 8), *attention],
        "gdn_decode": [
            *(new(0, 3, 3, 4), new(1, 3, 3, 4), new(2, 3, 3, 3, 4), new(3, 3, 3, 3, 4)),
            *(new(4, 3, 3, 3), new(5, 3, 3, 3), new(6, 3, 60, 4), new(7, 60, 3), new(8, 60), *per_head),
            *(new(11, 4), new(12, 3, 9, 4, 4), 1e-6, False),
        ],
    }[name]


LAUNCHES: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm.launch,
    "add_rms_norm": rms_norm.add_launch,
    "gated_rms_norm": gated_rms_norm.launch,
    "silu_mul": silu_mul.launch,
    "sigmoid_gate_mul": sigmoid_gate_mul.launch,
    "gdn_gates": gdn_gates.launch,
    "qkvzba_split": qkvzba_split.launch,
    "causal_conv1d": causal_conv1d.launch,
    "causal_conv1d_update": causal_conv1d_update.launch,
    "recurrent_gated_delta_rule": recurrent_gated_delta_rule.launch,
    "chunk_gated_delta_rule": chunk_gated_delta_rule.launch,
    "qk_norm_rope": qk_norm_rope_gate.launch,
    "qk_norm_rope_gate": qk_norm_rope_gate.gate_launch,
    "gdn_decode": gdn_decode.launch,
}


def same(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Bit for bit under the interpreter; a compiler lays tiles out by strides, which orders the sums."""
    for expected, got in pairs:
        if expected.is_cuda:
            torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-4)
        else:
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dim", range(4))
@pytest.mark.parametrize("name", LAUNCHES)
def test_far_apart_is_the_same_as_side_by_side(make: Any, spread: Spread, name: str, dim: int) -> None:
    near = given(make, name)
    far = [spread(x, dim) if isinstance(x, Tensor) else x for x in near]
    near = [x.clone() if isinstance(x, Tensor) else x for x in near]
    expected, got = LAUNCHES[name](*near), LAUNCHES[name](*far)
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    same(zip(expected, got, strict=True))
    same((x, y) for x, y in zip(near, far, strict=True) if isinstance(x, Tensor))


@pytest.mark.parametrize("name", LAUNCHES)
def test_expanded_is_the_same_as_repeated(make: Any, name: str) -> None:
    """All dimensions but the last of what is read alone have a stride of zero."""
    repeated, schema = given(make, name), getattr(torch.ops.fxfuse, name).default._schema
    for i, (x, argument) in enumerate(zip(repeated, schema.arguments, strict=False)):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if isinstance(x, Tensor) and x.is_floating_point() and not written:
            repeated[i] = x[(slice(0, 1),) * (x.dim() - 1)].expand_as(x)
    dense = [x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x for x in repeated]
    assert sum(0 in x.stride() for x in repeated if isinstance(x, Tensor)) >= 1
    expected, got = LAUNCHES[name](*dense), LAUNCHES[name](*repeated)
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    same(zip(expected, got, strict=True))
    same((x, y) for x, y in zip(dense, repeated, strict=True) if isinstance(x, Tensor))
