"""What leaves the graph has the strides that it had, whatever order a pass computes it in."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from fxfuse import rewrite
from fxfuse.passes import pipeline
from fxfuse.passes.outcome import Match, Outcome
from fxfuse.passes.output_layout import restore_output_layout
from fxfuse.passes.pipeline import Pass
from fxfuse.passes.program import Program
from fxfuse.testing.tensors import integer_tensor


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """Two [B, T, C] gated as [B, C, T]: pointwise results keep the order of their operands' memory."""
    return x.transpose(1, 2) * torch.sigmoid(gate.transpose(1, 2)) * 2


class Gated(nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated(x, gate)


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_pass_changes_the_strides_of_an_output(dynamic: bool) -> None:
    result = rewrite(Gated(), torch.randn(2, 2, 5, 6).unbind(), passes=("sigmoid_gate",), dynamic=dynamic)
    for length in (5, 9) if dynamic else (5,):
        given = torch.randn(2, 2, length, 6).unbind()
        expected, got = gated(*given), result.graph_module(*given)
        assert torch.allclose(expected, got, atol=1e-5)
        assert expected.stride() == got.stride() and not got.is_contiguous()


def part_of_gated(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A result and two views of its memory."""
    y = gated(x, gate)
    return y[:, 1:], y, y.select(0, 1)


def captured(function: Callable[..., Any], inputs: Sequence[Tensor], mode: str) -> Program:
    traced = make_fx(function, tracing_mode=mode, pre_dispatch=True)(*inputs)
    return Program(traced, {}, traced.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode)


def disordered(program: Program) -> Outcome:
    """What a pass would leave that computes the product by two in the other order."""
    (product,) = (node for node in program.calls("aten.mul.Tensor") if node.args[1] == 2)
    with program.graph.inserting_after(product):
        plain = program.graph.call_function(torch.ops.aten.contiguous.default, (product,))
    product.replace_all_uses_with(plain, delete_user_cb=lambda user: user is not plain)
    for user in plain.users:
        user.meta.pop("val", None)
    program.refresh()
    assert plain.meta["val"].stride() != product.meta["val"].stride()
    return Outcome(matches=[Match("disordered", "", (), "")])


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("function", [gated, part_of_gated])
def test_an_output_in_another_order_is_copied_into_the_order_that_it_had(
    mode: str, function: Callable[..., Any]
) -> None:
    """With all that share its memory, and go on sharing it."""
    inputs = torch.randn(2, 2, 5, 6).unbind()
    given = captured(function, inputs, mode)
    program = given.copy()
    disordered(program)
    outcome = restore_output_layout(program, given)
    assert len(outcome.matches) == 1 and outcome.misses == []
    program.write_code()
    expected, got = (tree_leaves(run(*inputs)) for run in (function, program.graph_module))
    assert all(map(torch.equal, expected, got))
    assert [y.stride() for y in expected] == [y.stride() for y in got]
    assert len({y.untyped_storage().data_ptr() for y in got}) == 1


def test_what_cannot_be_laid_out_as_it_was_stays_as_it_was() -> None:
    """The memory of two outputs is written behind the place where a copy of it would be made."""

    def written(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        y = gated(x, gate)
        part = y[:, 1:]
        part.add_(1)
        return y, part

    inputs = torch.randn(2, 2, 5, 6).unbind()
    given = captured(written, inputs, "fake")
    program, outcomes = pipeline.apply(given, [Pass("disordered", disordered)])
    assert [y.stride() for y in program.graph_module(*inputs)] == [y.stride() for y in written(*inputs)]
    assert outcomes["disordered"].matches == []
    assert "would be laid out otherwise" in outcomes["output_layout"].misses[0].reason


class Dropped(nn.Module):
    """An idle dropout of a transpose, whose strides a product keeps, beside linears to merge."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.dropout(x.transpose(1, 2), 0.5, training=False) * 2, self.q(x), self.k(x)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_behind_an_idle_dropout_strides_are_those_of_eager(inner: str) -> None:
    """The fake kernel that tracing asks would copy; the real one hands on what it is given."""
    module, x = Dropped().eval().requires_grad_(False), torch.randn(2, 5, 6)
    with torch.no_grad():
        expected = [y.stride() for y in module(x)]
        rewritten = rewrite(module, [x], passes=("same_input_linears",))
        assert rewritten.report.matched == 1
        assert [y.stride() for y in rewritten.graph_module(x)] == expected
        compiled = torch.compile(module, backend="fxfuse", options={"inner": inner, "report": "off"})
        assert [y.stride() for y in compiled(x)] == expected


def test_a_copy_stays_whose_strides_a_written_view_needs(rewrite_equal: Any) -> None:
    class Copied(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.clone().transpose(0, -1).clone().transpose(0, -1)
            y[:1].mul_(2)
            return y.add_(0).view(6, 12) * 2

    part = integer_tensor((2, 3, 24), seed=0)[..., :12]
    rewrite_equal(Copied(), [part], passes="same_input_linears", dynamic=False, fill=False)


def step(x: Tensor, state: Tensor, taps: Tensor, columns: slice = slice(1, None)) -> Tensor:
    """A token of a causal convolution, of which a product by channels lies in memory as [C, B]."""
    new = torch.cat([state, x], -1)[..., columns]
    state.copy_(new)
    return F.silu(torch.einsum("bck,ck->bc", new, taps))


def convolved(x: Tensor, state: Tensor, taps: Tensor) -> Tensor:
    """Channels that lie behind positions, of another function's memory."""
    past = F.pad(x.transpose(1, 2), (taps.shape[1] - 1, 0))
    return F.silu(F.conv1d(past, taps[:, None], groups=taps.shape[0]).transpose(1, 2).mT.contiguous().mT)


def remembered(x: Tensor, state: Tensor, taps: Tensor) -> Tensor:
    """The last column stays out: no step moves on by nothing."""
    return step(x, state, taps, slice(None, -1))


def cut_after(x: Tensor, state: Tensor, taps: Tensor) -> Tensor:
    """A part of a larger memory, which nothing that a pass makes is."""
    y = F.conv1d(x.transpose(1, 2), taps[:, None], padding=taps.shape[1] - 1, groups=taps.shape[0])
    return F.silu(y)[..., : x.shape[1]]


def read_by_strides(x: Tensor, state: Tensor, taps: Tensor) -> Tensor:
    """As its memory lies: [C, B]."""
    return step(x, state, taps).as_strided((6, 3), (3, 1))


LEAVING: list[tuple[Callable[..., Tensor], Sequence[int], Any]] = [
    (step, (3, 6, 1), "causal_conv1d_update"),
    (read_by_strides, (3, 6, 1), "causal_conv1d_update"),
    (convolved, (3, 5, 6), "causal_conv1d"),
    (remembered, (3, 6, 1), None),
    (cut_after, (3, 5, 6), None),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("function", "shape", "operator"), LEAVING, ids=[case[0].__name__ for case in LEAVING]
)
def test_a_block_that_is_returned_becomes_a_call_with_the_strides_that_it_had(
    function: Callable[..., Tensor], shape: Sequence[int], operator: str | None, dynamic: bool
) -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taps = nn.Parameter(integer_tensor((6, 4), seed=0))

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return function(x, state, self.taps)

    module = Returned()
    given = [integer_tensor(shape, seed=1), integer_tensor((3, 6, 4), seed=2)]
    with torch.no_grad():
        states = [given[1].clone() for _ in range(2)]
        expected = module(given[0], states[0])
        found = rewrite(module, given, target="cuda", inner="eager", dynamic=dynamic)
        got = found.graph_module(given[0], states[1])
    torch.testing.assert_close(got, expected)
    assert torch.equal(*states) and got.stride() == expected.stride()
    called = [
        str(n.target).split(".")[1] for n in found.graph_module.graph.nodes if "fxfuse" in str(n.target)
    ]
    assert called == ([operator] if operator is not None else [])


ONE_ROW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an idle product": lambda a, b: a[::2].t() * 1,
    "glu of a turned column": lambda a, b: F.glu(torch.cat([a[::2].t(), b], -1), -1),
    "glu of a doubled one": lambda a, b: F.glu(a[::2].t().unsqueeze(-2).expand(1, 2, 4).flatten(-2), -1),
    "a sum of a stack": lambda a, b: torch.stack([a[::2].t(), b], 0).sum(0),
    "a product by einsum": lambda a, b: torch.einsum(
        "btd,td->btd", a.view(4, 1, 2).transpose(0, 1), b.view(4, 1)
    ),
}


@pytest.mark.parametrize("compute", ONE_ROW.values(), ids=ONE_ROW)
def test_strides_of_a_dimension_of_one_stay(compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Module(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return compute(a, b)

    inputs = torch.randn(8, 1), torch.randn(1, 4)
    got, expected = rewrite(Module(), inputs, dynamic=False).graph_module(*inputs), compute(*inputs)
    assert got.stride() == expected.stride() and torch.allclose(got, expected)
