"""`assert_equivalent` accepts what is equivalent; each check fails on a candidate broken for it."""

import copy
import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3_5ForCausalLM, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from fxfuse.errors import OptionError, VerificationError
from fxfuse.runtime.shapes import text_config
from fxfuse.testing import (
    EquivalenceReport,
    assert_equivalent,
    cache_tensors,
    flatten,
    integer_like_,
    integer_tensor,
    poison,
)

WIDTH = 64


class TwoLinears(nn.Module):
    def __init__(self, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False, dtype=dtype)
        self.up = nn.Linear(width, 2 * width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x)


def merged(model: TwoLinears, roll: int = 0) -> Any:
    """The two products as one, with the rows off by `roll`."""
    weight = torch.cat([model.gate.weight, model.up.weight]).detach().roll(roll, 0)
    return lambda x: nn.functional.linear(x, weight).chunk(2, -1)


def failure(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(VerificationError) as caught:
        assert_equivalent(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def integer_model() -> TwoLinears:
    return integer_like_(TwoLinears(), seed=1)


def returning(value: Any) -> Any:
    return lambda x: value


# The exact oracle


def test_exact_accepts_a_merged_product_on_integers(integer_model: TwoLinears) -> None:
    report = assert_equivalent(
        integer_model, merged(integer_model), integer_tensor((3, WIDTH), 2), exact=True
    )
    assert isinstance(report, EquivalenceReport)
    assert report.ok
    assert [row.path for row in report.comparisons] == ["[0]", "[1]"]
    assert all(row.max_abs_error == 0 for row in report.comparisons)


def test_exact_finds_rows_off_by_one(integer_model: TwoLinears) -> None:
    text = failure(integer_model, merged(integer_model, roll=1), integer_tensor((3, WIDTH), 2), exact=True)
    assert "NOT equivalent: oracle exact" in text
    assert "elements differ" in text


def test_exact_finds_one_element_and_says_where() -> None:
    def broken(x: Tensor) -> Tensor:
        y = x.clone()
        y[1, 2] += 1
        return y

    text = failure(nn.Identity(), broken, torch.zeros(2, 3), exact=True)
    assert "[1, 2]" in text
    assert "1 of 6 elements differ" in text


def test_exact_finds_large_integers_that_float64_cannot_tell_apart() -> None:
    big = torch.tensor([2**60])
    assert "1 of 1 elements differ" in failure(returning(big), returning(big + 1), torch.zeros(1), exact=True)


# The reference oracle


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reference_accepts_the_same_products_in_another_form(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = TwoLinears(dtype=dtype)
    report = assert_equivalent(model, merged(model), torch.randn(16, WIDTH, dtype=dtype))
    assert report.oracle == "float64"
    for row in report.comparisons:
        assert row.ratio == pytest.approx(1.0, abs=0.2)
        assert row.cosine == pytest.approx(1.0, abs=1e-4)


def low_precision_sum(model: TwoLinears) -> Any:
    """The same products, accumulated in bf16."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        totals = []
        for linear in (model.gate, model.up):
            total = torch.zeros(len(x), linear.out_features, dtype=torch.bfloat16)
            for k in range(linear.in_features):
                total = total + x[:, k, None] * linear.weight[:, k]
            totals.append(total)
        return tuple(totals)

    return run


def test_reference_finds_accumulation_in_low_precision() -> None:
    torch.manual_seed(0)
    model = TwoLinears(dtype=torch.bfloat16)
    assert "RMS error" in failure(
        model, low_precision_sum(model), torch.randn(16, WIDTH, dtype=torch.bfloat16)
    )


def test_reference_finds_a_wrong_row_in_low_precision() -> None:
    torch.manual_seed(0)
    model = TwoLinears(dtype=torch.bfloat16)
    assert "RMS error" in failure(model, merged(model, roll=1), torch.randn(16, WIDTH, dtype=torch.bfloat16))


class CastsByName(nn.Module):
    """A norm that computes in fp32 whatever its input, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        y = wide * torch.rsqrt(wide.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return torch.softmax(y @ torch.eye(WIDTH) @ self.weight.float(), -1, dtype=torch.float32)


def test_the_wide_run_is_wide_through_casts_by_name() -> None:
    torch.manual_seed(0)
    model = CastsByName()
    report = assert_equivalent(model, lambda x: model(x), torch.randn(8, WIDTH))
    # Against an oracle rounded to fp32 inside, the error would be that rounding or nothing at all.
    exact = copy.deepcopy(model).double()
    assert report.comparisons[0].rms_error == report.comparisons[0].reference_rms_error
    assert 0 < report.comparisons[0].rms_error < 1e-7
    assert exact.weight.dtype == torch.float64


def test_a_correctly_rounded_result_passes_where_the_reference_is_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, WIDTH, dtype=torch.bfloat16)
    # Multiplying by two is exact: the reference has no error of its own. The candidate is rounded once.
    candidate = (x.double() * 6 * (1 + 2e-3)).div(3).to(torch.bfloat16)
    report = assert_equivalent(lambda t: t * 2, returning(candidate), x)
    assert report.comparisons[0].ratio is None
    assert "RMS error" in failure(lambda t: t * 2, returning(candidate * 1.02), x)
    assert "RMS error" in failure(lambda t: t * 2, returning(candidate), x, floor=0.0)


def test_slack_follows_the_width_and_can_be_given() -> None:
    toy, real = nn.Linear(64, 8, bias=False), nn.Linear(1024, 8, bias=False)
    assert assert_equivalent(toy, lambda x: toy(x), torch.randn(4, 64)).slack == 1.5
    assert assert_equivalent(real, lambda x: real(x), torch.randn(4, 1024)).slack == 1.1
    assert assert_equivalent(real, lambda x: real(x), torch.randn(4, 1024), slack=1.01).slack == 1.01


def test_a_reference_that_cannot_be_cast_needs_a_wide_one() -> None:
    model = nn.Linear(WIDTH, 8, dtype=torch.bfloat16)
    embedding = nn.Embedding(10, WIDTH, dtype=torch.bfloat16)
    x = torch.randn(4, WIDTH, dtype=torch.bfloat16)
    assert "high_precision=" in failure(lambda x: model(x), model, x)
    assert "high_precision=" in failure(lambda ids: embedding(ids), embedding, torch.tensor([1, 2]))
    wide = copy.deepcopy(model).double()
    assert assert_equivalent(lambda x: model(x), model, x, high_precision=wide).ok


# Structure


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: (x,), "missing from the candidate"),
        (lambda x: (x, x, x), "missing from the reference"),
        (lambda x: (x, x.bfloat16()), "torch.bfloat16, expected torch.float32"),
        (lambda x: (x, x[:1]), "shape [1, 3], expected [2, 3]"),
        (lambda x: (x, None), "None, expected a tensor [2, 3]"),
        (lambda x: (x, {"hidden": x}), "[1].hidden"),
    ],
)
def test_structure_dtype_and_shape(broken: Any, message: str, exact: bool) -> None:
    text = failure(lambda x: (x, x + 0), broken, torch.ones(2, 3), exact=exact)
    assert message in text
    assert "[1]" in text or "[2]" in text


