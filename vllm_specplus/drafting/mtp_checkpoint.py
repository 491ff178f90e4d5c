"""What a folder holds of an MTP module; see ``drafting/mtp.py``.

The module stands in its target's own checkpoint, or alone in a folder with the target's config.
Two layouts are read, as vLLM's models do::

    MiMo        model.mtp_layers.0.{token_layernorm, hidden_layernorm, input_proj, ...}
    DeepSeek's  model.layers.N.{enorm, hnorm, eh_proj, shared_head.norm, ...}, behind the N layers

Reads shapes, no weights, and imports no torch: for checking a user's configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplus.drafting.head_tensors import Canonical, check_tensors, read_shapes
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.files import is_file, positive, read_json
from vllm_specplus.strict import quoted

#: Architectures whose modules can be run -> their family.
_FAMILIES = {"MiMoForCausalLM": "mimo", "Glm4MoeForCausalLM": "glm4_moe"}
#: Keys of ``config.json`` that describe the layer, as transformers' configs have them.
_LAYER_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "partial_rotary_factor", "attention_bias", "use_qk_norm",
    "moe_intermediate_size", "num_experts_per_tok", "n_shared_experts", "n_routed_experts",
    "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob",
)  # fmt: skip
#: Names of a module's parts, by layout, in common words.
_PARTS = {
    "token_layernorm": "enorm", "hidden_layernorm": "hnorm", "input_proj": "eh_proj",
    "final_layernorm": "norm", "shared_head.norm": "norm", "shared_head.head": "lm_head",
}  # fmt: skip
_OWN = ("enorm", "hnorm", "eh_proj", "norm", "lm_head", "embed_tokens")
#: Copies of what the target has: its own are used, as in vLLM.
SHARED = ("lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True)
class MtpConfig:
    """What a folder says of its module."""

    family: str
    """``mimo`` or ``glm4_moe``."""
    layer: dict[str, Any]
    """Keys of ``Qwen2Config`` or ``Glm4MoeConfig``."""
    hidden_size: int
    vocab_size: int
    target_layers: int
    """How many layers the target has."""
    experts: int
    """Of its MLP; 0: it is dense."""

    @property
    def hidden_first(self) -> bool:
        """Does the projection read the hidden state before the embedding?"""
        return self.family == "mimo"

    @property
    def norm_output(self) -> bool:
        """Do rows below read a row's hidden state behind its last norm?"""
        return self.family == "mimo"


def canonical(target_layers: int) -> Canonical:
    """Names of the tensors of a module behind so many layers, the same for both layouts: those of
    its decoder layer begin with ``layer.``; None for tensors of the target."""
    module = re.compile(rf"(?:model\.)?(?:mtp_layers\.0|layers\.{target_layers})\.(.+)")

    def name_of(tensor: str) -> str | None:
        found = module.fullmatch(tensor)
        if found is None:
            return None
        part, _, kind = found[1].rpartition(".")
        part = _PARTS.get(part, part)
        return f"{part}.{kind}" if part in _OWN else f"layer.{part}.{kind}"

    return name_of


