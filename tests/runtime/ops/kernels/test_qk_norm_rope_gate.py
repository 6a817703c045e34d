"""The kernel of q and k's norms and rotation against its reference in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfuse.runtime.ops import qk_norm_rope_gate as op

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
profile = settings.get_profile("kernels")


@settings(profile, max_examples=40)
@given(
    st.tuples(
        st.integers(1, 2), st.sampled_from([1, 1, 2, 9]), st.integers(1, 2), st.sampled_from([1, 2, 3])
    ),
    st.integers(2, 70),
    st.floats(0, 1),
    st.fixed_dictionaries(
        {
            "dtype": FLOATS,
            "cos": FLOATS,
            "cache": FLOATS,
            "one_position": st.booleans(),
            "gate": st.booleans(),
            "shared": st.booleans(),
            "norm": st.sampled_from([True, True, False]),
        }
    ),
    st.integers(0, 2**20),
)
def test_it_is_the_reference(
    make: Any,
    close: Any,
    doubled: Any,
    sizes: tuple[int, int, int, int],
    head_dim: int,
    turned: float,
    options: dict[str, Any],
    seed: int,
) -> None:
    (batch, length, kv_heads, groups), dtype = sizes, options["dtype"]
    heads, rotary = kv_heads * groups, int(turned * head_dim) // 2 * 2
    row = make(seed, batch, length, heads * 2 * head_dim + 2 * kv_heads * head_dim, dtype=dtype)
    parts = row.split([heads * 2 * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    query_gate, key, value = (
        x.unflatten(-1, (n, -1)) for x, n in zip(parts, (heads, kv_heads, kv_heads), strict=True)
    )
    weights = [make(seed + i, head_dim, dtype=dtype) if options["norm"] else None for i in (1, 2)]
    angles = [
        make(seed + i, 1 if options["shared"] else batch, length, rotary, dtype=options["cos"])
        for i in (3, 4)
    ]
    caches = [make(seed + i, batch, kv_heads, length + 3, head_dim, dtype=options["cache"]) for i in (5, 6)]
    before = caches[1].clone()
    places = torch.randperm(length + 3, generator=torch.Generator().manual_seed(seed))[:length]
    positions = torch.tensor([seed % 4]) if options["one_position"] else places
    arguments = [query_gate, key, value, *weights, *angles, *caches, positions.to(row.device), 1e-6]
    exact_arguments = doubled(*arguments)
    exact = op.gate_reference(*exact_arguments)
    if options["gate"]:
        query, gate = op.gate_launch(*arguments)
        assert torch.equal(gate, query_gate[..., head_dim:])
    else:
        query = op.launch(query_gate[..., :head_dim], *arguments[1:])
    close(query, exact[0], dtype)
    close(caches[0], exact_arguments[7], options["cache"])
    close(caches[1], exact_arguments[8], options["cache"])
    written = (torch.arange(length) + seed % 4) if options["one_position"] else places
    untouched = torch.ones(length + 3, dtype=torch.bool).index_fill(0, written, False).to(row.device)
    assert torch.equal(caches[1][:, :, untouched], before[:, :, untouched])


@pytest.mark.parametrize("position", [-1, 4, 2**40])
def test_a_position_outside_the_cache_is_not_written(make: Any, position: int) -> None:
    x, weight, angle = make(0, 1, 1, 1, 8), make(1, 8), make(2, 1, 1, 4)
    room = make(3, 2, 1, 1, 6, 8)
    before = room.clone()
    caches = room[:, :, :, 1:5].unbind()
    positions = torch.tensor([position], device=x.device)
    op.launch(x, x, x, weight, weight, angle, angle, *caches, positions, 1e-6)
    assert torch.equal(room, before)


def test_no_token_writes_nothing(make: Any) -> None:
    x, weight, angle = make(0, 1, 1, 1, 8)[:, :0], make(1, 8), make(2, 1, 1, 4)[:, :0]
    caches = make(3, 2, 1, 1, 6, 8)
    before, positions = caches.clone(), torch.zeros(1, dtype=torch.long, device=x.device)
    arguments = (x, x, x, weight, weight, angle, angle, *caches.unbind(), positions, 1e-6)
    assert op.launch(*arguments).shape == (1, 1, 0, 8)
    assert torch.equal(caches, before)
