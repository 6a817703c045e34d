"""What the models of the benchmarks rely on: what is counted, what is shared, and a check that can fail."""

import copy
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import pytest
import torch

Bench = Callable[[str], Any]


def options(**more: Any) -> Namespace:
    given = {"size": "tiny", "layers": None, "dtype": "float32", "device": "cpu"}
    return Namespace(**{**given, **more})


def spoiled(model: Any) -> Any:
    """The same model with another final norm."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_and_operations_count_each_weight_that_a_step_reads(bench: Bench, tied: bool) -> None:
    models = bench("models")
    model = models.build(options())
    table = model.get_input_embeddings().weight.numel()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert models.bytes_per_token(model) == 4 * (total - (0 if tied else table))
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert models.flops_per_token(model, batch=3) == 2 * 3 * linears


def test_a_prompt_counts_every_token_but_one_row_of_logits(bench: Bench) -> None:
    models = bench("models")
    model = models.build(options())
    head = 2 * model.lm_head.weight.numel()
    linears = models.flops_per_token(model) - head
    # one layer of each kind: 2 heads of 32, and 4 value heads with a state of 16 x 16
    mixers = 2 * 10**2 * 2 * 32 + 6 * 10 * 4 * 16 * 16
    assert models.flops_of_prompt(model, 3, 10) == 3 * (10 * linears + head + mixers)


def test_only_the_chosen_experts_are_read(bench: Bench) -> None:
    models, moe = bench("models"), bench("moe")
    model = moe.build(options())
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert len(experts) == 4 and all(len(p) == 8 for p in experts)
    table = model.get_input_embeddings().weight.nbytes
    rest = sum(p.nbytes for p in model.parameters()) - table - sum(p.nbytes for p in experts)
    for batch, chosen in ((1, 2), (3, 6), (16, 8)):
        assert models.bytes_per_token(model, batch) == rest + sum(p.nbytes * chosen / 8 for p in experts)
    dense = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert models.flops_per_token(model) == 2 * (dense + routers + sum(p.numel() * 2 / 8 for p in experts))


def test_a_model_sharing_weights_is_another_model(bench: Bench) -> None:
    models = bench("models")
    model = models.build(options())
    other = models.sharing_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    ids = torch.randint(64, (1, 5))
    other.forward = lambda *args, **kwargs: None
    assert model(ids) is not None


def test_the_same_options_give_the_same_weights_and_meta_only_shapes(bench: Bench) -> None:
    models = bench("models")
    one, other = models.build(options()), models.build(options())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert {p.device.type for p in models.build(options(), device="meta").parameters()} == {"meta"}
    assert models.build(options(), 6).config.num_hidden_layers == 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_output_of_generate_a_prompt_or_a_step_is_seen(
    bench: Bench, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    models, generation = bench("models"), bench("generation")
    model = models.build(options(dtype=dtype))
    ids = generation.prompt(model, 2, 12)
    reference, same, wrong = (
        models.Contender(name, each)
        for name, each in (("eager", model), ("same", copy.deepcopy(model)), ("wrong", spoiled(model)))
    )
    call = generation.Call(ids, 6, "DynamicCache")
    train = bench("train")
    for check in (
        call.right,
        lambda a, b: models.right(a, b, lambda each: bench("prefill").last_logits(each, 8), ids),
        lambda a, b: models.right(a, b, train._gradients, ids, grad=True),
    ):
        assert check(reference, same)
        assert not check(reference, wrong)
        assert "wrong" in capsys.readouterr().err


def test_a_peer_s_figures_leave_out_the_call_that_compiles(bench: Bench) -> None:
    generation, models = bench("generation"), bench("models")
    model = models.build(options())
    call = generation.Call(generation.prompt(model, 2, 12), 4, "DynamicCache")
    (peer,) = generation.call_case("c", call, [models.Contender("eager", model)]).peers
    times = iter([9.0, *[2.0] * 3])

    def run(contender: Any) -> Any:
        clock = bench("generation").TokenClock()
        clock.start, scale = 0.0, next(times)
        clock.times = [0.0, 0.5 * scale, 1.0 * scale, 1.5 * scale, 2.0 * scale]
        return Namespace(clock=clock)

    object.__setattr__(call, "run", run)
    assert [peer.sample() for _ in range(4)] == [18.0, 4.0, 4.0, 4.0]
    assert peer.figures() == {"TTFT ms": 1000.0, "ms/token": 1000.0, "tokens/s": 2.0}


def test_a_wide_copy_computes_in_its_dtype_and_holds_no_experts(bench: Bench) -> None:
    """They are most of a model's memory: a second time, and twice as wide, they may not fit."""
    models, moe = bench("models"), bench("moe")
    model = moe.build(options(dtype="bfloat16"))
    wide = models.widened(model, torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert not any(".experts." in name for name, _ in wide.named_parameters())
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(wide(ids).logits, copy.deepcopy(model).float()(ids).logits)
        assert wide(ids).logits.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
