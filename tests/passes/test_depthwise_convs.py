"""A short depthwise convolution becomes shifted products: only such a one, and no less exact."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse import Rewritten, rewrite
from fxfuse.passes import depthwise_convs
from fxfuse.runtime.options import Options
from fxfuse.runtime.rewrite import traced
from fxfuse.testing.tensors import integer_tensor

PASS = "depthwise_convs"


def matches(rewritten: Rewritten) -> list[Any]:
    return rewritten.report.graphs[0].outcomes[PASS].matches


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("taps", "length"), [(4, 4), (4, 9), (1, 5), (8, 11), (2, 2)])
def test_every_size_and_padding(rewrite_equal: Any, taps: int, length: int, padding: int, bias: bool) -> None:
    conv = nn.Conv1d(6, 6, taps, groups=6, padding=padding, bias=bias)
    rewritten = rewrite_equal(conv, [integer_tensor((2, 6, length), 0)], passes=PASS)
    assert len(matches(rewritten)) == 1
    targets = {str(node.target) for node in rewritten.graph_module.graph.nodes}
    assert "aten.conv1d.default" not in targets


def test_an_input_in_another_layout(rewrite_equal: Any) -> None:
    """The mixer's input is a transposed view; the output of a convolution is contiguous all the same."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 6, 4, groups=6, padding=3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2))[:, :, : x.shape[1]]

    mixer = Mixer()
    rewritten = rewrite_equal(mixer, [integer_tensor((2, 9, 6), 0)], passes=PASS)
    assert len(matches(rewritten)) == 1
    for length in (1, 5, 30):
        x = integer_tensor((2, length, 6), length)
        assert torch.equal(rewritten.graph_module(x), mixer(x))


@pytest.mark.parametrize("padding", [0, 2])
def test_who_reads_its_strides_sees_those_of_a_convolution(rewrite_equal: Any, padding: int) -> None:
    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 6, 3, groups=6, padding=padding, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.transpose(1, 2)).as_strided((4,), (1,), 1) * 2

    assert len(matches(rewrite_equal(Strided(), [integer_tensor((2, 5, 6), 0)], passes=PASS))) == 1


class Rows(nn.Module):
    """A convolution over some columns of a merged linear, and what is read of it row by row."""

    def __init__(self, between: Callable[[Tensor], Tensor], read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 4, groups=6, padding=3)
        self.between, self.read = between, read

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x[..., :6].transpose(1, 2))
        return self.read(self.between(y)[:, :, : x.shape[1]].transpose(1, 2))


def heads(rows: Tensor) -> list[Tensor]:
    return [part.reshape(*rows.shape[:2], 1, 3) @ torch.ones(3, 2) for part in rows.split(3, dim=-1)]


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nothing": (lambda y: y, True),
    "a scale": (lambda y: y * 2, True),
    "a cast": (lambda y: y.double(), True),
    "another value as well": (lambda y: y + y.sum(), False),
    "another tensor": (lambda y: y * torch.arange(y.shape[-1]), False),
    "itself": (lambda y: y * y, False),
    "itself by name": (lambda y: torch.add(y, other=y), False),
    "an order of its own": (lambda y: y.cumsum(-1), False),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_is_read_row_by_row_is_computed_so(rewrite_equal: Any, between: str) -> None:
    change, in_rows = BETWEEN[between]
    module = Rows(change, lambda rows: heads(rows.float()))
    rewritten = rewrite_equal(module, [integer_tensor((2, 9, 8), 0)], passes=PASS)
    assert len(matches(rewritten)) == 1 and computed_in_rows(rewritten) == in_rows
    for length in (1, 5, 30):
        x = integer_tensor((2, length, 8), length)
        assert all(map(torch.equal, rewritten.graph_module(x), module(x)))


def computed_in_rows(rewritten: Rewritten) -> bool:
    """Whether the products with the taps are written with tokens before channels."""
    graph = rewritten.graph_module.graph
    products = graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    channels = products[0].meta["val"].shape[-1]
    return isinstance(channels, int) and channels == 6


@pytest.mark.parametrize(
    "read",
    [
        lambda rows: rows,
        lambda rows: rows[:, 1:],
        lambda rows: rows.sigmoid(),
        lambda rows: rows.as_strided((4,), (1,), 1) * 2,
        lambda rows: rows.mul_(2).sum(-1),
        lambda rows: (rows[..., 0].zero_(), rows.sum(-1))[1],
        lambda rows: torch.nonzero(rows),
    ],
    ids=["as it is", "a part", "computed", "strides", "written", "a written part", "unknown size"],
)
def test_whoever_sees_the_layout_of_a_view_sees_that_of_a_convolution(
    rewrite_equal: Any, read: Callable[[Tensor], Tensor]
) -> None:
    module = Rows(torch.nn.functional.silu, read)
    x = integer_tensor((2, 9, 8), 0)
    rewritten = rewrite_equal(module, [x], passes=PASS, dynamic=False)
    assert len(matches(rewritten)) == 1
    made, expected = rewritten.graph_module(x), module(x)
    assert made.stride() == expected.stride()


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv1d(6, 6, 4),
        nn.Conv1d(6, 6, 4, groups=3),
        nn.Conv1d(6, 12, 4, groups=6),
        nn.Conv1d(6, 6, 4, groups=6, stride=2),
        nn.Conv1d(6, 6, 4, groups=6, dilation=2),
        nn.Conv1d(6, 6, 9, groups=6),
        nn.Conv1d(6, 6, 4, groups=6, padding="same"),
    ],
)
def test_other_convolutions_stay(rewrite_equal: Any, other: nn.Module) -> None:
    assert matches(rewrite_equal(other, [integer_tensor((2, 6, 12), 0)], passes=PASS)) == []


