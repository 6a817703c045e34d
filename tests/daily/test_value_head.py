"""TRL's model with a value head: the model inside is planned, loaded and optimised, the head is left alone.

Needs trl before 1.0, which no longer has the class: `make test-extras` has an environment with it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fxfuse
from fxfuse.runtime.decoder_stack import find_decoder
from fxfuse.runtime.optimize import is_optimized

trl = pytest.importorskip("trl", reason="trl is not installed: make test-extras has it")
ValueHead = getattr(trl, "AutoModelForCausalLMWithValueHead", None)
if ValueHead is None:
    pytest.skip("this trl has no model with a value head", allow_module_level=True)

Make = Callable[..., Any]


@pytest.fixture
def wrapped(make_model: Make) -> Any:
    torch.manual_seed(0)
    return ValueHead.from_pretrained(make_model(seed=0)).eval()


def test_the_plan_is_that_of_the_model_inside(make_model: Make, wrapped: Any) -> None:
    assert fxfuse.plan(wrapped) == fxfuse.plan(make_model())
    found = find_decoder(wrapped)
    assert found.model is wrapped.pretrained_model
    assert found.stack is wrapped.pretrained_model.model


def test_weights_reach_the_model_inside_and_the_head_stays(
    make_model: Make, wrapped: Any, tmp_path: Path
) -> None:
    other = make_model(seed=1)
    head = wrapped.v_head.summary.weight.detach().clone()
    other.config.save_pretrained(tmp_path)
    save_file({n: t.clone() for n, t in other.state_dict().items()}, tmp_path / "model.safetensors")
    fxfuse.load_state_dict(wrapped, tmp_path)
    own = wrapped.pretrained_model.state_dict()
    assert all(torch.equal(own[n], t) for n, t in other.state_dict().items())
    assert torch.equal(wrapped.v_head.summary.weight, head)


def test_optimize_gives_the_logits_and_values_that_it_gave(wrapped: Any, prompt: Tensor) -> None:
    with torch.no_grad():
        expected = wrapped(prompt)
        assert fxfuse.optimize(wrapped, inner="eager") is wrapped
        got = wrapped(prompt)
        assert is_optimized(wrapped.pretrained_model)
        assert wrapped.pretrained_model.optimization_report.calls == 1
        for i in (0, 2):  # logits and values; between them the loss, of which there is none
            torch.testing.assert_close(got[i], expected[i], atol=1e-4, rtol=1e-4)
        assert got[1] is expected[1] is None
        fxfuse.deoptimize(wrapped)
        assert torch.equal(wrapped(prompt)[2], expected[2])