def test_plain_values_are_compared() -> None:
    assert "3, expected 2" in failure(lambda x: (x, 2), lambda x: (x, 3), torch.ones(1))
    assert "True, expected 1" in failure(lambda x: (x, 1), lambda x: (x, True), torch.ones(1))
    assert "2 of 2 elements differ" in failure(lambda x: (x, x > 0), lambda x: (x, x < 0), torch.ones(2))


def test_an_output_that_cannot_be_looked_into_is_refused() -> None:
    class Box:
        pass

    assert "return the tensors inside" in failure(lambda x: (x, Box()), lambda x: (x, Box()), torch.ones(1))


@dataclasses.dataclass
class Pair:
    first: Tensor
    rest: list[Tensor]


def test_paths_of_nested_outputs() -> None:
    def run(x: Tensor) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(logits=x, hidden_states=(x, x), attentions=None)

    report = assert_equivalent(run, lambda x: run(x), torch.randn(2, 5))
    assert [row.path for row in report.comparisons] == ["logits", "hidden_states[0]", "hidden_states[1]"]
    assert list(flatten(Pair(torch.ones(1), [torch.ones(1)]))) == ["first", "rest[0]"]


# NaN and infinities


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_places_have_to_agree(value: float, exact: bool) -> None:
    def spoil(x: Tensor, column: int) -> Tensor:
        y = x.clone()
        y[0, column] = value
        return y

    x = torch.ones(2, 3)
    assert assert_equivalent(lambda x: spoil(x, 1), lambda x: spoil(x, 1), x, exact=exact).ok
    text = failure(lambda x: spoil(x, 1), lambda x: spoil(x, 2), x, exact=exact)
    assert "only in the reference at [0, 1], 2 such places" in text
    assert "only in the candidate" in failure(lambda x: x + 0, lambda x: spoil(x, 1), x, exact=exact)


