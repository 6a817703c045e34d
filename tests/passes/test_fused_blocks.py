"""A step of Gated DeltaNet and attention's prologue: what is almost one is left alone, or stays right."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse import Rewritten, rewrite

HK, R, DK, DV, HIDDEN, TAPS, EPS = 2, 2, 4, 6, 16, 4, 1e-6
HV = HK * R
CHANNELS = 2 * HK * DK + HV * DV
Change = Callable[..., Any]


class Step(nn.Module):
    """One token of Gated DeltaNet; `change` names the one thing that is not as it should be."""

    def __init__(self, change: str = "", spelling: str = "") -> None:
        super().__init__()
        self.change, self.spelling = change, spelling
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)

        self.row = parameter(CHANNELS + HV * DV + 2 * HV, HIDDEN)
        self.out = parameter(HIDDEN, HV * DV)
        self.taps = parameter(CHANNELS, 1, TAPS)
        self.A_log, self.dt_bias, self.norm = parameter(HV), parameter(HV), parameter(DV)
        self.gain, self.bias = parameter(), parameter(CHANNELS)

    def forward(self, x: Tensor, conv_state: Tensor, state: Tensor) -> Any:
        batch = x.shape[0]
        mixed, z, b, a = F.linear(x, self.row).split([CHANNELS, HV * DV, HV, HV], dim=-1)
        if self.change == "every other column is the state":
            conv_state = conv_state[..., ::2]
        window, kept = torch.cat([conv_state, mixed.transpose(1, 2)], dim=-1), conv_state.shape[-1]
        if self.change == "the first columns are kept":
            conv_state.copy_(window[..., :kept])
        elif self.change == "the columns move on by two":
            conv_state.copy_(F.pad(window[..., 2:], (1, 0)))
        elif self.change != "the convolution's state stays":
            conv_state.copy_(window[..., -kept:])
        if self.change == "the taps see the columns before":
            window = F.pad(window[..., :-1], (1, 0))
        window = F.pad(window, (max(TAPS - window.shape[-1], 0), 0))
        if self.spelling == "shifted products":
            columns = window[..., -TAPS:] * self.taps[:, 0]
            mixed = columns.sum(-1, keepdim=True)
        else:
            bias = self.bias if self.spelling == "a bias" else None
            mixed = F.conv1d(window, self.taps, bias, groups=CHANNELS)[..., -1:]
        mixed = mixed * mixed.sigmoid() if self.spelling else F.silu(mixed)
        if self.change == "no silu":
            mixed = torch.tanh(mixed)
        q, k, v = mixed.transpose(1, 2).split([HK * DK, HK * DK, HV * DV], dim=-1)
        q, k = (t.reshape(batch, HK, DK).repeat_interleave(R, 1) for t in (q, k))
        v = v.reshape(batch, HV, DV)
        if self.change == "heads in another order":
            v = v.flip(1)
        eps = 1e-4 if self.change == "another epsilon of the l2 norm" else 1e-6
        if self.change != "no l2 norms":
            q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + eps) for t in (q, k))
        g = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        if self.change == "no softplus":
            g = -self.A_log.exp() * F.relu(a + self.dt_bias)
        decay, rate = g.exp().reshape(batch, HV, 1, 1), b.sigmoid().reshape(batch, HV, 1)
        if self.change == "twice the rate":
            rate = 2 * rate
        if self.change == "a scale without dimensions":
            rate = rate * self.gain
        if self.change == "an intermediate is read":
            seen = decay + 1
        if self.change == "half the precision inside":
            k = k.half().float()
        new = state * decay
        if self.spelling == "einsum":
            delta = (v - torch.einsum("bhkv,bhk->bhv", new, k)) * rate
            new = new + torch.einsum("bhk,bhv->bhkv", k, delta)
            y = torch.einsum("bhkv,bhk->bhv", new, q * DK**-0.5)
        else:
            delta = (v - (new * k[..., None]).sum(-2)) * rate
            new = new + k[..., None] * delta[..., None, :]
            y = (new * (q / DK**0.5)[..., None]).sum(-2)
        if self.change == "the state is read in between":
            seen = state.sum()
        state.copy_(new)
        if self.change == "the state is written again":
            state.mul_(2)
        z = z.reshape(batch, HV, DV)
        if self.change == "another norm behind":
            return F.linear((F.layer_norm(y, (DV,)) * z).reshape(batch, 1, HV * DV), self.out)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * self.norm * F.silu(z)
        row = y.reshape(batch, 1, HV * DV)
        out = F.linear(row[:, :0] if self.change == "nothing of the result is read" else row, self.out)
        read = self.change in ("an intermediate is read", "the state is read in between")
        return (out, seen) if read else out


def inputs(columns: int = TAPS) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 1, HIDDEN), torch.randn(2, CHANNELS, columns), torch.randn(2, HV, DK, DV)]


def rewrite_and_compare(module: nn.Module, given: list[Tensor], passes: list[str]) -> Rewritten:
    found = rewrite(module, given, passes=passes, dynamic=False)
    theirs, ours = copy.deepcopy(given), copy.deepcopy(given)
    expected, got = module(*theirs), found.graph_module(*ours)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    return found


def calls(found: Rewritten, name: str) -> int:
    return sum(str(n.target) == f"fxfuse.{name}.default" for n in found.graph_module.graph.nodes)


@pytest.mark.parametrize("spelling", ["", "einsum", "shifted products", "a bias"])
def test_a_step_is_one_call_in_every_spelling(spelling: str) -> None:
    found = rewrite_and_compare(Step(spelling=spelling), inputs(), ["gdn_decode"])
    assert calls(found, "gdn_decode") == 1
    rest = {str(n.target) for n in found.graph_module.graph.nodes if n.op == "call_function"}
    assert rest <= {
        "aten.linear.default",
        "aten.slice.Tensor",
        "aten.unflatten.int",
        "aten.squeeze.dim",
        "aten.reshape.default",
        "fxfuse.gdn_decode.default",
    }


@pytest.mark.parametrize("spelling", ["", "shifted products"])
@pytest.mark.parametrize("columns", [TAPS - 1, TAPS + 1])
def test_the_state_may_be_no_more_than_the_taps_see_beside_the_token(columns: int, spelling: str) -> None:
    for name in ("gdn_decode", "causal_conv1d_update"):
        found = rewrite_and_compare(Step(spelling=spelling), inputs(columns), [name])
        assert calls(found, name) == 1


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ("", TAPS - 2),
        ("the first columns are kept", TAPS - 1),
        ("the columns move on by two", TAPS - 1),
        ("the taps see the columns before", TAPS - 1),
        ("every other column is the state", 2 * (TAPS - 1)),
    ],
)
def test_another_state_of_few_columns_stays_as_it_is(change: str, columns: int) -> None:
    found = rewrite_and_compare(Step(change), inputs(columns), ["gdn_decode", "causal_conv1d_update"])
    assert not any(calls(found, name) for name in ("gdn_decode", "causal_conv1d_update"))
    assert {miss.rule for miss in found.report.misses} >= {"gdn_decode"}


def test_a_state_that_is_every_other_column_of_its_memory_is_taken_by_its_strides() -> None:
    x, columns, state = inputs(2 * (TAPS - 1))
    given = [x, columns[..., ::2], state]
    found = rewrite_and_compare(Step(), given, ["gdn_decode"])
    assert calls(found, "gdn_decode") == 1


CHANGES = {
    "the convolution's state stays": "",
    "no silu": "random values",
    "heads in another order": "random values",
    "another epsilon of the l2 norm": "random values",
    "no softplus": "random values",
    "twice the rate": "random values",
    "a scale without dimensions": "besides its rows and states",
    "an intermediate is read": "used by",
    "half the precision inside": "float16",
    "the state is read in between": "while it is being written",
    "the state is written again": "random values",
    "nothing of the result is read": "is no view of the result",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_quite_a_step_stays_as_it_is(change: str) -> None:
    found = rewrite_and_compare(Step(change), inputs(), ["gdn_decode"])
    assert calls(found, "gdn_decode") == 0
    if CHANGES[change]:
        (miss,) = found.report.misses
        assert CHANGES[change] in miss.reason and miss.node


PARTS = ("recurrent_gated_delta_rule", "causal_conv1d_update", "gdn_gates", "gated_rms_norm")
ALONE = {  # which parts are found of what is no whole step
    "": PARTS,
    "another norm behind": PARTS[:3],
    "no l2 norms": PARTS,
    "the convolution's state stays": ("recurrent_gated_delta_rule", "gdn_gates", "gated_rms_norm"),
    "no silu": PARTS,
    "heads in another order": PARTS,
    "another epsilon of the l2 norm": PARTS,
    "no softplus": ("recurrent_gated_delta_rule", "causal_conv1d_update", "gated_rms_norm"),
    "twice the rate": ("recurrent_gated_delta_rule", "causal_conv1d_update", "gated_rms_norm"),
    "an intermediate is read": ("causal_conv1d_update", "gated_rms_norm"),
    "half the precision inside": ("causal_conv1d_update", "gated_rms_norm"),
    "the state is read in between": ("causal_conv1d_update", "gated_rms_norm"),
    "the state is written again": ("causal_conv1d_update", "gated_rms_norm"),
}


@pytest.mark.parametrize("spelling", ["", "einsum"])
@pytest.mark.parametrize("change", ALONE)
def test_the_parts_of_what_is_no_whole_step_are_calls_of_their_own(change: str, spelling: str) -> None:
    found = rewrite_and_compare(Step(change, spelling), inputs(), list(PARTS))
    assert {name for name in PARTS if calls(found, name)} == set(ALONE[change])


def test_the_recurrence_takes_the_norms_of_its_query_and_key_or_leaves_them() -> None:
    for change, normalise in (("", True), ("no l2 norms", False), ("another epsilon of the l2 norm", False)):
        graph = rewrite_and_compare(Step(change), inputs(), list(PARTS)).graph_module.graph
        (rule,) = (n for n in graph.nodes if "recurrent" in str(n.target))
        assert rule.args[-1] is normalise


@pytest.mark.parametrize("name", ["gdn_decode", "gdn_gates"])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_switch_that_rounds_the_rate_reaches_the_call(name: str, rounded: bool) -> None:
    passes = [name] if name == "gdn_decode" else list(PARTS)
    found = rewrite(Step(), inputs(), passes=passes, dynamic=False, round_beta=rounded)
    (call,) = (n for n in found.graph_module.graph.nodes if str(n.target) == f"fxfuse.{name}.default")
    assert call.args[-1] is rounded


class Normalised(nn.Module):
    """A chunked delta rule whose query and key are l2-normalised before it."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Any:
        rule = torch.ops.fxfuse.chunk_gated_delta_rule
        return rule(self.norm(q), self.norm(k), v, g, beta, None, False)