def read_config(folder: str) -> MtpConfig:
    """Check a module's folder; DraftModelError, with a sentence, if it cannot be run here."""
    path, name = Path(folder), f"MTP module {quoted(folder)}"
    if not is_file(path / "config.json"):
        raise DraftModelError(f"{name} is not a Hugging Face folder (it has no config.json)")
    try:
        config = read_json(path / "config.json", f"{name}: its config.json")
    except ValueError as error:
        raise DraftModelError(str(error)) from None
    try:
        family = _family(config, name)
        hidden, vocab, layers = (
            _size(config, key, name) for key in ("hidden_size", "vocab_size", "num_hidden_layers")
        )
        shapes = read_shapes(path, name, canonical(layers))
        if not shapes:
            raise DraftModelError(
                f"{name} holds no MTP module (no tensors of mtp_layers.0 or layers.{layers}): use "
                f"a checkpoint with one"
            )
        experts = len({each.split(".")[3] for each in shapes if ".experts." in each})
        expected = _expected(config, family, hidden, experts, name)
        check_tensors(shapes, expected, dict.fromkeys(SHARED, (vocab, hidden)), name)
    except DraftModelError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DraftModelError(
            f"{name}: its config or weights are unreadable: {str(error)[:150]!r}"
        ) from None
    layer = {key: config[key] for key in _LAYER_KEYS if config.get(key) is not None}
    layer.setdefault("num_key_value_heads", layer["num_attention_heads"])
    layer.setdefault("head_dim", hidden // layer["num_attention_heads"])
    # Behind them transformers looks for mixtures of experts: the layer is number 0 here.
    layer["first_k_dense_replace"] = int(not experts)
    return MtpConfig(family, layer, hidden, vocab, layers, experts)


def _family(config: dict[str, Any], name: str) -> str:
    """One of :data:`_FAMILIES`; DraftModelError where the module is of another."""
    if config.get("speculators_model_type"):
        raise DraftModelError(
            f"{name} is a speculator of type {quoted(config['speculators_model_type'])}: merge it "
            f"into its target ('speculators stitch-mtp'), and name that folder"
        )
    named = [str(each) for each in config.get("architectures") or ()]
    found = [_FAMILIES[each] for each in named if each in _FAMILIES]
    if not found:
        kind = named[0] if named else config.get("model_type")
        raise DraftModelError(
            f"{name} is of a target of type {quoted(kind)}, whose layers are not supported "
            f"(supported: {', '.join(_FAMILIES)})"
        )
    if config.get("quantization_config"):
        raise DraftModelError(f"{name} is quantized: use its unquantized original")
    if config.get("use_sliding_window"):
        raise DraftModelError(f"{name} has a sliding window, which is not supported")
    count = config.get("num_nextn_predict_layers", 1)
    if count != 1:
        raise DraftModelError(
            f"{name} has {quoted(count)} layers of its own, and one is supported: "
            f"'num_nextn_predict_layers' must be 1"
        )
    return found[0]


def _expected(
    config: dict[str, Any], family: str, hidden: int, experts: int, name: str
) -> dict[str, tuple[int, ...]]:
    """The shapes of the module's tensors, by the config."""
    heads, inner = (
        _size(config, key, name) for key in ("num_attention_heads", "intermediate_size")
    )
    keys = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or hidden // heads)
    if heads % keys:
        raise DraftModelError(f"{name} has {heads} heads, which cannot share {keys} of keys")
    expected: dict[str, tuple[int, ...]] = {
        f"{each}.weight": (hidden,)
        for each in (
            "enorm", "hnorm", "norm", "layer.input_layernorm", "layer.post_attention_layernorm",
        )
    }  # fmt: skip
    expected["eh_proj.weight"] = (hidden, 2 * hidden)
    attention = "layer.self_attn"
    expected[f"{attention}.o_proj.weight"] = (hidden, heads * dim)
    for part, rows in (("q", heads * dim), ("k", keys * dim), ("v", keys * dim)):
        expected[f"{attention}.{part}_proj.weight"] = (rows, hidden)
        if family == "mimo" or config.get("attention_bias"):
            expected[f"{attention}.{part}_proj.bias"] = (rows,)
    if config.get("use_qk_norm"):
        expected |= {f"{attention}.{part}_norm.weight": (dim,) for part in "qk"}
    if not experts:
        return expected | _mlp("layer.mlp", hidden, inner)
    inner = _size(config, "moe_intermediate_size", name)
    said = _size(config, "n_routed_experts", name)
    if said != experts:
        raise DraftModelError(f"{name} has {experts} experts, and its config.json says {said}")
    expected["layer.mlp.gate.weight"] = (experts, hidden)
    expected["layer.mlp.gate.e_score_correction_bias"] = (experts,)
    shared = inner * int(config.get("n_shared_experts") or 1)
    expected |= _mlp("layer.mlp.shared_experts", hidden, shared)
    for i in range(experts):
        expected |= _mlp(f"layer.mlp.experts.{i}", hidden, inner)
    return expected


def _size(config: dict[str, Any], key: str, name: str) -> int:
    try:
        return positive(config, key, f"{name}: its config.json")
    except ValueError as error:
        raise DraftModelError(str(error)) from None


def _mlp(name: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (inner, hidden),
        f"{name}.up_proj.weight": (inner, hidden),
        f"{name}.down_proj.weight": (hidden, inner),
    }
