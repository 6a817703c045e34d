"""Linears that read one input: what is merged, exactly; what is left alone, with the node and the reason."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from fxfuse import Rewritten, rewrite
from fxfuse.passes.outcome import Outcome
from fxfuse.passes.same_input_linears import RULE
from fxfuse.testing.tensors import integer_like_, integer_tensor

LINEAR = torch.ops.aten.linear.default


def linears_of(rewritten: Rewritten) -> int:
    return len(rewritten.graph_module.graph.find_nodes(op="call_function", target=LINEAR))


def outcome_of(rewritten: Rewritten) -> Outcome:
    return rewritten.report.graphs[0].outcomes[RULE]


def merged(rewritten: Rewritten) -> list[tuple[str, ...]]:
    return [match.members for match in outcome_of(rewritten).matches]


def reasons(rewritten: Rewritten) -> dict[str, str]:
    """Reason by module name; every miss also names a node."""
    misses = outcome_of(rewritten).misses
    assert all(miss.node for miss in misses)
    return {miss.where: miss.reason for miss in misses}


class Linears(nn.Module):
    """Linears by name, and a forward given as a function of the module and its inputs."""

    def __init__(
        self,
        forward: Callable[..., Any],
        width: int = 8,
        bias: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        **rows: int,
    ) -> None:
        super().__init__()
        self.compute = forward
        for name, count in rows.items():
            self.add_module(name, nn.Linear(width, count, bias=name in bias, dtype=dtype))

    def forward(self, *inputs: Any) -> Any:
        return self.compute(self, *inputs)


def every(module: Linears, x: Tensor) -> list[Tensor]:
    """All linears on one input; the product keeps their outputs inside the graph."""
    return [child(x) * 2 for child in module.children()]


X = integer_tensor((3, 8), seed=0)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_linears_on_one_input_become_one(rewrite_equal: Any, count: int, with_bias: bool) -> None:
    rows = (
        dict(zip("abcd", (6, 4, 1, 3), strict=True))
        if count == 4
        else dict(zip("abc"[:count], (5, 2, 7), strict=False))
    )
    module = Linears(every, bias=tuple(rows) if with_bias else (), **rows)
    rewritten = rewrite_equal(module, [X])
    name = "_".join(rows)
    assert linears_of(rewritten) == 1
    assert merged(rewritten) == [tuple(f"{n}.weight" for n in rows)]
    assert outcome_of(rewritten).matches[0].where == name
    assert outcome_of(rewritten).matches[0].detail == f"{count} linears → 1"
    assert outcome_of(rewritten).misses == []
    targets = {t.name: t.shape for t in rewritten.plan.targets}
    expected: dict[str, tuple[int, ...]] = {f"{name}.weight": (sum(rows.values()), 8)}
    if with_bias:
        expected[f"{name}.bias"] = (sum(rows.values()),)
    assert targets == expected


def test_groups_follow_from_the_graph_and_not_from_names(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        y = F.silu(m.zebra(x)) * m.q_proj(x)
        return [m.alpha(y) + 1, m.in_proj_z(y) + 1, m.lonely(y.sum(-1, keepdim=True).expand(3, 8)) + 1]

    module = Linears(forward, zebra=8, q_proj=8, alpha=3, in_proj_z=2, lonely=2)
    integer_like_(module, seed=1)
    rewritten = rewrite_equal(module, [integer_tensor((3, 8), 0)], passes=("same_input_linears",), fill=False)
    assert merged(rewritten) == [
        ("zebra.weight", "q_proj.weight"),
        ("alpha.weight", "in_proj_z.weight"),
    ]
    assert reasons(rewritten) == {}


@pytest.mark.parametrize("shape", [(8,), (1, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (2, 0, 8)])
def test_inputs_of_any_rank_and_empty_ones(rewrite_equal: Any, shape: tuple[int, ...]) -> None:
    rewritten = rewrite_equal(Linears(every, a=4, b=2, bias="ab"), [integer_tensor(shape, 0)])
    assert linears_of(rewritten) == 1


@pytest.mark.parametrize("rows", [(1, 1), (1, 2, 4), (2, 1), (4, 4, 4)])
@pytest.mark.parametrize("width", [1, 8])
def test_few_rows_and_one_column(rewrite_equal: Any, rows: tuple[int, ...], width: int) -> None:
    module = Linears(every, width=width, **{f"n{i}": count for i, count in enumerate(rows)})
    assert linears_of(rewrite_equal(module, [integer_tensor((3, width), 0)])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_floating_dtype(rewrite_equal: Any, dtype: torch.dtype) -> None:
    module = Linears(every, a=4, b=2, bias="ab", dtype=dtype)
    rewritten = rewrite_equal(module, [integer_tensor((3, 8), 0, dtype=dtype)])
    assert linears_of(rewritten) == 1
    assert {t.dtype for t in rewritten.plan.targets} == {str(dtype).removeprefix("torch.")}


def test_sizes_may_vary_after_the_rewrite(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> Tensor:
        return (m.a(x) * m.b(x)).view(x.shape[0] * 2, -1)

    module = Linears(forward, a=8, b=8)
    rewritten = rewrite_equal(module, [integer_tensor((8, 8), 0)])  # as many rows as columns: still two sizes
    for batch in (2, 5):
        x = integer_tensor((batch, 8), seed=batch)
        assert torch.equal(rewritten.graph_module(x), module(x))


def test_the_plan_fits_the_rewritten_graph_and_other_weights_change_its_output(rewrite_equal: Any) -> None:
    module = Linears(every, a=4, b=2, c=3, alone=2, bias="ab")
    rewritten = rewrite_equal(module, [X])
    first = rewritten.graph_module(X)
    integer_like_(module, seed=2)
    rewritten.graph_module.load_state_dict(rewritten.plan.apply(module.state_dict()))
    second = rewritten.graph_module(X)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(second, module(X), strict=True))
    assert all(not torch.equal(old, new) for old, new in zip(first, second, strict=True))


def test_the_rewritten_graph_has_the_original_state_dict_in_the_fused_layout(rewrite_equal: Any) -> None:
    module = Linears(every, a=4, b=2)
    module.register_parameter("unused", nn.Parameter(torch.ones(2)))
    module.register_buffer("kept", torch.ones(2))
    module.register_buffer("left_out", torch.ones(2), persistent=False)
    module.a.register_buffer("counter", torch.ones(2))
    rewritten = rewrite_equal(module, [X])
    fused = rewritten.plan.apply(module.state_dict())
    assert rewritten.graph_module.state_dict().keys() == fused.keys()
    assert "unused" in fused and "left_out" not in fused
    rewritten.graph_module.load_state_dict(fused)


def test_views_that_contiguous_memory_allowed_keep_working(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        a, b = m.a(x), m.b(x)
        flat = a.view(-1, 2)  # merges the rows with a part of the features
        heads = b.view(2, 3, 2, 2).transpose(1, 2)
        return [
            flat + 1,
            a.view(-1) + 1,
            heads @ heads.transpose(-1, -2),
            b.unflatten(-1, (2, 2)).flatten(0, 2) + 1,
        ]

    rewritten = rewrite_equal(Linears(forward, a=4, b=4), [integer_tensor((2, 3, 8), 0)])
    assert linears_of(rewritten) == 1


def test_the_same_memory_by_several_spellings_is_one_input(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        flat = x.view(-1, 8)
        return [
            m.a(x.reshape(-1, 8)) + 1,
            m.b(flat.reshape(-1, 8)) + 1,
            m.c(flat.contiguous().to(torch.float32)) + 1,
            m.d(x.flatten(0, 1)) + 1,
            m.e(flat) + 1,
            m.f(flat[:, :]) + 1,
        ]

    module = Linears(forward, a=4, b=4, c=2, d=1, e=3, f=2)
    rewritten = rewrite_equal(module, [integer_tensor((2, 3, 8), 0)])
    assert merged(rewritten) == [tuple(f"{n}.weight" for n in "abcdef")]


def test_two_blocks_that_share_weights_share_one_fused_weight(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(x) + 1, m.a(x * 2) + 1, m.b(x * 2) + 1]

    def twice(m: Linears, x: Tensor) -> list[Tensor]:
        y = x * 2
        return [m.a(x) + 1, m.b(x) + 1, m.a(y) + 1, m.b(y) + 1]

    rewritten = rewrite_equal(Linears(twice, a=4, b=2, bias="ab"), [X])
    assert linears_of(rewritten) == 2
    assert merged(rewritten) == [("a.weight", "b.weight")] * 2
    assert [t.name for t in rewritten.plan.targets] == ["a_b.weight", "a_b.bias"]
    assert linears_of(rewrite_equal(Linears(forward, a=4, b=2), [X])) <= 3


def test_twenty_runs_give_the_same_graph_and_digest(rewrite_equal: Any) -> None:
    module = integer_like_(Linears(every, a=4, b=2, c=3, d=1, bias="ab"), seed=1)
    runs = [rewrite_equal(module, [X], fill=False) for _ in range(20)]
    assert len({str(run.graph_module.graph) for run in runs}) == 1
    assert len({run.plan.digest for run in runs}) == 1


# What leaves the graph, or is read by its strides, is laid out as before.


def outputs(m: Linears, x: Tensor) -> list[Tensor]:
    return [m.a(x), m.b(x)]


def views_of_outputs(m: Linears, x: Tensor) -> list[Tensor]:
    return [m.a(x).view(3, 2, 2), m.b(x).transpose(0, 1), m.b(x)[..., 1:]]


@pytest.mark.parametrize("forward", [outputs, views_of_outputs])
def test_an_output_that_leaves_the_graph_is_laid_out_as_before(rewrite_equal: Any, forward: Any) -> None:
    module = Linears(forward, a=4, b=2)
    rewritten = rewrite_equal(module, [X])
    assert merged(rewritten) == [("a.weight", "b.weight")]
    for out, expected in zip(rewritten.graph_module(X), module(X), strict=True):
        assert out.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def complex_pairs(m: Linears, x: Tensor) -> list[Tensor]:
    pairs = torch.view_as_complex(m.b(x).view(3, 2, 2))
    return [m.a(x) + 1, torch.view_as_real(pairs * pairs)]


def raw_strides(m: Linears, x: Tensor) -> list[Tensor]:
    return [m.a(x) + 1, m.b(x).as_strided((2, 2), (4, 1)) + 1]


def reinterpreted(m: Linears, x: Tensor) -> list[Tensor]:
    return [m.a(x) + 1, m.b(x).contiguous().view(torch.int64) + 1]


@pytest.mark.parametrize("forward", [complex_pairs, raw_strides, reinterpreted])
def test_operators_that_read_strides_get_the_memory_they_had(rewrite_equal: Any, forward: Any) -> None:
    assert linears_of(rewrite_equal(Linears(forward, a=3, b=4), [X])) == 1


@torch.library.custom_op("fxfuse_tests::reads_contiguous", mutates_args=())
def reads_contiguous(x: Tensor) -> Tensor:
    """Takes its input for contiguous, as many a kernel does."""
    return x.as_strided(x.shape, torch.empty(x.shape).stride()) * 2


@reads_contiguous.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype)


@pytest.mark.parametrize("explicit", [False, True])
def test_a_custom_operator_gets_contiguous_memory(rewrite_equal: Any, explicit: bool) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        b = m.b(x).contiguous() if explicit else m.b(x)
        return [m.a(x) + 1, reads_contiguous(b)]

    assert linears_of(rewrite_equal(Linears(forward, a=3, b=4), [X])) == 1


def test_more_users_of_an_output_see_the_same_values(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        a, b = m.a(x), m.b(x)
        return [a * b, a + b, b.sum(), torch.cat([a, b, a]), a.max(), b]

    assert linears_of(rewrite_equal(Linears(forward, a=4, b=4), [X])) == 1


def test_a_weight_that_is_read_elsewhere_too_is_read_from_the_fused_one(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(x) + 1, m.b.weight.sum(0), m.b.bias * 2]

    module = Linears(forward, a=4, b=2, bias="ab")
    rewritten = rewrite_equal(module, [X])
    assert merged(rewritten) == [("a.weight", "b.weight")]
    integer_like_(module, seed=2)
    rewritten.graph_module.load_state_dict(rewritten.plan.apply(module.state_dict()))
    for out, expected in zip(rewritten.graph_module(X), module(X), strict=True):
        assert torch.equal(out, expected)


# Near misses: each is left alone, with the module, the node and the reason.


def test_another_input_is_no_candidate(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor, y: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(y) + 1, m.c(x + 1) + 1]

    rewritten = rewrite_equal(Linears(forward, a=4, b=2, c=3), [X, X.clone()])
    assert linears_of(rewritten) == 3
    assert outcome_of(rewritten).candidates == 0


def add_in_place(x: Tensor) -> None:
    x.add_(1)


def set_item(x: Tensor) -> None:
    x[0] = 2


def through_a_view(x: Tensor) -> None:
    x.view(-1)[3:5].mul_(3)


def out_argument(x: Tensor) -> None:
    torch.add(x, 1, out=x)


def batch_statistics(x: Tensor) -> None:
    """Writes to its running mean, which its schema does not declare."""
    F.batch_norm(torch.arange(12.0).view(3, 4), x[0, :4], torch.ones(4), training=True, momentum=1.0)


@pytest.mark.parametrize("write", [add_in_place, set_item, through_a_view, out_argument, batch_statistics])
def test_a_write_to_the_input_between_the_linears_parts_them(rewrite_equal: Any, write: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        first = m.a(x) + 1
        write(x)
        return [first, m.b(x) + 1, m.c(x) + 1]

    rewritten = rewrite_equal(Linears(forward, a=4, b=2, c=3), [X.clone()])
    assert merged(rewritten) == [("b.weight", "c.weight")]

    def apart(m: Linears, x: Tensor) -> list[Tensor]:
        first = m.a(x) + 1
        write(x)
        return [first, m.b(x) + 1]

    rewritten = rewrite_equal(Linears(apart, a=4, b=2), [X.clone()])
    assert linears_of(rewritten) == 2
    assert list(reasons(rewritten)) == ["b"]
    assert "is written by" in reasons(rewritten)["b"]


def test_a_write_to_an_alias_of_the_input_parts_them(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor, alias: Tensor) -> list[Tensor]:
        first = m.a(x) + 1
        alias.add_(1)
        return [first, m.b(x) + 1]

    memory = integer_tensor((4, 8), 0)
    module = integer_like_(Linears(forward, a=4, b=2), seed=1)
    rewritten = rewrite_equal(module, [memory[:3], memory[1:]], fill=False)
    assert linears_of(rewritten) == 2


def test_a_write_to_other_memory_does_not_part_them(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor, y: Tensor) -> list[Tensor]:
        first = m.a(x) + 1
        y.add_(1)
        return [first, m.b(x) + y[:, :2]]

    assert linears_of(rewrite_equal(Linears(forward, a=4, b=2), [X, X.clone()])) == 1


def test_a_write_to_an_output_leaves_its_linear_alone(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        a, b, c = m.a(x), m.b(x), m.c(x)
        b[:, 0] = 7
        return [a + 1, b + 1, c + 1]

    rewritten = rewrite_equal(Linears(forward, a=4, b=2, c=3), [X])
    assert merged(rewritten) == [("a.weight", "c.weight")]
    assert reasons(rewritten) == {"b": "its output is written in place"}


def test_a_weight_that_the_graph_writes_stays_where_it_is(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        first = [m.a(x) + 1, m.b(x) + 1, m.c(x) + 1]
        m.b.weight.mul_(2)
        return [*first, m.b(x) + 1]

    class Frozen(Linears):
        def forward(self, *inputs: Any) -> Any:
            with torch.no_grad():
                return super().forward(*inputs)

    module = Frozen(forward, a=4, b=2, c=3)
    integer_like_(module, seed=1)
    rewritten = rewrite(module, [X])
    got = rewritten.graph_module(X)
    for out, expected in zip(got, module(X), strict=True):
        assert torch.equal(out, expected)
    assert merged(rewritten) == [("a.weight", "c.weight")]
    assert reasons(rewritten)["b"] == "its parameter b.weight is written inside the graph"
    assert torch.is_grad_enabled(), "the rewritten graph left another grad mode behind"


def test_a_bias_on_one_of_four_leaves_it_alone_and_merges_the_others(rewrite_equal: Any) -> None:
    rewritten = rewrite_equal(Linears(every, a=4, b=2, c=3, d=1, bias="c"), [X])
    assert merged(rewritten) == [("a.weight", "b.weight", "d.weight")]
    assert reasons(rewritten) == {"c": "it has a bias, the others have none"}


def test_two_with_and_two_without_bias_are_two_merges(rewrite_equal: Any) -> None:
    rewritten = rewrite_equal(Linears(every, a=4, b=2, c=3, d=1, bias="bd"), [X])
    assert merged(rewritten) == [("a.weight", "c.weight"), ("b.weight", "d.weight")]
    assert reasons(rewritten) == {}


def test_a_dtype_that_differs_leaves_its_linear_alone(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return [m.a(x) + 1, m.b(x) + 1, m.c(x) + 1]

    module = Linears(forward, a=4, b=2, c=3)
    module.b.to(torch.bfloat16)
    rewritten = rewrite_equal(module, [X])
    assert merged(rewritten) == [("a.weight", "c.weight")]
    assert reasons(rewritten) == {"b": "its weight is torch.bfloat16, the others' are torch.float32"}


def test_linears_under_different_autocast_are_not_merged(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        first = m.a(x) + 1
        with torch.autocast("cpu", torch.bfloat16):
            second = m.b(x) + 1
        return [first, second, m.c(x) + 1]

    module = integer_like_(Linears(forward, a=4, b=2, c=3), seed=1, low=-300, high=300)  # not exact in bf16
    rewritten = rewrite_equal(module, [X], fill=False)
    assert merged(rewritten) == [("a.weight", "c.weight")]
    assert reasons(rewritten) == {
        "b": "it runs under another grad or autocast mode than the linears before it"
    }


def test_a_tied_weight_stays_where_it_is(rewrite_equal: Any) -> None:
    def forward(m: Any, x: Tensor, ids: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(x) + 1, m.c(x) + 1, m.embedding(ids)]

    module: Any = Linears(forward, a=4, b=2, c=3)
    module.embedding = nn.Embedding(4, 8)
    module.embedding.weight = module.a.weight
    rewritten = rewrite_equal(module, [X, torch.tensor([0, 3])])
    assert merged(rewritten) == [("b.weight", "c.weight")]
    assert reasons(rewritten) == {"a": "it is also embedding.weight"}
    fused = rewritten.plan.apply(module.state_dict())
    assert rewritten.graph_module.state_dict().keys() == fused.keys()


def test_a_weight_or_bias_shared_inside_the_group_is_merged_once(rewrite_equal: Any) -> None:
    def same_linear(m: Linears, x: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(x) + 1, m.a(x) + 2]

    rewritten = rewrite_equal(Linears(same_linear, a=4, b=2), [X])
    assert merged(rewritten) == [("a.weight", "b.weight")]
    assert reasons(rewritten) == {"a": "its weight or bias is shared with another linear of the group"}

    def same_bias(m: Linears, x: Tensor) -> list[Tensor]:
        return [F.linear(x, m.a.weight, m.a.bias) + 1, F.linear(x, m.b.weight, m.a.bias) + 1, m.c(x) + 1]

    rewritten = rewrite_equal(Linears(same_bias, a=4, b=4, c=2, bias="ac"), [X])
    assert merged(rewritten) == [("a.weight", "c.weight")]
    assert reasons(rewritten) == {"b": "its weight or bias is shared with another linear of the group"}


def test_memory_is_laid_out_for_one_group_only(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        y = x * 2
        return [m.a(x) + 1, m.b(x) + 1, m.b(y) + 1, m.c(y) + 1]

    rewritten = rewrite_equal(Linears(forward, a=4, b=2, c=3), [X])
    assert merged(rewritten) == [("a.weight", "b.weight")]
    why = "b.weight is already part of another fused weight"
    assert {m.node: (m.where, m.reason) for m in outcome_of(rewritten).misses} == {
        "linear_2": ("b", why),
        "linear_3": ("c", why),
    }


def test_the_name_of_another_parameter_is_not_taken(rewrite_equal: Any) -> None:
    rewritten = rewrite_equal(Linears(every, a=4, b=2, a_b=6), [X], fill=True)
    assert linears_of(rewritten) == 1  # all three: no clash

    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(x) + 1, m.a_b(x * 2) + 1]

    rewritten = rewrite_equal(Linears(forward, a=4, b=2, a_b=6), [X])
    why = "the name a_b.weight of the fused weight is taken by another parameter"
    assert reasons(rewritten) == {"a": why, "b": why}


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_a_computed_weight_stays_computed(rewrite_equal: Any) -> None:
    module = Linears(every, a=4, b=2, c=3)
    torch.nn.utils.parametrize.register_parametrization(module.b, "weight", Doubled())
    rewritten = rewrite_equal(module, [X])
    assert merged(rewritten) == [("a.weight", "c.weight")]
    (reason,) = reasons(rewritten).values()
    assert reason.startswith("its weight is computed by aten.mul.Tensor")

    def dequantised(m: Any, x: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(x) + 1, F.linear(x, m.codes.to(x.dtype) * m.scale) + 1]

    module = Linears(dequantised, a=4, b=2)
    module.register_buffer("codes", torch.ones(3, 8, dtype=torch.int8))
    module.register_buffer("scale", torch.full((3, 1), 2.0))
    rewritten = rewrite_equal(module, [X])
    assert merged(rewritten) == [("a.weight", "b.weight")]
    (reason,) = reasons(rewritten).values()
    assert "is computed by" in reason


def test_a_weight_that_is_no_parameter_is_left_alone(rewrite_equal: Any) -> None:
    def forward(m: Any, x: Tensor, weight: Tensor) -> list[Tensor]:
        return [m.a(x) + 1, m.b(x) + 1, F.linear(x, weight) + 1, F.linear(x, m.buffer) + 1]

    module = Linears(forward, a=4, b=2)
    module.register_buffer("buffer", integer_tensor((3, 8), 5))
    rewritten = rewrite_equal(module, [X, integer_tensor((2, 8), 3)])
    assert merged(rewritten) == [("a.weight", "b.weight")]
    misses = outcome_of(rewritten).misses
    assert [miss.node for miss in misses] == ["linear_2", "linear_3"]
    assert all("not a parameter" in miss.reason for miss in misses)


def test_a_vector_as_weight_and_a_broadcast_bias_are_left_alone(rewrite_equal: Any) -> None:
    def forward(m: Any, x: Tensor) -> list[Tensor]:
        return [
            m.a(x) + 1,
            m.b(x) + 1,
            F.linear(x, m.u) + 1,
            F.linear(x, m.v) + 1,
            F.linear(x, m.c.weight, m.one) + 1,
            m.d(x) + 1,
        ]

    module: Any = Linears(forward, a=4, b=2, c=3, d=5, bias="d")
    for name, size in (("u", 8), ("v", 8), ("one", 1)):
        module.register_parameter(name, nn.Parameter(torch.ones(size)))
    rewritten = rewrite_equal(module, [X])
    assert merged(rewritten) == [("a.weight", "b.weight")]
    assert reasons(rewritten) == {
        "u": "its weight has the shape (8,), where rows and columns are needed",
        "v": "its weight has the shape (8,), where rows and columns are needed",
        "c": "its bias is torch.float32 [1], its weight torch.float32 [3, 8]",
        "d": "it has a bias, the others have none",
    }


def test_a_weight_without_rows_is_left_alone(rewrite_equal: Any) -> None:
    rewritten = rewrite_equal(Linears(every, a=4, b=0, c=2), [X])
    assert merged(rewritten) == [("a.weight", "c.weight")]
    assert list(reasons(rewritten)) == ["b"]


def test_a_weight_that_is_not_contiguous_stays_where_it_is(rewrite_equal: Any) -> None:
    module = Linears(every, a=4, b=2, c=3)
    module.b.weight = nn.Parameter(torch.empty(8, 2).t())
    rewritten = rewrite_equal(module, [X])
    assert merged(rewritten) == [("a.weight", "c.weight")]
    assert reasons(rewritten)["b"].startswith("its weight is not contiguous")


def test_linears_around_an_operator_that_may_write_are_left_alone(rewrite_equal: Any) -> None:
    def forward(m: Linears, x: Tensor) -> list[Tensor]:
        first = m.a(x) + 1
        (y,) = (torch.cond(first.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,)),)
        return [first, m.b(x) + y.sum()]

    assert linears_of(rewrite_equal(Linears(forward, a=4, b=2), [X])) == 2


def test_gradients_asked_for_inside_the_graph_are_there() -> None:
    class Enables(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return self.q(x) * self.k(x)

    module, x = Enables(), torch.randn(2, 8)
    fxfuse.optimize(module, inner="eager")
    with torch.no_grad():
        y = module(x)
    assert y.requires_grad
    y.sum().backward()
    assert module.q.weight.grad is not None


class Adapters(nn.Module):
    """Two low-rank products x·Aᵀ·Bᵀ over one input; the factors are as wide as `rank`."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.a1, self.a2 = (nn.Linear(8, rank, bias=False) for _ in range(2))
        self.b1, self.b2 = (nn.Linear(rank, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.b1(self.a1(x)) + self.b2(self.a2(x))


def test_factors_of_low_rank_products_stay_apart(rewrite_equal: Any) -> None:
    rewritten = rewrite_equal(Adapters(rank=2), [X])
    assert merged(rewritten) == []
    assert all("low-rank" in reason for reason in reasons(rewritten).values()) and reasons(rewritten)


def test_linears_that_feed_wide_ones_are_no_factors(rewrite_equal: Any) -> None:
    assert merged(rewrite_equal(Adapters(rank=6), [X])) == [("a1.weight", "a2.weight")]
