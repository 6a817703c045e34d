"""Anything that may be done to a model, in any order: after each step it equals a plain twin."""

import copy
import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import AutoModelForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.cache_utils import StaticCache

import fxfuse
from fxfuse.runtime.optimize import is_optimized

VOCABULARY = 48
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}
SEEDS = st.integers(0, 3)


def _weights(model: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(t.shape, generator=generator) * 0.1).to(t.dtype)
        for name, t in model.state_dict().items()
    }


class Life(RuleBasedStateMachine):
    """`model` is optimised and not, `twin` is never; everything else happens to both."""

    passes: str | tuple[str, ...] = "default"

    @initialize()
    def begin(self) -> None:
        torch.manual_seed(0)
        self.model: Any = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**CONFIG)).eval().requires_grad_(False)
        self.twin: Any = copy.deepcopy(self.model)
        self.dtype = torch.float32

    def _both(self) -> tuple[Any, Any]:
        return self.model, self.twin

    @rule()
    def optimize(self) -> None:
        fxfuse.optimize(self.model, inner="eager", passes=self.passes, report="off")

    @rule()
    def deoptimize(self) -> None:
        fxfuse.deoptimize(self.model)
        assert self.model._compiled_call_impl is None

    @rule(seed=SEEDS)
    def load_in_place(self, seed: int) -> None:
        for model in self._both():
            model.load_state_dict(_weights(model, seed))

    @rule(seed=SEEDS)
    def load_by_assignment(self, seed: int) -> None:
        for model in self._both():
            model.load_state_dict(_weights(model, seed), assign=True)
            model.requires_grad_(False)

    @rule(place=st.integers(0, 30), how=st.sampled_from(["mul_", "data", "row"]))
    def write_a_weight(self, place: int, how: str) -> None:
        for model in self._both():
            parameters = list(model.parameters())
            parameter = parameters[place % len(parameters)]
            with torch.no_grad():
                if how == "mul_":
                    parameter.mul_(1.5)
                elif how == "data":
                    parameter.data = parameter.data.clone() * 0.5
                else:
                    parameter[0] = 0.25

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def to(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        for model in self._both():
            model.to(dtype)

    @rule()
    def deepcopy(self) -> None:
        """A copy is a plain model; life goes on with it."""
        self.model = copy.deepcopy(self.model)
        assert not is_optimized(self.model)

    @rule()
    def pickled(self) -> None:
        file = io.BytesIO()
        pickle.dump(self.model, file)
        self.model = pickle.loads(file.getvalue())

    @precondition(lambda self: self.dtype == torch.float32)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            assert sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = loaded.eval().requires_grad_(False)

    @rule(training=st.booleans())
    def train_or_eval(self, training: bool) -> None:
        for model in self._both():
            model.train(training)

    @rule(length=st.sampled_from([1, 2, 9, 65]), batch=st.sampled_from([1, 2]), padded=st.booleans())
    def forward(self, length: int, batch: int, padded: bool) -> None:
        ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if padded and length > 2:
            inputs["attention_mask"][0, :2] = 0
        ours = self.model.optimization_report if is_optimized(self.model) else None
        before = ours.calls if ours is not None else 0
        with torch.no_grad():
            got, expected = self.model(**inputs).logits, self.twin.forward(**inputs).logits
        assert ours is None or ours.calls > before, "the compiled callable did not run"
        assert ours is None or ours.matched, "nothing was matched"
        kept = inputs["attention_mask"].bool()
        tolerance = 1e-4 if self.dtype == torch.float32 else 1e-9
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((got - expected)[kept].abs().max()) <= tolerance * scale

    @precondition(lambda self: self.dtype == torch.float32)
    @rule(cache=st.sampled_from(["dynamic", "static", "none"]), length=st.sampled_from([3, 10]))
    def generate(self, cache: str, length: int) -> None:
        ids = torch.randint(1, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
        scores = []
        for model in self._both():
            given: dict[str, Any] = {"use_cache": cache != "none"}
            if cache == "static":
                given["past_key_values"] = StaticCache(model.config, max_cache_len=32)
            out = model.generate(
                ids,
                max_new_tokens=3,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                **given,
            )
            scores.append((out.sequences, torch.stack(out.logits)))
        (tokens, logits), (wanted, expected) = scores
        scale = max(float(expected[0].abs().max()), 1e-3)
        assert float((logits[0] - expected[0]).abs().max()) <= 1e-4 * scale
        top = expected.topk(2, dim=-1).values
        clear = bool(((top[..., 0] - top[..., 1]) > 1e-3 * scale).all())
        assert torch.equal(tokens, wanted) or not clear  # ties of rounding may fall either way

    @invariant()
    def weights_are_those_of_the_twin(self) -> None:
        if not hasattr(self, "model"):
            return
        ours, theirs = self.model.state_dict(), self.twin.state_dict()
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor) and ours[name].stride() == tensor.stride(), name

    def teardown(self) -> None:
        torch._dynamo.reset()


def _settings(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


Short = type("Short", (Life,), {})
TestAFewLives = Short.TestCase
TestAFewLives.settings = _settings(2, 8)


def test_without_passes_a_life_is_seen_to_match_nothing() -> None:
    life = Life()
    life.begin()
    life.passes = ()
    life.optimize()
    with pytest.raises(AssertionError, match="nothing was matched"):
        life.forward(length=9, batch=1, padded=False)


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_many_lives() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(Life, settings=_settings(int(os.environ.get("FXFUSE_LIVES", "20")), 12))
