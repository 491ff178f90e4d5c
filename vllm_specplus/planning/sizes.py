"""What a model is made of, from its config.json: the sizes that cost models count with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vllm_specplus.files import positive, read_json
from vllm_specplus.strict import quoted

KEYS = (
    "num_attention_heads", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"
)  # fmt: skip
#: Kinds of layers that read keys and values and nothing else.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
#: Names that configurations give the number of experts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0
    """Of each layer with experts; 0 without."""
    chosen: int = 0
    """Experts that a token asks."""
    expert_width: int = 0
    shared_width: int = 0
    """Of what every token passes beside its experts."""
    dense_layers: int = 0
    """Layers without experts, of a model that has some."""
    weight_bits: int = 16
    """Of a weight of a layer; embedding and output layer have 16."""

    @classmethod
    def of(cls, folder: Path) -> Self:
        """The sizes in the config.json of a model's folder; ValueError if they are not there."""
        name = f"{folder}/config.json"
        config = read_json(folder / "config.json", name)
        config = config.get("text_config", config)
        if not isinstance(config, dict):
            raise ValueError(f"{name} has a 'text_config' that is no JSON object: write one")
        heads, hidden, layers, inner, vocab = (positive(config, key, name) for key in KEYS)
        return cls(
            layers, hidden, inner, heads, _count(config, "num_key_value_heads", name) or heads,
            _count(config, "head_dim", name) or hidden // heads, vocab,
            bool(config.get("tie_word_embeddings", True)), **_mixture(config, name),
        )  # fmt: skip

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention: the four projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp(self) -> int:
        """Parameters of one layer's MLP, where it is not of experts."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer without experts, its norms left out."""
        return self.attention + self.mlp

    @property
    def expert(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden * self.expert_width

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and as many of the output layer."""
        return self.vocab * self.hidden

    @property
    def decoder(self) -> int:
        """Parameters of all layers."""
        sparse = self.layers - self.dense_layers if self.experts else 0
        mixture = self.attention + self.experts * self.expert + 3 * self.hidden * self.shared_width
        return (self.layers - sparse) * self.layer + sparse * mixture

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.decoder + self.embedding * (1 if self.tied else 2)

    @property
    def weight_bytes(self) -> int:
        """Of the whole model in memory."""
        return self.decoder * self.weight_bits // 8 + 2 * (self.parameters - self.decoder)

    def touched(self, rows: float) -> float:
        """Experts of a layer that ``rows`` rows ask if they choose independently and evenly."""
        return self.experts * (1 - (1 - self.chosen / self.experts) ** rows)


def check_attention(config: Mapping[str, Any], name: str) -> None:
    """ValueError, in one sentence, for layers that keep something other than keys and values."""
    if config.get("kv_lora_rank"):
        raise ValueError(
            f"{name} has kv_lora_rank: its latent attention caches something other than keys and "
            "values, which no plan counts yet"
        )
    kinds = config.get("layer_types") or config.get("layers_block_type") or []
    if other := set(map(str, kinds)) - ATTENTION - {"attention"}:
        raise ValueError(
            f"{name} has layers of the kind {quoted(min(other))}: a plan counts attention over "
            "keys and values"
        )


def _count(config: dict[str, Any], key: str, name: str) -> int:
    """A number that may be left out; 0 if it is, or is null."""
    return positive(config, key, name) if config.get(key) else 0


def _mixture(config: dict[str, Any], name: str) -> dict[str, int]:
    """The sizes of a mixture of experts; {} of a model without."""
    key = next((key for key in EXPERTS if config.get(key)), None)
    if key is None:
        return {}

    def read(key: str) -> int:
        return _count(config, key, name)

    width = read("moe_intermediate_size") or read("intermediate_size")
    dense = config.get("mlp_only_layers") or []
    return {
        "experts": read(key),
        "chosen": positive(config, "num_experts_per_tok", name),
        "expert_width": width,
        "shared_width": read("shared_expert_intermediate_size") or read("n_shared_experts") * width,
        "dense_layers": read("first_k_dense_replace")
        or (len(dense) if isinstance(dense, list) else 0),
    }


def weight_bits(config: Mapping[str, Any], name: str) -> int:
    """Bits of a layer's weight by the ``quantization_config`` in the config.json ``name``;
    ValueError, in one sentence, if it does not say."""
    scheme = config.get("quantization_config")
    if not scheme:
        return 16
    if isinstance(scheme, Mapping):
        groups = scheme.get("config_groups")
        parts = groups.values() if isinstance(groups, Mapping) else ()
        weights = [each.get("weights") for each in parts if isinstance(each, Mapping)]
        found = {each.get("num_bits") for each in weights if isinstance(each, Mapping)}
        found |= {scheme.get("bits"), 8 if scheme.get("quant_method") == "fp8" else None}
        found -= {None}
        if len(found) == 1 and type(bits := found.pop()) is int and 0 < bits <= 16:
            return bits
    raise ValueError(
        f"{name} has a quantization_config that does not say how many bits a weight has: leave it "
        "out to plan for 16"
    )
