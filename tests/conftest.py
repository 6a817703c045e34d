"""What holds for every test, and tiny models of the real architecture."""

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

VOCABULARY = 300
PAIR = ("linear_attention", "full_attention")
HYBRID: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": len(PAIR),
    "layer_types": list(PAIR),
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def pytest_runtest_setup() -> None:
    """Keep pytest from reading torch's structured trace.

    pytest captures every logger that does not propagate, and torch writes the trace, each graph in several
    forms, as soon as somebody reads it: generate() with transformers 5.17 then compiles for ten minutes.
    """
    if "torch" in sys.modules:
        trace = logging.getLogger("torch.__trace")
        trace.propagate = True
        trace.handlers.clear()


@pytest.fixture(scope="module", autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Each file starts with an empty compile cache.

    Plain torch.compile calls of transformers' models share one code object. When they reach its limit of
    graphs, Dynamo leaves it alone for the rest of the process, and later ones run eagerly.
    """
    yield
    import torch

    torch._dynamo.reset()


@pytest.fixture(scope="session")
def quiet() -> None:
    """One thread and no advice: what is this small is slower on more."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def hybrid() -> dict[str, Any]:
    """The configuration of the tiny model, for models of other classes."""
    return dict(HYBRID)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    """An untrained Qwen3.5 in float32, by default of one Gated DeltaNet layer and one attention layer."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    def make(layers: tuple[str, ...] = PAIR, seed: int = 0, **config: Any) -> Any:
        torch.manual_seed(seed)
        depth = {"num_hidden_layers": len(layers), "layer_types": list(layers)}
        return Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**HYBRID, **depth, **config})).eval()

    return make


@pytest.fixture(scope="session")
def prompt() -> Any:
    import torch

    return torch.randint(1, VOCABULARY, (1, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture()
def plain_logits() -> Callable[..., Any]:
    """Logits of the model's own forward, whatever its compiled call is."""
    import torch

    def logits(model: Any, ids: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model.forward(input_ids=ids, **kwargs).logits

    return logits