def test_half_precision_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        conv = nn.Conv1d(64, 64, 4, groups=64, padding=3, dtype=dtype)
        x = torch.randn(1, 64, 33, dtype=dtype)
        rewritten = rewrite(conv, [x], passes=PASS)
        with torch.no_grad():
            exact = nn.functional.conv1d(
                x.double(), conv.weight.double(), conv.bias.double(), padding=3, groups=64
            )
            error = (rewritten.graph_module(x).double() - exact).abs()
        assert rewritten.graph_module(x).dtype == dtype
        assert bool((error <= exact.abs() * torch.finfo(dtype).eps + 1e-6).all())


def convolved(x: Tensor, taps: Tensor, cut: bool = True) -> Tensor:
    y = F.conv1d(x, taps.to(x.dtype), padding=3, groups=6)
    return y[..., : x.shape[-1]] if cut else y


# Each casts once or more behind the convolution or within what belongs to it.
CASTS: dict[str, Callable[[Tensor, Tensor, torch.dtype], Tensor]] = {
    "before the cut": lambda x, w, there: F.silu(convolved(x, w, cut=False).to(there)[..., :9]),
    "between cut and silu": lambda x, w, there: F.silu(convolved(x, w).to(there)),
    "behind the silu": lambda x, w, there: F.silu(convolved(x, w)).to(there),
    "without a silu": lambda x, w, there: convolved(x, w).to(there),
    "there and back before the silu": lambda x, w, there: F.silu(convolved(x, w).to(there).to(x.dtype)),
    "there and back behind the silu": lambda x, w, there: F.silu(convolved(x, w)).to(there).to(x.dtype),
    "around the silu": lambda x, w, there: F.silu(convolved(x, w).to(there)).to(x.dtype),
    "within the silu": lambda x, w, there: (lambda y: y * torch.sigmoid(y.to(there)))(convolved(x, w)),
    "like another tensor": lambda x, w, there: F.silu(convolved(x, w).type_as(w.to(there))),
    "before the padding": lambda x, w, there: F.silu(convolved(x.to(there), w)),
    "around everything": lambda x, w, there: F.silu(convolved(x.to(there), w)).to(x.dtype),
    "behind an autocast": lambda x, w, there: F.silu(autocast(convolved, x, w).to(there)),
}


def autocast(function: Callable[..., Tensor], *given: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return function(*given)


@pytest.mark.parametrize("where", CASTS)
@pytest.mark.parametrize("passes", [("causal_conv1d",), (PASS,), ("causal_conv1d", PASS)], ids=" ".join)
def test_a_cast_around_a_convolution_keeps_its_dtype_and_its_rounding(
    where: str, passes: tuple[str, ...]
) -> None:
    """On small integers the convolution rounds nothing: what differs is a rounding lost or gained."""
    weight, x = integer_tensor((6, 1, 4), 0), integer_tensor((2, 6, 9), 1)

    class Cast(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            y = CASTS[where](x, w, there).transpose(1, 2)
            return y @ torch.eye(6, dtype=y.dtype)  # nothing shows the strides of y

    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for own, there in product(kinds, kinds):
        given = [x.to(own), weight.to(own)]
        found = rewrite(Cast(), given, passes=passes, dynamic=False)
        expected, got = Cast()(*given), found.graph_module(*given)
        assert (got.dtype, got.stride()) == (expected.dtype, expected.stride()), (own, there)
        assert not [miss for miss in found.report.misses if "undone" in miss.reason], (own, there)
        coarse = max(torch.finfo(dtype).eps for dtype in (own, got.dtype, torch.float32))
        error = (got.double() - expected.double()).abs().amax() / expected.double().abs().amax()
        assert error <= coarse, (own, there, found.report.matched)
        if own == there != torch.float64 and where != "behind an autocast":
            assert found.report.matched == 1, own


def test_a_convolution_of_whole_numbers_is_none_of_ours() -> None:
    """On random values they would all be zero."""

    class Whole(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            before = torch.ones(2, 6, 3)
            return F.conv1d(torch.cat([before, x], -1), w, groups=6).to(x.dtype).transpose(1, 2) * 2

    given = [torch.arange(108).view(2, 6, 9) % 7, integer_tensor((6, 1, 4), 0)]
    found = rewrite(Whole(), given, passes=("causal_conv1d",), dynamic=False)
    assert torch.equal(found.graph_module(*given), Whole()(*given))
    assert found.report.matched == 0
    assert [miss.reason for miss in found.report.misses if "undone" in miss.reason] == []


def test_with_gradients_the_convolution_stays() -> None:
    """Autograd would keep every product."""
    conv = nn.Conv1d(6, 6, 4, groups=6)
    program = traced(conv, dict(conv.named_parameters()), [torch.ones(1, 6, 9)], Options())
    assert len(depthwise_convs.run(program.copy()).matches) == 1
    assert depthwise_convs.run(replace(program.copy(), grad_enabled=True)).matches == []


def test_on_another_device_the_convolution_stays() -> None:
    conv = nn.Conv1d(6, 6, 4, groups=6, device="meta")
    x = torch.ones(1, 6, 9, device="meta")
    program = traced(conv, dict(conv.named_parameters()), [x], Options())
    assert depthwise_convs.run(program).matches == []


def test_a_convolution_of_a_convolution_is_rewritten_too(rewrite_equal: Any) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            once = torch.conv1d(F.pad(x, (2, 0)), w, groups=4)
            return torch.conv1d(once, w, groups=4) * 2

    inputs = [integer_tensor((2, 4, 9), 0), integer_tensor((4, 1, 3), 1)]
    assert len(matches(rewrite_equal(Twice(), inputs, passes=PASS))) == 2
