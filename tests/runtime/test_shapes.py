"""The table of model widths gives the published parameter counts."""

import pytest
import torch
from transformers import Qwen3_5ForCausalLM

from fxfuse.errors import OptionError
from fxfuse.runtime.shapes import SIZES, text_config

# Text parameters of the published checkpoints (total less vision and multi-token-prediction tensors).
PUBLISHED = {
    "0.8b": 752_393_024,
    "2b": 1_881_825_088,
    "4b": 4_205_751_296,
    "9b": 8_953_803_264,
    "27b": 26_895_998_464,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_count_is_the_published_one(size: str) -> None:
    with torch.device("meta"):
        model = Qwen3_5ForCausalLM(text_config(size))
    assert model.num_parameters() == PUBLISHED[size]


def test_small_differs_from_0_8b_only_in_depth_and_vocabulary() -> None:
    different = {key for key in SIZES["small"] if SIZES["small"][key] != SIZES["0.8b"][key]}
    assert different == {"num_hidden_layers", "vocab_size"}
    assert text_config("small").layer_types.count("full_attention") == 1


def test_overrides_do_not_reach_the_table() -> None:
    config = text_config("small", num_hidden_layers=8, vocab_size=64)
    config.rope_parameters["rope_theta"] = 1
    assert (config.num_hidden_layers, config.vocab_size) == (8, 64)
    assert len(config.layer_types) == 8
    assert SIZES["small"]["rope_parameters"]["rope_theta"] == 10_000_000


def test_unknown_size_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"3b.*0\.8b"):
        text_config("3b")
