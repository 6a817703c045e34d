"""The chunked gated delta rule as one operator: transformers' function is the oracle."""

import inspect
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from fxfuse.errors import ShapeError
from fxfuse.runtime.ops import chunk_gated_delta_rule as op
from fxfuse.runtime.ops import recurrent_gated_delta_rule
from fxfuse.runtime.ops.chunk_gated_delta_rule import MAX_KEY_DIM, chunk_gated_delta_rule, refusal
from fxfuse.runtime.ops.gated_delta_rule import reference

LENGTHS = (1, 3, 63, 64, 65, 200)


def inputs(
    length: int, ratio: int = 2, batch: int = 2, heads: int = 2, dk: int = 8, dv: int = 6, state: bool = True
) -> list[Any]:
    torch.manual_seed(length * 10 + ratio)
    values = heads * ratio
    return [
        torch.randn(batch, length, heads, dk),
        torch.randn(batch, length, heads, dk),
        torch.randn(batch, length, values, dv),
        F.logsigmoid(torch.randn(batch, length, values)),
        torch.rand(batch, length, values),
        torch.randn(batch, values, dk, dv) * 0.1 if state else None,
    ]


def oracle(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, normalise: bool
) -> Any:
    """transformers' function in its float32 arithmetic, with heads repeated by hand."""
    ratio = v.shape[2] // q.shape[2]
    return torch_chunk_gated_delta_rule(
        q.repeat_interleave(ratio, 2),
        k.repeat_interleave(ratio, 2),
        v,
        g=g,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalise,
    )


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_output_and_state_are_those_of_transformers(length: int, ratio: int) -> None:
    for state, normalise in itertools.product((False, True), (False, True)):
        given = inputs(length, ratio, state=state)
        if not normalise:  # unnormalised keys of this width make the recurrence itself blow up
            given[1] = F.normalize(given[1], dim=-1)
        before = [x.clone() if x is not None else None for x in given]
        out, final = chunk_gated_delta_rule(*given, normalise)
        expected, expected_final = oracle(*given, normalise)
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(final, expected_final, atol=2e-5, rtol=1e-4)
        assert out.is_contiguous() and final.is_contiguous() and final.dtype == torch.float32
        assert all(b is None or torch.equal(x, b) for x, b in zip(given, before, strict=True))


