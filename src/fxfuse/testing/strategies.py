"""Hypothesis strategies for what graph rewrites meet: configs, inputs, tensors, state dicts and fx graphs.

    @given(strategies.graphs())
    def test_my_pass(drawn):
        assert_equivalent(drawn.module, my_pass(drawn.module), drawn.inputs, exact=True)

Needs the extra `testing`. Tensors are drawn by their seeds, so that examples print in a line and shrink.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fxfuse.errors import OptionError
from fxfuse.testing.blocks import BLOCKS
from fxfuse.testing.mutants import Mutant, near_miss
from fxfuse.testing.programs import EXACT, RandomProgram, random_program
from fxfuse.testing.tensors import integer_tensor

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError("fxfuse.testing.strategies needs Hypothesis: pip install 'fxfuse[testing]'") from error

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["StateDict", "configs", "graphs", "inputs", "mutants", "state_dicts", "tensors"]

VOCABULARY = 64
FAMILIES = ("qwen3_5", "qwen3_5_moe", "qwen3_next")
# Where chunked rules and masks change their ways: one token, one chunk of 64, one more.
LENGTHS = (1, 2, 3, 17, 63, 64, 65, 130)
# Zeros of both signs, the ends of every floating dtype's range in their order, and what rounds in bf16.
EDGES = (0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3e38, -3e38, 65504.0, 2.0**-24, 1.0 + 2.0**-8, 100.0, -100.0)


@st.composite
def configs(
    draw: st.DrawFn, families: Sequence[str] = FAMILIES, layers: tuple[int, int] = (1, 4)
) -> "PretrainedConfig":
    """Configs of tiny models of every family.

    Head counts have odd ratios (1, 2, 3, 4, 8 value heads for each key head; 1 to 3 query heads for each
    key-value head), rotary parts of a quarter, a half or all, tied and untied heads, and at least one layer
    of full attention: without one transformers itself fails.

    Raises:
        OptionError: an unknown family.
    """
    import transformers

    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise OptionError(f"unknown family {unknown[0]!r}: known are {', '.join(FAMILIES)}")
    family = draw(st.sampled_from(list(families)))
    count = draw(st.integers(*layers))
    kinds = draw(
        st.lists(st.sampled_from(["linear_attention", "full_attention"]), min_size=count, max_size=count)
    )
    if "full_attention" not in kinds:
        kinds[draw(st.integers(0, count - 1))] = "full_attention"
    key_heads, ratio = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (2, 3), (1, 4), (1, 8), (3, 2)]))
    kv_heads, groups = draw(st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 2), (2, 1)]))
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": draw(st.sampled_from([32, 24, 48])),
        "num_hidden_layers": count,
        "layer_types": kinds,
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([16, 32])),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * ratio,
        "linear_key_head_dim": draw(st.sampled_from([8, 16])),
        "linear_value_head_dim": draw(st.sampled_from([8, 16])),
        "tie_word_embeddings": draw(st.booleans()),
        "partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0])),
        "attention_bias": draw(st.booleans()),
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "qwen3_5":
        return transformers.Qwen3_5TextConfig(**given, intermediate_size=40)
    sparse: dict[str, Any] = {
        "num_experts": draw(st.sampled_from([2, 4])),
        "num_experts_per_tok": draw(st.sampled_from([1, 2])),
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": draw(st.sampled_from([16, 24])),
    }
    if family == "qwen3_5_moe":
        return transformers.Qwen3_5MoeTextConfig(**given, **sparse)
    return transformers.Qwen3NextConfig(**given, **sparse, intermediate_size=40)


@st.composite
def inputs(
    draw: st.DrawFn,
    vocabulary: int = VOCABULARY,
    lengths: Sequence[int] = LENGTHS,
    kinds: Sequence[str] = ("whole", "left_padded", "ragged", "packed"),
) -> dict[str, Tensor]:
    """Keyword arguments of a causal language model: `input_ids` [B, T] and what goes with them.

    Kinds: "whole" has no mask; "left_padded" has a mask with one padded row; "ragged" pads every row by
    another length; "packed" is one row of several documents, told apart by `position_ids` alone.
    """
    kind = draw(st.sampled_from(list(kinds)))
    length = draw(st.sampled_from(list(lengths)))
    batch = 1 if kind == "packed" else draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ids = torch.randint(1, vocabulary, (batch, length), generator=generator)
    if kind == "whole":
        return {"input_ids": ids}
    if kind == "packed":
        ends = draw(st.lists(st.integers(1, max(length - 1, 1)), max_size=3, unique=True))
        starts = [0, *sorted(end for end in ends if end < length), length]
        parts = [torch.arange(b - a) for a, b in pairwise(starts)]
        return {"input_ids": ids, "position_ids": torch.cat(parts)[None]}
    most = length - 1
    padded = [draw(st.integers(0, most)) for _ in range(batch)]
    if kind == "left_padded":
        padded = [padded[0], *[0] * (batch - 1)]
    mask = torch.ones_like(ids)
    for row, count in enumerate(padded):
        mask[row, :count] = 0
        ids[row, :count] = 0
    return {"input_ids": ids, "attention_mask": mask}


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    kinds: Sequence[str] = ("integers", "normal", "edges"),
) -> Tensor:
    """A tensor by a drawn seed: small integers, normal values of some magnitude, or those with edge values.

    Edge values are zeros of both signs, tiny and large numbers within the dtype's range, and halves of its
    rounding step; no NaN and no infinity.
    """
    kind, seed = draw(st.sampled_from(list(kinds))), draw(st.integers(0, 2**16))
    if kind == "integers":
        return integer_tensor(shape, seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tuple(shape), generator=generator) * draw(st.sampled_from([1.0, 1e-3, 30.0]))
    if kind == "edges" and values.numel():
        most = torch.finfo(dtype).max
        edges = torch.tensor([max(min(edge, most), -most) for edge in EDGES], dtype=torch.float64)
        places = torch.randint(values.numel(), (draw(st.integers(1, 6)),), generator=generator)
        picked = edges[torch.randint(len(edges), places.shape, generator=generator)]
        wide = values.double().flatten()
        wide[places] = picked
        return wide.reshape(tuple(shape)).to(dtype)
    return values.to(dtype)


@dataclass(frozen=True)
class StateDict:
    """A checkpoint as files have it: tensors by name, which file has which, and how it departs from plain.

    Attributes:
        config: of the model it belongs to.
        tensors: by the names of the files.
        shards: the names in each file; every name is in exactly one.
        traits: of "prefix", "fp32 A_log", "tied", "mtp", "fp8", those that hold.
    """

    config: Any
    tensors: dict[str, Tensor]
    shards: tuple[tuple[str, ...], ...]
    traits: frozenset[str]

    def __repr__(self) -> str:
        names = f"{len(self.tensors)} tensors in {len(self.shards)} files"
        return f"StateDict of {self.config.model_type}: {names}, {sorted(self.traits)}"


BLOCK = 8


@st.composite
def state_dicts(
    draw: st.DrawFn,
    families: Sequence[str] = FAMILIES,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32, torch.float16),
    quantised: bool = True,
) -> StateDict:
    """State dicts of tiny models as people have them on disk.

    Drawn are the prefix of the names, the dtype, A_log and norms that stay fp32 in a 16-bit file, a tied
    head that is not stored, extra `mtp.*` tensors, FP8 weights with a table of block scales, the order of the
    names and the split into files.
    """
    from transformers import AutoModelForCausalLM

    config = draw(configs(families=families, layers=(1, 2)))
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    traits: set[str] = set()
    dtype = draw(st.sampled_from(list(dtypes)))
    prefix = draw(st.sampled_from(["model.", "model.language_model."]))
    if prefix != "model.":
        traits.add("prefix")
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
        traits.add("tied")
    if draw(st.booleans()):
        shapes |= {
            "mtp.fc.weight": (config.hidden_size, 2 * config.hidden_size),
            "mtp.norm.weight": (config.hidden_size,),
        }
        traits.add("mtp")
    keep_fp32 = dtype.itemsize == 2 and draw(st.booleans())
    traits |= {"fp32 A_log"} if keep_fp32 else set()
    fp8 = quantised and draw(st.booleans())
    traits |= {"fp8"} if fp8 else set()
    seed = draw(st.integers(0, 2**16))
    made: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        full = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        value = integer_tensor(shape, seed + number)
        if fp8 and name.endswith("_proj.weight") and "experts" not in name:
            made[full] = value.to(torch.float8_e4m3fn)
            blocks = tuple(-(-size // BLOCK) for size in shape)
            made[full.removesuffix("weight") + "weight_scale_inv"] = (
                integer_tensor(blocks, seed - number).abs() + 1
            )
        else:
            made[full] = value if keep_fp32 and name.endswith(("A_log", "norm.weight")) else value.to(dtype)
    names = list(draw(st.permutations(list(made)))) if draw(st.booleans()) else list(made)
    cuts = sorted(draw(st.lists(st.integers(1, len(names) - 1), max_size=3, unique=True)))
    shards = tuple(tuple(names[a:b]) for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True))
    return StateDict(config, {name: made[name] for name in names}, shards, frozenset(traits))


@st.composite
def graphs(
    draw: st.DrawFn, blocks: Sequence[str] = EXACT, most: int = 3, dynamic: bool = False, writes: bool = True
) -> RandomProgram:
    """Graph modules of up to `most` blocks in random spellings, with inputs; see `random_program`.

    The default blocks only move data and multiply matrices over small integers: there a correct rewrite
    changes no bit. The names of all blocks are the keys of `fxfuse.testing.blocks.BLOCKS`.

    Raises:
        OptionError: an unknown block.
    """
    unknown = [name for name in blocks if name not in BLOCKS]
    if unknown:
        raise OptionError(f"unknown block {unknown[0]!r}: known are {', '.join(BLOCKS)}")
    rng = draw(st.randoms(use_true_random=False))
    seed = draw(st.integers(0, 2**16))
    return random_program(rng, blocks=tuple(blocks), most=most, seed=seed, dynamic=dynamic, writes=writes)


@st.composite
def mutants(
    draw: st.DrawFn, given: Callable[[], st.SearchStrategy[RandomProgram]] = graphs
) -> tuple[Mutant, tuple[Tensor, ...]]:
    """Near misses: a graph of `given` with one change, and inputs for it."""
    drawn = draw(given())
    return near_miss(drawn.module, drawn.inputs, draw(st.randoms(use_true_random=False))), drawn.inputs
