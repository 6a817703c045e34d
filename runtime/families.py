"""Model families: names that no graph carries, one table per family, data alone.

The order of a group is the order in which transformers 5.23 calls its linears: a captured graph merges them
in that order, and a plan made from names must give the same rows.
"""

from dataclasses import dataclass

from fxfuse.errors import UnsupportedModelError


@dataclass(frozen=True)
class LinearGroup:
    """Modules of one decoder layer whose weights multiply one and the same input, in order of their calls."""

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class ExpertNames:
    """What one expert's gate, up and down are called in files, and a config its number and inner size.

    `single` are names within a layer; as a stack, experts are `mlp.experts.gate_up_proj` and `.down_proj` in
    every family. `renamed` pairs the names of what else is called differently, beside a stack and beside
    single experts. `count` lists the config's field, also under the name that transformers gives it.
    """

    single: tuple[str, str, str] = (
        "mlp.experts.{e}.gate_proj.weight",
        "mlp.experts.{e}.up_proj.weight",
        "mlp.experts.{e}.down_proj.weight",
    )
    renamed: tuple[tuple[str, str], ...] = ()
    count: tuple[str, ...] = ("num_experts", "num_local_experts")
    width: str = "moe_intermediate_size"


@dataclass(frozen=True)
class Family:
    """Names of one model family.

    `groups` holds the groups of every kind of layer: a layer has those whose members it has; a family without
    any has plans for its experts only. `prefixes` are where the decoder stands in files and models, likeliest
    first, and `layer` is a layer's path from there. `delta_rule` is the function of `modeling` that capture
    takes as a leaf.
    """

    name: str
    text_model_types: tuple[str, ...]
    composite_model_types: tuple[str, ...] = ()
    groups: tuple[LinearGroup, ...] = ()
    modeling: str | None = None
    prefixes: tuple[str, ...] = ("model.", "")
    experts: ExpertNames = ExpertNames()
    delta_rule: str = "torch_chunk_gated_delta_rule"
    layer: str = "layers.{index}."

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every `model_type` of the family: of its text configurations and of those that contain one."""
        return (*self.text_model_types, *self.composite_model_types)


ATTENTION = LinearGroup("attention", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
MLP = LinearGroup("mlp", ("mlp.gate_proj", "mlp.up_proj"))
GATED_DELTA_NET = LinearGroup(
    "gated_delta_net",
    (
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "linear_attn.in_proj_b",
        "linear_attn.in_proj_a",
    ),
)
GATED_DELTA_NET_GROUPED = LinearGroup(
    "gated_delta_net", ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")
)
# the router (`mlp.gate`, a bare parameter given to F.linear) is called between the shared expert and its gate
SPARSE_MLP = LinearGroup(
    "sparse_mlp",
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.gate", "mlp.shared_expert_gate"),
)

COMPOSITE_PREFIXES = ("model.language_model.", "model.", "language_model.", "")

FAMILIES = (
    Family(
        name="qwen3_5",
        text_model_types=("qwen3_5_text",),
        composite_model_types=("qwen3_5",),
        groups=(GATED_DELTA_NET, ATTENTION, MLP),
        modeling="transformers.models.qwen3_5.modeling_qwen3_5",
        prefixes=COMPOSITE_PREFIXES,
    ),
    Family(
        name="qwen3_5_moe",
        text_model_types=("qwen3_5_moe_text",),
        composite_model_types=("qwen3_5_moe",),
        groups=(GATED_DELTA_NET, ATTENTION, SPARSE_MLP),
        modeling="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
        prefixes=COMPOSITE_PREFIXES,
    ),
    Family(
        name="qwen3_next",
        text_model_types=("qwen3_next",),
        groups=(GATED_DELTA_NET_GROUPED, ATTENTION, MLP, SPARSE_MLP),
        modeling="transformers.models.qwen3_next.modeling_qwen3_next",
    ),
    Family(name="qwen2_moe", text_model_types=("qwen2_moe",)),
    Family(name="qwen3_moe", text_model_types=("qwen3_moe",)),
    Family(
        name="qwen3_vl_moe",
        text_model_types=("qwen3_vl_moe_text",),
        composite_model_types=("qwen3_vl_moe",),
        prefixes=COMPOSITE_PREFIXES,
    ),
    Family(
        name="deepseek",
        text_model_types=("deepseek_v2", "deepseek_v3"),
        experts=ExpertNames(count=("n_routed_experts",)),
    ),
    Family(
        name="mixtral",
        text_model_types=("mixtral",),
        experts=ExpertNames(
            single=(
                "block_sparse_moe.experts.{e}.w1.weight",
                "block_sparse_moe.experts.{e}.w3.weight",
                "block_sparse_moe.experts.{e}.w2.weight",
            ),
            renamed=(("mlp.gate.weight", "block_sparse_moe.gate.weight"),),
            count=("num_local_experts",),
            width="intermediate_size",
        ),
    ),
)

_BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` that has a family, in the order of the table."""
    return tuple(_BY_MODEL_TYPE)


def family_of(model_type: object) -> Family:
    """The family of a config's `model_type`; raises UnsupportedModelError that lists the known ones."""
    family = _BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(known_model_types())
        raise UnsupportedModelError(
            f"no family is known for model_type {model_type!r}; known are: {known}. Only plans of weights "
            "need one: model.optimize() and `fxfuse explain` take any model"
        )
    return family