def test_two_halves_with_the_state_between_them_are_the_whole() -> None:
    whole = inputs(130, state=False)
    out, final = chunk_gated_delta_rule(*whole, True)
    first, state = chunk_gated_delta_rule(*[x[:, :70] for x in whole[:5]], None, True)
    second, last = chunk_gated_delta_rule(*[x[:, 70:] for x in whole[:5]], state, True)
    torch.testing.assert_close(torch.cat([first, second], 1), out, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(last, final, atol=2e-5, rtol=1e-4)


def test_bfloat16_inputs_are_computed_in_float32_and_rounded_once() -> None:
    given = [x.bfloat16() for x in inputs(65)[:5]]
    out, final = chunk_gated_delta_rule(*given, None, True)
    expected, expected_final = reference(*[x.float() for x in given], None, True)
    assert out.dtype == torch.bfloat16 and final.dtype == torch.float32
    torch.testing.assert_close(out, expected.bfloat16(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(final, expected_final, atol=1e-2, rtol=1e-2)


def test_an_empty_sequence_keeps_the_state() -> None:
    given = inputs(0)
    out, final = chunk_gated_delta_rule(*given, True)
    assert out.shape == (2, 0, 4, 6) and torch.equal(final, given[5])
    assert final.data_ptr() != given[5].data_ptr()


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", [1, 65])
def test_the_operator_keeps_torchs_rules(length: int, state: bool) -> None:
    given = inputs(length, batch=1, dk=4, dv=3, state=state)
    leaves = [x.requires_grad_() if x is not None else None for x in given]
    torch.library.opcheck(chunk_gated_delta_rule, (*leaves, True))


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    given = inputs(65)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    assert not any(x.is_contiguous() for x in strided[:5])
    for got, expected in zip(
        chunk_gated_delta_rule(*strided, True), chunk_gated_delta_rule(*given, True), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("length", [3, 65])
def test_gradients_are_those_of_transformers(length: int, state: bool) -> None:
    given = inputs(length, state=state)
    ours = [x.clone().requires_grad_() for x in given if x is not None]
    theirs = [x.clone().requires_grad_() for x in given if x is not None]
    rest = [] if state else [None]
    for leaves, function in ((ours, chunk_gated_delta_rule), (theirs, oracle)):
        out, final = function(*leaves, *rest, True)
        torch.manual_seed(1)
        ((out * torch.randn(out.shape)).sum() + (final * torch.randn(final.shape)).sum()).backward()
    for name, a, b in zip(("q", "k", "v", "g", "beta", "state"), ours, theirs, strict=False):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_gradient_of_one_output_alone_is_enough() -> None:
    given = [x.requires_grad_() for x in inputs(5)]
    chunk_gated_delta_rule(*given, True)[1].sum().backward()
    assert all(x.grad is not None for x in given[1:])


def test_what_nobody_asks_for_has_no_gradient_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []
    backward = op.chunk_gated_delta_rule_backward

    def recorded(grad_out: Any, grad_state: Any, *rest: Any) -> Any:
        seen.append((grad_out is None, grad_state is None))
        return backward(grad_out, grad_state, *rest)

    monkeypatch.setattr(op, "chunk_gated_delta_rule_backward", recorded)
    given = [x.requires_grad_() for x in inputs(5)]
    for output in (0, 1):
        chunk_gated_delta_rule(*given, True)[output].sum().backward()
    assert seen == [(False, True), (True, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zero_keys_extreme_decays_and_large_values_give_numbers(dtype: torch.dtype) -> None:
    given = inputs(65, state=False)
    given[0][:, :3] = 0
    given[1][:, 2:9] = 0
    given[2] *= 1e4  # near the largest number of float16, 65504
    given[3][:, 5:8] = -1e4  # softplus(100) · exp(A_log) and more
    given[3][:, 12] = -torch.inf  # exp(A_log) beyond float32
    given[3][:, 20:23] = 0  # and beneath it
    given[4][:, 4] = 0
    rounded = [x.to(dtype) for x in given[:3]]
    out, final = chunk_gated_delta_rule(*rounded, *given[3:5], None, True)
    # Token by token: transformers' sums of logarithms lose digits behind a decay of 1e-4343.
    exact_final = given[0].new_zeros(2, 4, 8, 6, dtype=torch.float64)
    exact = recurrent_gated_delta_rule.reference(
        *(x.double() for x in (*rounded, *given[3:5])), exact_final, True
    )
    assert out.isfinite().all() and final.isfinite().all()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    scale = exact.abs().amax()
    assert ((out.double() - exact).abs() <= tolerance * scale).all()
    torch.testing.assert_close(
        final.double(), exact_final, rtol=1e-4, atol=1e-4 * float(exact_final.abs().amax())
    )


def test_tokens_of_zeros_on_the_left_leave_what_follows_as_it_is() -> None:
    """As transformers pads: hidden states of padding are zeroed, so its projections are, too."""
    given = inputs(70, state=False)
    alone = [x[:, 33:] for x in given[:5]]
    for x in (*given[:3], given[4]):
        x[:, :33] = 0
    given[4][:, :33] = 0.5  # the rate of a zero is a half; the keys are zero all the same
    out, final = chunk_gated_delta_rule(*given[:5], None, True)
    expected, expected_final = chunk_gated_delta_rule(*alone, None, True)
    torch.testing.assert_close(out[:, 33:], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(final, expected_final, atol=2e-5, rtol=1e-4)
    assert torch.equal(out[:, :33], torch.zeros_like(out[:, :33]))


def packed(lengths: list[int], state: bool) -> tuple[list[Any], Tensor]:
    given = inputs(sum(lengths), batch=1, state=False)
    given[5] = torch.randn(len(lengths), 4, 8, 6) * 0.1 if state else None
    return given, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("lengths", [[5], [64, 0, 3, 65], [0, 0], [1, 1, 70]])
def test_packed_sequences_give_bit_for_bit_what_each_gives_alone(lengths: list[int], state: bool) -> None:
    given, bounds = packed(lengths, state)
    step = given[5].clone() if state else torch.zeros(len(lengths), 4, 8, 6)
    out, final = chunk_gated_delta_rule(*given, True, bounds)
    steps = recurrent_gated_delta_rule.recurrent_gated_delta_rule(*given[:5], step, True, bounds)
    for n, (a, b) in enumerate(itertools.pairwise(bounds.tolist())):
        alone = [x[:, a:b].clone() for x in given[:5]]
        before = given[5][n : n + 1].clone() if state else None
        expected, expected_final = chunk_gated_delta_rule(*alone, before, True)
        assert torch.equal(out[:, a:b], expected) and torch.equal(final[n : n + 1], expected_final)
        moved = torch.zeros(1, 4, 8, 6) if before is None else before.clone()
        expected = recurrent_gated_delta_rule.recurrent_gated_delta_rule(*alone, moved, True)
        assert torch.equal(steps[:, a:b], expected) and torch.equal(step[n : n + 1], moved)
    assert out.shape == steps.shape == given[2].shape


def test_gradients_of_packed_sequences_do_not_cross() -> None:
    given, bounds = packed([3, 66], True)
    leaves = [x.requires_grad_() for x in given]
    out, final = chunk_gated_delta_rule(*leaves, True, bounds)
    (out[:, 3:].sum() + final[1].sum()).backward()
    assert all(x.grad is not None and not x.grad[:, :3].any() and x.grad[:, 3:].any() for x in leaves[:5])
    assert not leaves[5].grad[0].any() and leaves[5].grad[1].any()
    torch.library.opcheck(chunk_gated_delta_rule, (*leaves, True, bounds))


@pytest.mark.parametrize("rule", ["chunk", "recurrent"])
def test_what_does_not_fit_is_named(rule: str) -> None:
    function = (
        chunk_gated_delta_rule if rule == "chunk" else recurrent_gated_delta_rule.recurrent_gated_delta_rule
    )
    given, bounds = packed([3, 4], True)
    with pytest.raises(ShapeError, match=rf"{rule}_gated_delta_rule takes query and key .*\(1, 6, 2, 8\)"):
        function(given[0][:, 1:], *given[1:], True)
    with pytest.raises(ShapeError, match=r"a state \[N, HV, dk, dv\], here \(2, 4, 8, 6\), not \(1, 4"):
        function(*given[:5], given[5][:1], True, bounds)
    with pytest.raises(ShapeError, match=r"a batch of one, with cu_seqlens .* not a batch of 1 with float32"):
        function(*given, True, bounds.float())
    for wrong in ([1, 3, 7], [0, 3, 6], [0, 8, 7]):
        with pytest.raises(ShapeError, match=r"do not lead from 0 to the 7 tokens"):
            function(*given, True, torch.tensor(wrong))
    wide = torch.empty(1, 1, 1, MAX_KEY_DIM + 1)
    assert f"key heads of {MAX_KEY_DIM + 1}" in (refusal(wide, wide, *given[2:]) or "")
    assert "cpu" in (refusal(*given) or "")


@pytest.fixture()
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the operator runs where kernels are not refused, by name; both give the reference's result."""
    ran: list[str] = []

    def named(name: str) -> Any:
        def run(*given: Any, **options: Any) -> Any:
            ran.append(name)
            return reference(*given, **options)

        return run

    def theirs(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        ran.append("fla")
        assert all(x.is_contiguous() for x in (q, k, v)) and options["scale"] == q.shape[-1] ** -0.5
        return reference(
            *(q, k, v, options["g"], options["beta"], options["initial_state"]),
            options["use_qk_l2norm_in_kernel"],
            options["cu_seqlens"],
        )

    monkeypatch.setattr(op, "refusal", lambda *given: None)
    monkeypatch.setattr(op, "launch", named("ours"))
    monkeypatch.setattr(op, "_fla", lambda: theirs)
    monkeypatch.setattr(op, "_fla_takes_groups", lambda: True)
    return ran


def test_the_other_librarys_kernel_runs_for_long_prompts_in_half_precision(
    as_on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "FLA_TOKENS", 20)
    for length, dtype in ((20, torch.bfloat16), (19, torch.bfloat16), (20, torch.float32)):
        given = inputs(length)
        strided = [x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1) for x in given[:3]]
        got = chunk_gated_delta_rule(*strided, *given[3:], True)
        expected = reference(*strided, *given[3:], True)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    monkeypatch.setattr(op, "_fla", lambda: None)
    given = [x.bfloat16() for x in inputs(20)]
    chunk_gated_delta_rule(*given, True)
    assert as_on_a_gpu == ["fla", "ours", "ours", "ours"]


@pytest.mark.parametrize(
    ("version", "takes_groups"), [("0.4.2", False), ("0.5.0", True), ("0.5.dev1", True), ("1.0", True)]
)
def test_releases_of_the_other_library_that_know_no_groups_are_given_repeated_heads(
    version: str, takes_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fla", SimpleNamespace(__version__=version))  # type: ignore[arg-type]
    op._fla_takes_groups.cache_clear()
    seen: list[tuple[int, ...]] = []

    def theirs(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append((q.shape[2], k.shape[2], v.shape[2]))
        assert options["g"].isfinite().all() and options["cu_seqlens"].dtype == torch.int64
        return reference(
            *(q, k, v, options["g"], options["beta"], options["initial_state"]),
            options["use_qk_l2norm_in_kernel"],
            options["cu_seqlens"],
        )

    given, bounds = packed([3, 5], True)
    given[3][:, 2] = -torch.inf
    got = op.by_fla(theirs, *given, True, bounds.int())
    op._fla_takes_groups.cache_clear()
    assert seen == [(2, 2, 4) if takes_groups else (4, 4, 4)]
    for x, y in zip(got, reference(*given, True, bounds), strict=True):
        torch.testing.assert_close(x, y)


def test_the_other_librarys_function_takes_what_it_is_given() -> None:
    function = op._fla()
    if function is None:
        pytest.skip("needs flash-linear-attention")
    given = inspect.signature(function).parameters
    names = {"g", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"}
    assert {*names, "cu_seqlens"} <= set(given)