@pytest.mark.parametrize(
    ("norm", "taken"),
    [
        (lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6), True),
        (lambda x: x / torch.sqrt(1e-6 + x.square().sum(dim=-1, keepdim=True)), True),
        (lambda x: x * (x.pow(2).sum(-1, True) + 1e-6) ** -0.5, True),
        (lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-5), False),
        (lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6), False),
        (lambda x: x * torch.rsqrt((x * x).sum(-2, keepdim=True) + 1e-6), False),
    ],
)
def test_a_chunked_rule_takes_the_norms_before_it(norm: Callable[[Tensor], Tensor], taken: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(1, 5, HV, d) for d in (DK, DK, DV)] + [-torch.rand(1, 5, HV), torch.rand(1, 5, HV)]
    found = rewrite_and_compare(Normalised(norm), given, ["l2_norm"])
    (rule,) = (n for n in found.graph_module.graph.nodes if "chunk_gated" in str(n.target))
    assert rule.args[6] is taken
    assert (len([n for n in found.graph_module.graph.nodes if "aten" in str(n.target)]) == 0) is taken


class Columns(nn.Module):
    """A convolution over the columns of a state and some tokens, which move the state on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, TAPS, groups=6).requires_grad_(False)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        columns = torch.cat([state, x], dim=-1)
        state.copy_(columns[..., -state.shape[-1] :])
        return F.silu(self.conv(columns)[..., -x.shape[-1] :]).sum(0)


@pytest.mark.parametrize(("length", "columns"), [(1, TAPS), (3, TAPS - 1), (8, TAPS), (2, 6), (9, TAPS)])
def test_a_convolution_moves_its_state_on(length: int, columns: int) -> None:
    given = [torch.randn(2, 6, length), torch.randn(2, 6, columns)]
    found = rewrite_and_compare(Columns(), given, ["causal_conv1d_update"])
    assert calls(found, "causal_conv1d_update") == 1
    assert "copy_" not in str(found.graph_module.graph)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(
    "dot",
    [
        lambda window, taps: (window * taps).sum(-1),
        lambda window, taps: (window * taps).mean(-1) * TAPS,
        lambda window, taps: torch.einsum("bck,ck->bc", window, taps),
        lambda window, taps: torch.linalg.vecdot(window, taps),
    ],
)
def test_a_silu_is_taken_wherever_the_token_gets_its_dimension_after_it(
    dot: Callable[[Tensor, Tensor], Tensor], dim: int
) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.taps, self.out = (nn.Parameter(torch.randn(s), False) for s in ((6, TAPS), (5, 6)))

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            window = torch.cat([state[..., 1:], x], dim=-1)
            state.copy_(window)
            y = F.silu(dot(window, self.taps)).unsqueeze(dim)
            return F.linear(y if dim == 1 else y.mT, self.out)

    given = [torch.randn(2, 6, 1), torch.randn(2, 6, TAPS)]
    found = rewrite_and_compare(Summed(), given, ["causal_conv1d_update"])
    assert calls(found, "causal_conv1d_update") == 1 and "silu" not in str(found.graph_module.graph)


class OfItsChannels(nn.Module):
    """Convolutions whose number of groups is a size of an input."""

    def __init__(self, moves: bool) -> None:
        super().__init__()
        self.moves = moves
        self.taps, self.out = (nn.Parameter(torch.randn(s), False) for s in ((6, 1, TAPS), (5, 6)))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        columns, groups = torch.cat([state, x], dim=-1), x.shape[1]
        if self.moves:
            state.copy_(columns[..., -TAPS:])
            return F.linear(F.silu(F.conv1d(columns, self.taps, groups=groups)[..., -1:]).mT, self.out)
        y = F.conv1d(columns, self.taps, padding=TAPS - 1, groups=groups)[..., : columns.shape[-1]]
        return F.linear(F.silu(y).mT, self.out)


@pytest.mark.parametrize("name", ["causal_conv1d", "causal_conv1d_update"])
def test_as_many_groups_as_channels_may_be_a_size_of_an_input(name: str) -> None:
    given = [torch.randn(2, 6, 1), torch.randn(2, 6, TAPS)]
    module = OfItsChannels(name == "causal_conv1d_update")
    found = rewrite(module, copy.deepcopy(given), passes=[name], dynamic=True)
    assert calls(found, name) == 1
    for batch in (2, 5):
        given = [torch.randn(batch, 6, 1), torch.randn(batch, 6, TAPS)]
        theirs, ours = copy.deepcopy(given), copy.deepcopy(given)
        torch.testing.assert_close(found.graph_module(*ours), module(*theirs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, theirs)


def reasons(found: Rewritten) -> str:
    return " ".join(miss.reason for miss in found.report.misses)


def test_what_no_kernel_takes_is_no_match_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.runtime.ops.gdn_decode.MAX_TILE", 16)
    monkeypatch.setattr("fxfuse.runtime.ops.gated_rms_norm.MAX_FEATURES", 5)
    monkeypatch.setattr("fxfuse.runtime.ops.gdn_gates.MAX_HEADS", 3)
    found = rewrite_and_compare(Step(), inputs(), ["gdn_decode", *PARTS])
    assert calls(found, "recurrent_gated_delta_rule") == 1
    assert not any(calls(found, name) for name in ("gdn_decode", "gated_rms_norm", "gdn_gates"))
    for reason in ("a state of 4 x 6 does not fit", "6 features: one program", "4 heads: one program"):
        assert reason in reasons(found)
    monkeypatch.setattr("fxfuse.runtime.ops.recurrent_gated_delta_rule.MAX_KEY_DIM", 3)
    found = rewrite_and_compare(Step(), inputs(), list(PARTS))
    assert calls(found, "recurrent_gated_delta_rule") == 0 and "key heads of 4" in reasons(found)
    monkeypatch.setattr("fxfuse.runtime.ops.qk_norm_rope_gate.MAX_HEAD_DIM", 7)
    found = rewrite_and_compare(Prologue(), attention_inputs(5), ["qk_norm_rope_gate"])
    assert calls(found, "qk_norm_rope_gate") == 0 and "heads of 8" in reasons(found)


def test_a_large_batch_is_judged_by_fewer_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.passes.judge.MOST_ELEMENTS", 7 * CHANNELS * TAPS)
    given = [x.repeat(16, *(1 for _ in x.shape[1:])) for x in inputs()]  # more heads, and columns, than fit
    assert given[1].numel() > 7 * CHANNELS * TAPS
    for passes in (["gdn_decode"], list(PARTS)):
        found = rewrite_and_compare(Step(), given, passes)
        assert all(calls(found, name) == 1 for name in passes)
    found = rewrite_and_compare(Step("heads in another order"), given, ["gdn_decode"])
    assert "random values" in reasons(found)


def test_what_is_too_large_to_be_run_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.passes.judge.MOST_ELEMENTS", 100)
    found = rewrite_and_compare(Step(), inputs(), ["gdn_decode"])
    assert calls(found, "gdn_decode") == 0
    assert "too many to run it and compare" in reasons(found)


def test_float64_stays_with_the_compiler() -> None:
    found = rewrite_and_compare(Step().double(), [x.double() for x in inputs()], ["gdn_decode", *PARTS])
    assert not any(calls(found, name) for name in ("gdn_decode", *PARTS))
    assert "dtype float64" in reasons(found)


NH, NKV, D, ROTARY, LENGTH = 4, 2, 8, 4, 12


class Prologue(nn.Module):
    """Attention over a static cache; `change` names the one thing that is not as it should be."""

    def __init__(self, change: str = "", spelling: str = "") -> None:
        super().__init__()
        self.change, self.spelling = change, spelling
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)

        self.row = parameter(2 * NH * D + 2 * NKV * D, HIDDEN)
        self.q_norm, self.k_norm = parameter(D), parameter(D)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.change == "no norms":
            return x
        one = {"plain norms": 0.0, "weights off by two": 2.0}.get(self.change, 1.0)
        if self.spelling:
            return (one + weight) * (x / torch.sqrt(EPS + (x * x).sum(-1, keepdim=True) / D))
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (one + weight)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., :ROTARY], x[..., ROTARY:]
        first, second = turned.chunk(2, dim=-1)
        if self.change == "pairs side by side":
            other = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
        elif self.change == "turned the other way":
            other = torch.cat([second, -first], dim=-1)
        else:
            other = torch.cat([-second, first], dim=-1)
        if self.spelling:
            half = ROTARY // 2
            c, s = cos[..., :half], sin[..., :half]
            c2, s2 = cos[..., half:], sin[..., half:]
            return torch.cat([first * c - second * s, second * c2 + first * s2, rest], dim=-1)
        return torch.cat([turned * cos + other * sin, rest], dim=-1)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor
    ) -> Any:
        batch, length = x.shape[:2]
        query, k, v = F.linear(x, self.row).split([2 * NH * D, NKV * D, NKV * D], dim=-1)
        q, gate = query.view(batch, length, NH, 2 * D).chunk(2, dim=-1)
        q = self.normed(q, self.q_norm).transpose(1, 2)
        k = self.normed(k.view(batch, length, NKV, D), self.k_norm).transpose(1, 2)
        v = v.view(batch, length, NKV, D).transpose(1, 2)
        if self.change == "another value":
            v = v * 2
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        unrotated = k
        q, k = self.rotated(q, c, s), self.rotated(k, c, s)
        if self.change == "the key is written before it is rotated":
            k = unrotated
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        out = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        out = out.transpose(1, 2).reshape(batch, length, -1) * gate.reshape(batch, length, -1).sigmoid()
        return (out, q) if self.change == "the query is read" else out


def attention_inputs(length: int) -> list[Tensor]:
    torch.manual_seed(1)
    angles = [torch.randn(1, length, ROTARY) for _ in range(2)]
    caches = [torch.randn(2, NKV, LENGTH, D) for _ in range(2)]
    return [torch.randn(2, length, HIDDEN), *angles, *caches, torch.arange(length) + 3]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("spelling", ["", "without rotate_half"])
def test_a_prologue_is_one_call_with_the_writes_of_its_cache(spelling: str, length: int) -> None:
    given = attention_inputs(length)
    passes = ["qk_norm_rope_gate", "sigmoid_gate"]
    found = rewrite_and_compare(Prologue(spelling=spelling), given, passes)
    assert calls(found, "qk_norm_rope_gate") == calls(found, "sigmoid_gate_mul") == 1
    assert not [n for n in found.graph_module.graph.nodes if "index_copy" in str(n.target)]
    assert not found.report.misses


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("weights off by two", "random values"),
        ("pairs side by side", "random values"),
        ("turned the other way", "random values"),
        ("another value", "random values"),
        ("the key is written before it is rotated", "random values"),
    ],
)
def test_what_is_not_quite_a_prologue_stays_as_it_is(change: str, reason: str) -> None:
    found = rewrite_and_compare(Prologue(change), attention_inputs(5), ["qk_norm_rope_gate"])
    assert calls(found, "qk_norm_rope_gate") == 0
    assert [reason in miss.reason for miss in found.report.misses] == [True]


def test_plain_norms_have_weights_off_by_one() -> None:
    found = rewrite_and_compare(Prologue("plain norms"), attention_inputs(5), ["qk_norm_rope_gate"])
    assert calls(found, "qk_norm_rope_gate") == 1


@pytest.mark.parametrize("length", [1, 5])
def test_a_rotation_without_norms_is_found_too(length: int) -> None:
    found = rewrite_and_compare(Prologue("no norms"), attention_inputs(length), ["qk_norm_rope_gate"])
    (step,) = (n for n in found.graph_module.graph.nodes if "qk_norm_rope" in str(n.target))
    assert list(step.args[3:5]) == [None, None]
    assert not [n for n in found.graph_module.graph.nodes if "index_copy" in str(n.target)]


def test_a_long_cache_is_no_reason_to_leave_a_prologue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxfuse.passes.judge.MOST_ELEMENTS", 2 * 5 * (2 * NH * D + 2 * NKV * D))
    given = attention_inputs(5)
    given[3:5] = [torch.randn(2, NKV, 500, D) for _ in range(2)]
    found = rewrite_and_compare(Prologue(), given, ["qk_norm_rope_gate"])
    assert calls(found, "qk_norm_rope_gate") == 1


class OneTable(Prologue):
    """The cosine is the sine, too: of the key as it was given, of the query in the shape of heads."""

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., :ROTARY], x[..., ROTARY:]
        first, second = turned.chunk(2, dim=-1)
        if cos.dim() == 4:
            (c, c2), (s, s2) = cos.chunk(2, dim=-1), (cos[..., : ROTARY // 2], cos[..., ROTARY // 2 :])
            return torch.cat([first * c - second * s, second * c2 + first * s2, rest], dim=-1)
        pair = [torch.einsum("bhtr,btr->bhtr", t, cos) for t in (turned, torch.cat([-second, first], dim=-1))]
        return torch.cat([pair[0] + pair[1], rest], dim=-1)

    def forward(self, x: Tensor, cos: Tensor) -> Any:  # type: ignore[override]
        batch, length = x.shape[:2]
        q, k, v, _ = F.linear(x, self.row).split([NH * D, NKV * D, NKV * D, NH * D], dim=-1)
        q = self.normed(q.view(batch, length, NH, D), self.q_norm).transpose(1, 2)
        k = self.normed(k.view(batch, length, NKV, D), self.k_norm).transpose(1, 2)
        v = v.view(batch, length, NKV, D).transpose(1, 2)
        q, k = self.rotated(q, cos.unsqueeze(1), cos), self.rotated(k, cos, cos)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).sum(1)


def test_one_table_of_angles_undoes_no_pass() -> None:
    given = [torch.randn(2, 5, HIDDEN), torch.randn(2, 5, ROTARY)]
    found = rewrite_and_compare(OneTable(), given, ["qk_norm_rope_gate"])
    assert "undone" not in " ".join(miss.reason for miss in found.report.misses)


def test_a_query_that_is_read_elsewhere_too_is_the_one_of_the_call() -> None:
    found = rewrite_and_compare(Prologue("the query is read"), attention_inputs(5), ["qk_norm_rope_gate"])
    assert calls(found, "qk_norm_rope_gate") == 1


class Repeated(nn.Module):
    """Attention over keys and values that are repeated for each query head."""

    def __init__(self, repeat: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.repeat = repeat

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        ratio = q.shape[1] // k.shape[1]
        keys, values = self.repeat(k, ratio), self.repeat(v, ratio)
        return F.scaled_dot_product_attention(q, keys, values, mask)


def by_expansion(x: Tensor, ratio: int) -> Tensor:
    batch, heads, length, dim = x.shape
    return x[:, :, None].expand(batch, heads, ratio, length, dim).reshape(batch, -1, length, dim)


@pytest.mark.parametrize(
    ("repeat", "length", "matches"),
    [
        (by_expansion, 1, 1),
        (lambda x, ratio: x.repeat_interleave(ratio, 1), 1, 1),
        (lambda x, ratio: x.repeat(1, ratio, 1, 1), 1, 0),
        (by_expansion, 3, 0),
    ],
)
def test_repeated_keys_of_one_token_are_read_once(repeat: Any, length: int, matches: int) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 6, length, 4), *(torch.randn(2, 3, 5, 4) for _ in range(2))]
    given.append(torch.rand(2, 1, length, 5) > 0.3)
    found = rewrite_and_compare(Repeated(repeat), given, ["grouped_query_attention"])
    assert found.report.matched == matches
