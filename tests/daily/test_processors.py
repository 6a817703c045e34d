"""A picture and a video on their real way: transformers' processor of Qwen3.5 makes the model's inputs.

Needs pillow and torchvision: `make test-extras` has an environment with them.
"""

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import fxfuse

np = pytest.importorskip("numpy", reason="numpy is not installed: make test-extras has it")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed: make test-extras has it")
pytest.importorskip("torchvision", reason="torchvision is not installed: make test-extras has it")

from transformers import (  # noqa: E402
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
SIZE = {"shortest_edge": 64, "longest_edge": 4096}
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Made without files, then saved and loaded as AutoProcessor would find it beside a checkpoint."""
    words = {f"w{i}": i for i in range(296)} | {mark: 296 + i for i, mark in enumerate(MARKS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")),
        pad_token="w0",
        additional_special_tokens=list(MARKS),
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(**PATCHES, size=SIZE),
        tokenizer,
        Qwen3VLVideoProcessor(**PATCHES, size=SIZE, do_sample_frames=False, cap_pixels_per_frame=False),
    )
    folder = tmp_path_factory.mktemp("processor")
    made.save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def pair(hybrid: dict[str, Any], processor: Any) -> tuple[Any, Any]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": hybrid["hidden_size"],
        "patch_size": PATCHES["patch_size"],
        "spatial_merge_size": PATCHES["merge_size"],
        "temporal_patch_size": PATCHES["temporal_patch_size"],
        "num_position_embeddings": 16,
    }
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    }
    config = Qwen3_5Config(
        text_config={**hybrid, "rope_parameters": rope},
        vision_config=vision,
        **dict(zip(names, processor.tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True)),
    )
    torch.manual_seed(0)
    plain = Qwen3_5ForConditionalGeneration(config).eval()
    plain.generation_config.pad_token_id = 0
    return plain, fxfuse.optimize(copy.deepcopy(plain), inner="eager")


def noise(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).integers(0, 255, (*shape, 3), dtype=np.uint8)


def picture() -> dict[str, Any]:
    return {"images": [Image.fromarray(noise(18, 30))], "what": "image_pad"}


def video() -> dict[str, Any]:
    return {"videos": [noise(4, 16, 24)], "what": "video_pad"}


@pytest.mark.parametrize("given", [picture, pytest.param(video, marks=pytest.mark.slow)])
def test_what_the_processor_makes_of_it_generates_the_tokens_of_the_plain_model(
    processor: Any, pair: tuple[Any, Any], given: Any
) -> None:
    seen = given()
    text = f"w3 w5 <|vision_start|> <|{seen.pop('what')}|> <|vision_end|> w8 w9"
    inputs = processor(text=[text], return_tensors="pt", **seen)
    pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
    assert pixels.shape[0] >= 16 and pixels.shape[1] == 3 * 2 * 4 * 4 and pixels.std() > 0
    plain, model = pair
    expected = plain.generate(**inputs, **GREEDY)
    calls = model.optimization_report.calls
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert model.optimization_report.calls > calls and model.optimization_report.matched >= 3
