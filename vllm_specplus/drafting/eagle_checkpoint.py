"""What an EAGLE head's folder holds; see ``drafting/eagle.py``.

Reads shapes, no weights, and imports no torch: for checking a user's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplus.drafting.head_tensors import read_shapes
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.files import is_file, read_json
from vllm_specplus.strict import quoted

#: ``model_type`` of the layers that a head may be made of.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: Keys of ``config.json`` that describe the layer, as transformers' ``LlamaConfig`` has them.
LAYER_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "attention_bias", "mlp_bias",
)  # fmt: skip
_LAYER = tuple(
    f"layer.{name}.weight"
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
        "post_attention_layernorm",
    )
)


@dataclass(frozen=True)
class HeadConfig:
    """What a head's folder says."""

    generation: int
    """1 (EAGLE, EAGLE-2) or 3."""
    layer: dict[str, Any]
    """Keys of ``LlamaConfig``."""
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    states: int
    """How many of the target's hidden states it reads at every position."""
    layer_ids: tuple[int, ...] | None
    """Which, as vLLM counts them: ``n`` is what enters layer ``n``. None: the target's
    default."""
    norm_before_residual: bool
    norm_output: bool


def canonical(name: str) -> str:
    """A tensor's name, the same for all writers of checkpoints."""
    name = name.removeprefix("model.")
    for prefix in ("midlayer.", "layers.0."):
        if name.startswith(prefix):
            return "layer." + name.removeprefix(prefix)
    return name


def read_config(folder: str) -> HeadConfig:
    """Check a head's folder; DraftModelError if it cannot be run here."""
    path = Path(folder)
    if not is_file(path / "config.json"):
        raise DraftModelError(
            f"EAGLE head {quoted(folder)} is not a Hugging Face folder (it has no config.json)"
        )
    try:
        raw = read_json(path / "config.json", f"EAGLE head {quoted(folder)}: its config.json")
        if raw.get("speculators_model_type") == "peagle":
            raise DraftModelError(
                f"EAGLE head {quoted(folder)} is a P-EAGLE head: use the method 'block_tree'"
            )
        if raw.get("speculators_model_type") not in (None, "eagle3"):
            raise DraftModelError(
                f"EAGLE head {quoted(folder)} is a speculator of type "
                f"{raw['speculators_model_type']!r} (supported: eagle3)"
            )
        # `speculators` writes the layer's own config inside; some of vLLM's keys as well.
        config = raw | raw.get("transformer_layer_config", {}) | raw.get("eagle_config", {})
        shapes = read_shapes(path, f"EAGLE head {quoted(folder)}", canonical)
        generation = 3 if "layer.hidden_norm.weight" in shapes else 1
        problem = _unrunnable(config, shapes, generation)
        if problem:
            raise DraftModelError(f"EAGLE head {quoted(folder)} {problem}")
        hidden, reads = shapes["fc.weight"]
        target = int(config.get("target_hidden_size") or config["hidden_size"])
        if generation == 1 and reads != 2 * target:
            raise DraftModelError(
                f"EAGLE head {quoted(folder)} reads {reads} units, not an embedding and a hidden "
                f"state of {target} each"
            )
        states = reads // target if generation == 3 else 1
        layer_ids = config.get("eagle_aux_hidden_state_layer_ids")
        if generation == 3 and (reads % target or len(layer_ids or range(3)) != states):
            raise DraftModelError(
                f"EAGLE head {quoted(folder)} reads {reads} units, which are not the states of "
                f"{len(layer_ids or range(3))} layers of {target} units"
            )
        return HeadConfig(
            generation=generation,
            layer={key: config[key] for key in LAYER_KEYS if config.get(key) is not None},
            hidden_size=hidden,
            target_hidden_size=target,
            vocab_size=int(config["vocab_size"]),
            states=states,
            layer_ids=tuple(layer_ids) if layer_ids else None,
            norm_before_residual=bool(
                config.get("norm_before_residual", "speculators_model_type" in raw)
            ),
            norm_output=bool(config.get("norm_output", False)),
        )
    except DraftModelError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DraftModelError(
            f"EAGLE head {quoted(folder)}: its config or weights are unreadable: "
            f"{str(error)[:150]!r}"
        ) from None


def _unrunnable(config: dict, shapes: dict[str, tuple[int, ...]], generation: int) -> str | None:
    """What is wrong with a head, or None."""
    required, optional = {"fc.weight", *_LAYER}, {"embed_tokens.weight", "lm_head.weight"}
    optional |= {"layer.self_attn.rotary_emb.inv_freq"}  # follows from the config
    if generation == 3:
        required |= {f"layer.{n}.weight" for n in ("hidden_norm", "input_layernorm")}
        required |= {"norm.weight"}
        optional |= {"d2t", "t2d", "input_norm.weight"}
        optional |= {name for name in shapes if name.startswith("fc_norm.")}
    else:
        optional |= {"fc.bias"}
    if "mask_hidden" in shapes:
        return "is a P-EAGLE head: use the method 'block_tree'"
    if config.get("attention_bias"):
        required |= {f"layer.self_attn.{part}_proj.bias" for part in "qkvo"}
    if config.get("quantization_config"):
        return "is quantized: use its unquantized original"
    if config.get("model_type") not in (None, "llama", "eagle", "speculator_model"):
        layer = config["model_type"]
        if layer not in FAMILIES:
            return f"has a layer of type {layer!r} (supported: llama)"
    if missing := sorted(required - shapes.keys()):
        return f"is no EAGLE head: it lacks {', '.join(missing[:3])}"
    if unknown := sorted(shapes.keys() - required - optional):
        return f"has tensors that are unknown here: {', '.join(unknown[:3])}"
    (known,) = shapes.get("d2t", (config["vocab_size"],))
    if "d2t" in shapes and "lm_head.weight" not in shapes:
        return "says with d2t which tokens it predicts, but has no lm_head.weight for them"
    if (rows := shapes.get("lm_head.weight", (known,))[0]) != known:
        return f"predicts {known} tokens, and its lm_head.weight has {rows} rows"
    (units, _), target = shapes["fc.weight"], config.get("target_hidden_size")
    if "embed_tokens.weight" not in shapes and target not in (None, units):
        return f"has {units} units and cannot use the embedding of its target, of {target}"
    return None
