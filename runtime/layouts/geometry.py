"""The sizes of a decoder's heads and experts, from its config."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from fxfuse.errors import PlanError
from fxfuse.runtime.families import ExpertNames


@dataclass(frozen=True)
class Geometry:
    """Heads, in numbers of heads and rows of a head; experts, in their number and rows of a gate.

    `query_heads` of `head_dim` rows each share `kv_heads`; `value_heads` of `value_dim` rows share
    `key_heads` of `key_dim` rows in the gated delta rule. `gated_queries`: q_proj holds query and gate of
    each head in turn. Sizes that are 0 are not known.
    """

    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    gated_queries: bool = True
    key_heads: int = 0
    value_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    experts: int = 0
    expert_width: int = 0

    @property
    def value_heads_per_key(self) -> int:
        """How many value heads read one key head (r in the papers)."""
        return self.value_heads // self.key_heads

    @property
    def keys(self) -> int:
        """Rows of all key heads, and of all linear-attention query heads."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Rows of all value heads."""
        return self.value_heads * self.value_dim

    @property
    def query_rows(self) -> int:
        """Rows of one head of q_proj."""
        return self.head_dim * (2 if self.gated_queries else 1)

    def per_rank(self, world: int) -> "Geometry":
        """The sizes on each of `world` ranks; raises PlanError when heads do not divide."""
        for what, heads in (
            ("attention heads", self.query_heads),
            ("linear-attention key heads", self.key_heads),
            ("linear-attention value heads", self.value_heads),
        ):
            if heads % world:
                raise PlanError(
                    f"{heads} {what} do not divide over {world} ranks: choose a world that divides"
                )
        if self.kv_heads % world and world % self.kv_heads:
            raise PlanError(
                f"{self.kv_heads} key-value heads neither divide over {world} ranks nor repeat evenly: "
                "choose a world that divides them or that they divide"
            )
        return replace(
            self,
            query_heads=self.query_heads // world,
            kv_heads=max(self.kv_heads // world, 1) if self.kv_heads else 0,
            key_heads=self.key_heads // world,
            value_heads=self.value_heads // world,
            expert_width=0 if self.expert_width % world else self.expert_width // world,
        )


def text_config(config: Any) -> Any:
    """The config of the decoder: `config` itself, or the one that it contains."""
    if hasattr(config, "get_text_config"):
        return config.get_text_config()
    inner = getattr(config, "text_config", None)
    return SimpleNamespace(**inner) if isinstance(inner, dict) else config


def geometry_of(config: Any) -> Geometry:
    """The geometry that a config describes; raises PlanError when a size is missing or none.

    `config` is a transformers config, or a namespace with the fields of a config.json.
    """
    text = text_config(config)
    names = {
        "query_heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "key_heads": "linear_num_key_heads",
        "value_heads": "linear_num_value_heads",
        "key_dim": "linear_key_head_dim",
        "value_dim": "linear_value_head_dim",
    }
    sizes = {}
    for field, name in names.items():
        size = getattr(text, name, None)
        if type(size) is not int or size < 1:
            raise PlanError(f"config: {name} is {size!r}; a layout by heads needs a positive number")
        sizes[field] = size
    if sizes["value_heads"] % sizes["key_heads"]:
        raise PlanError(
            f"config: {sizes['value_heads']} linear-attention value heads do not divide over "
            f"{sizes['key_heads']} key heads"
        )
    return Geometry(**sizes, gated_queries=bool(getattr(text, "attn_output_gate", True)))


def with_experts(geometry: Geometry, config: Any, names: ExpertNames) -> Geometry:
    """The geometry with the sizes of experts that a config has under its family's names for them."""
    text = text_config(config)
    counts = (getattr(text, name, None) for name in names.count)
    count = next((size for size in counts if type(size) is int), 0)
    width = getattr(text, names.width, None)
    if not count or type(width) is not int:
        return geometry
    return replace(geometry, experts=count, expert_width=width)