@pytest.mark.parametrize("exact", [True, False])
def test_nothing_finite_is_no_agreement(exact: bool) -> None:
    nan = poison(torch.empty(2))
    assert "no finite number" in failure(lambda x: x + 1, lambda x: 1 + x, nan, exact=exact)
    assert "no finite number" in failure(lambda x: None, lambda x: None, torch.ones(1), exact=exact)


# Mutation and state


def write(x: Tensor, state: Tensor) -> Tensor:
    state[:, 1:] = state[:, :-1].clone()
    state[:, 0] = x
    return state.sum(1)


@pytest.mark.parametrize("exact", [True, False])
def test_state_has_to_be_written(exact: bool) -> None:
    case = (torch.ones(2), torch.arange(8.0).view(2, 4))
    report = assert_equivalent(write, lambda *args: write(*args), case, exact=exact)
    assert [row.path for row in report.comparisons] == ["output", "input[1]"]
    assert torch.equal(case[1], torch.arange(8.0).view(2, 4)), "the caller's tensors are left alone"

    def forgets(x: Tensor, state: Tensor) -> Tensor:
        return write(x, state.clone())

    assert "input[1]" in failure(write, forgets, case, exact=exact)
    assert assert_equivalent(write, forgets, case, exact=exact, check_mutation=False).ok


def test_an_input_that_the_reference_leaves_alone_stays_bit_for_bit() -> None:
    def disturbs(x: Tensor) -> Tensor:
        y = x + 1
        x[0] *= 1 + 1e-7
        return y

    assert "changed by the candidate only" in failure(lambda x: x + 1, disturbs, torch.ones(3))


def test_each_run_sees_the_same_random_numbers_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    dropout = nn.Dropout(0.5)
    assert assert_equivalent(dropout, lambda x: nn.functional.dropout(x, 0.5), torch.ones(64), exact=True).ok
    assert torch.equal(torch.rand(1), expected)


# The run itself


