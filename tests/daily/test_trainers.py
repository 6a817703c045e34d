"""Trainers that people use, on an optimised model: transformers' own, and TRL's for supervised fine-tuning.

Needs trl and peft: `make test-extras` has an environment with them.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import fxfuse

Make = Callable[..., Any]
STEPS = 3
RUN: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "seed": 0,
}


def rows(count: int = 6, length: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 299, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_trained_alike(plain: Any, model: Any, expected: list[float], got: list[float]) -> None:
    assert len(got) == STEPS and got == pytest.approx(expected, rel=1e-3) and got[-1] != got[0]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=2e-3, rtol=1e-2)


@pytest.mark.slow
def test_the_trainer_of_transformers(make_model: Make, prompt: Tensor, tmp_path: Path) -> None:
    plain = make_model(layers=("full_attention",))
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager")
    found = [
        losses(Trainer(each, TrainingArguments(output_dir=str(tmp_path), **RUN), train_dataset=rows()))
        for each in (plain, model)
    ]
    assert_trained_alike(plain, model, *found)
    assert model.optimization_report.calls >= STEPS and not model.optimization_report.failures
    with torch.no_grad():
        got, expected = model.eval()(prompt).logits, plain.eval()(prompt).logits
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_supervised_fine_tuning_with_adapters_by_trl(make_model: Make, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: make test-extras has it")
    peft = pytest.importorskip("peft", reason="peft is not installed: make test-extras has it")
    from datasets import Dataset

    words = {f"w{i}": i for i in range(298)} | {"[PAD]": 298, "[EOS]": 299}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        pad_token="[PAD]",
        eos_token="[EOS]",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(f"w{int(i)}" for i in row["input_ids"]) for row in rows()]

    def trained(model: Any) -> list[float]:
        torch.manual_seed(0)
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(output_dir=str(tmp_path), gradient_checkpointing=False, bf16=False, **RUN),
            train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
            ),
        )
        return losses(trainer)

    plain = make_model(layers=("full_attention",))
    model = fxfuse.optimize(copy.deepcopy(plain), inner="eager")
    found = [trained(plain), trained(model)]
    assert_trained_alike(plain, model, *found)
    report = model.optimization_report
    merged = {m.where for g in report.graphs for o in g.outcomes.values() for m in o.matches}
    assert report.calls >= STEPS and not report.failures
    assert "model.layers.0.mlp.gate_up_proj" in merged