def test_a_candidate_that_did_not_run_compiled_is_found() -> None:
    model = nn.Linear(WIDTH, 8)
    calls = 0

    def compiled(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(x)

    x = torch.randn(4, WIDTH)
    assert assert_equivalent(model, compiled, x, must_run=lambda: calls).ok
    text = failure(model, lambda x: model(x), x, must_run=lambda: calls)
    assert "problem: the compiled callable did not run" in text
    runs = iter([True, False])
    text = failure(model, lambda x: compiled(x) if next(runs) else model(x), [x, x], must_run=lambda: calls)
    assert "inputs[1]: the compiled callable did not run" in text


def test_one_object_on_both_sides_is_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(OptionError, match="same object"):
        assert_equivalent(model, model, torch.ones(1, 4))


def test_inputs_of_no_known_form_are_refused() -> None:
    for inputs in ([], 3):
        with pytest.raises(OptionError, match="tuple"):
            assert_equivalent(nn.Identity(), returning(None), inputs)


def test_a_list_of_inputs_is_a_list_of_runs() -> None:
    def broken(x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale if len(x) > 1 else x

    def right(x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale

    cases = [{"x": torch.ones(2), "scale": 3.0}, {"x": torch.ones(1), "scale": 3.0}]
    text = failure(right, broken, cases)
    assert "inputs[1]: output" in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("inputs[0]")] == ["ok"]


def test_runs_without_gradients_unless_asked() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(4, 4)
    seen: list[bool] = []

    def candidate(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return model(x)

    assert other is not model
    assert_equivalent(model, candidate, torch.ones(1, 4))
    assert_equivalent(model, candidate, torch.ones(1, 4), grad=True)
    assert seen == [False, True]


# The report


def test_logits_get_top1_and_kl() -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 32)

    def run(x: Tensor) -> dict[str, Tensor]:
        return {"logits": x * 1, "other": x * 1}

    def broken(x: Tensor) -> dict[str, Tensor]:
        y = x.clone()
        y[0, y[0].argmin()] = 10.0
        return {"logits": y, "other": x * 1}

    row, other = assert_equivalent(run, lambda x: run(x), logits).comparisons
    assert row.top1_agreement == row.reference_top1_agreement == 1.0
    assert row.kl == pytest.approx(0.0, abs=1e-12)
    assert other.top1_agreement is None
    report = failure(run, broken, logits)
    line = next(line for line in report.splitlines() if line.startswith("logits"))
    assert "0.8750" in line


def test_kl_ignores_entries_masked_on_both_sides() -> None:
    def run(x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.masked_fill(torch.arange(4) == 3, float("-inf"))}

    (row,) = assert_equivalent(run, lambda x: run(x), torch.randn(2, 4)).comparisons
    assert row.kl == pytest.approx(0.0, abs=1e-12)


def test_the_report_is_an_aligned_table_and_plain_data() -> None:
    report = assert_equivalent(lambda x: (x, x * 2), lambda x: [x, x + x], torch.randn(4, 4))
    lines = str(report).splitlines()
    assert lines[0].startswith("equivalent: oracle float64")
    assert {line.index("ok") for line in lines[2:]} == {lines[1].index("verdict")}
    data = report.to_dict()
    assert data["ok"] is True
    assert data["comparisons"][1]["path"] == "[1]"
    assert not any(ord(character) > 126 for character in str(report))


def test_a_long_report_keeps_every_failure_in_sight() -> None:
    def run(x: Tensor) -> list[Tensor]:
        return [x + 0 for _ in range(100)]

    def broken(x: Tensor) -> list[Tensor]:
        return [x + (index == 77) for index in range(100)]

    text = failure(run, broken, torch.ones(2))
    assert "[77]" in text
    assert "60 more tensors, 0 of them failed" in text


# Tensors for tests


def test_integer_like_fills_parameters_from_the_seed() -> None:
    first, second = (integer_like_(TwoLinears(dtype=torch.bfloat16), seed=3) for _ in range(2))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert set(a.flatten().tolist()) == {-2, -1, 0, 1, 2}
    assert not torch.equal(first.gate.weight, first.up.weight)
    assert not torch.equal(integer_like_(TwoLinears(), seed=4).gate.weight, first.gate.weight.float())
    assert set(integer_tensor((100,), 0, low=0, high=1).tolist()) == {0, 1}


def test_poison_shows_a_read_before_a_write() -> None:
    buffer = poison(torch.empty(4))
    assert buffer.isnan().all()
    with pytest.raises(TypeError, match="int64"):
        poison(torch.zeros(1, dtype=torch.int64))


# A real model with a cache


@pytest.fixture(scope="module")
def model() -> Qwen3_5ForCausalLM:
    torch.manual_seed(0)
    config = text_config(
        "small",
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=96,
        vocab_size=128,
        head_dim=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    )
    config.rope_parameters["mrope_section"] = [2, 1, 1]
    return Qwen3_5ForCausalLM(config).eval().to(torch.bfloat16)


def filled_case(model: Qwen3_5ForCausalLM, static: bool) -> dict[str, Any]:
    cache = (
        StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    )
    with torch.no_grad():
        model(torch.randint(0, 128, (2, 9)), past_key_values=cache)
    return {"input_ids": torch.randint(0, 128, (2, 1)), "past_key_values": cache}


def changed(model: Qwen3_5ForCausalLM, wrong: str) -> Any:
    def run(**inputs: Any) -> Any:
        output = model(**inputs)
        cache = output.past_key_values
        if wrong == "recurrent state":
            cache.layers[1].recurrent_states[0].mul_(1.1)
        elif wrong == "conv state":
            cache.layers[0].conv_states[0].copy_(cache.layers[0].conv_states[0].roll(1, -1))
        elif wrong == "keys":
            cache.layers[3].keys[..., 3, :] = 0
        elif wrong == "flag":
            cache.layers[0].has_previous_state[0] = False
        return output

    return run


@pytest.mark.parametrize("static", [False, True])
def test_a_model_with_its_cache(model: Qwen3_5ForCausalLM, static: bool) -> None:
    case = filled_case(model, static)
    before = {path: tensor.clone() for path, tensor in cache_tensors(case["past_key_values"]).items()}
    report = assert_equivalent(model, changed(model, "nothing"), case)
    paths = {row.path for row in report.comparisons}
    assert {
        "logits",
        "past_key_values.layers[0].conv_states[0]",
        "past_key_values.layers[0].recurrent_states[0]",
        "past_key_values.layers[3].keys",
        "input.past_key_values.layers[3].values",
    } <= paths
    logits = next(row for row in report.comparisons if row.path == "logits")
    assert not any("is_conv_states_initialized" in path for path in paths), "equal flags make no row"
    assert logits.ratio == 1.0
    assert logits.kl is not None
    for path, tensor in cache_tensors(case["past_key_values"]).items():
        assert torch.equal(tensor, before[path]), f"{path} of the caller's cache changed"


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("wrong", ["recurrent state", "conv state", "keys"])
def test_a_wrong_cache_is_found(model: Qwen3_5ForCausalLM, wrong: str, static: bool) -> None:
    text = failure(model, changed(model, wrong), filled_case(model, static))
    name = {"recurrent state": "recurrent_states[0]", "conv state": "conv_states[0]"}.get(wrong, wrong)
    failed = [line for line in text.splitlines() if "exceeds" in line]
    assert failed
    assert all(name in line for line in failed)


def test_a_wrong_cache_flag_is_found(model: Qwen3_5ForCausalLM) -> None:
    text = failure(model, changed(model, "flag"), filled_case(model, static=False))
    assert "has_previous_state[0]" in text
    assert "False, expected True" in text


def test_fp32_model_against_itself_has_a_wide_oracle(model: Qwen3_5ForCausalLM) -> None:
    wide = copy.deepcopy(model).float()
    report = assert_equivalent(wide, lambda ids: wide(ids), torch.randint(0, 128, (1, 70)))
    logits = next(row for row in report.comparisons if row.path == "logits")
    assert logits.rms_error is not None
    assert 0 < logits.rms_error < 1e-5


def test_importing_the_package_imports_neither_torch_nor_hypothesis() -> None:
    code = (
        "import sys, fxfuse.testing.report; assert fxfuse.testing.__all__;"
        "assert not {'torch', 'hypothesis'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
