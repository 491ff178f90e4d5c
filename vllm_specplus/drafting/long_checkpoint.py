"""What the folder of a long draft holds; see ``drafting/long_draft.py``.

Reads shapes, no weights, and imports no torch: for checking a user's configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_specplus.drafting.eagle_checkpoint import LAYER_KEYS
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.files import is_file, positive, read_json, tensor_shapes
from vllm_specplus.strict import quoted

#: ``model_type`` of the targets whose configuration a draft may have: all rotate alike.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: Positions before its own that a row of the authors' drafts sees.
WINDOW = 512
#: The linear layers, by their part of the layer.
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "cross_attn": ("q_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
NORMS = ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm")
#: Before the output layer, if there is one; the authors' drafts have none.
LAST_NORM = "norm"
#: Tensors that the authors write and nothing reads: projections of keys and values that the target
#: has, and what follows from the configuration.
_UNREAD = (
    *(f"cross_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")),
    *(f"{part}.rotary_emb.inv_freq" for part in ("self_attn", "cross_attn")),
)
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class LongConfig:
    """What a draft's folder says."""

    layer: dict[str, Any]
    """Keys of ``LlamaConfig``."""
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    """Of the self-attention."""
    head_dim: int
    window: int
    """Positions before its own that a row sees of its own text."""
    shapes: dict[str, tuple[int, ...]]
    """Of its tensors, by their canonical names."""


def canonical(name: str) -> str | None:
    """Return a tensor's name without the part that says whose it is; None: nothing reads it."""
    for prefix in ("model.", "draft_model."):
        name = name.removeprefix(prefix)
    return None if name in _UNREAD else name


def read_config(folder: str) -> LongConfig:
    """Check a draft's folder; DraftModelError, in one sentence, if it cannot be run here."""
    path, name = Path(folder), f"long draft {quoted(folder)}"
    if not is_file(path / "config.json"):
        raise DraftModelError(f"{name} is not a Hugging Face folder (it has no config.json)")
    try:
        raw = read_json(path / "config.json", f"{name}: its config.json")
        shapes = _shapes(path, name)
        config = _sizes(raw, shapes, f"{name}: its config.json")
    except DraftModelError:
        raise
    except ValueError as error:
        raise DraftModelError(str(error)) from None
    if problem := _unrunnable(raw, config):
        raise DraftModelError(f"{name} {problem}")
    return config


def _sizes(raw: dict[str, Any], shapes: dict[str, tuple[int, ...]], what: str) -> LongConfig:
    """The sizes that a ``config.json`` names; ValueError if one is missing or no size."""
    hidden, _, heads, vocab = (positive(raw, key, what) for key in _SIZES)
    given = {key: value for key, value in raw.items() if value is not None}
    kv_heads = positive({"num_key_value_heads": heads} | given, "num_key_value_heads", what)
    head_dim = positive({"head_dim": hidden // heads} | given, "head_dim", what)
    window = positive({"draft_window": WINDOW} | given, "draft_window", what)
    layer = {key: given[key] for key in LAYER_KEYS if key in given}
    return LongConfig(layer, hidden, vocab, heads, kv_heads, head_dim, window, shapes)


def _shapes(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor in the folder's safetensors files that is read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DraftModelError(
            f"{name} holds no .safetensors file: save its weights as one (pickled files are not "
            f"read)"
        )
    found = {}
    for file in files:
        for tensor, shape in tensor_shapes(file, quoted(file)).items():
            if (known := canonical(tensor)) is not None:
                found[known] = shape
    return found


def _unrunnable(raw: dict[str, Any], config: LongConfig) -> str | None:
    """What is wrong with a draft, or None."""
    if raw.get("quantization_config"):
        return "is quantized: use its unquantized original"
    if raw.get("model_type") not in (None, *FAMILIES):
        family = quoted(raw["model_type"])
        return f"has a layer of type {family} (supported: {', '.join(FAMILIES)})"
    if raw.get("hidden_act") not in (None, "silu"):
        return f"has the activation {quoted(raw['hidden_act'])} (supported: silu)"
    if config.heads % config.kv_heads:
        heads, kv_heads = quoted(config.heads), quoted(config.kv_heads)
        return f"has {heads} heads, which {kv_heads} KV heads do not divide"
    expected = _expected(raw, config)
    if missing := sorted(expected.keys() - config.shapes.keys()):
        return f"is no long draft: it lacks {', '.join(missing[:3])}"
    biases = {
        f"{name.removesuffix('.weight')}.bias": shape[:1]
        for name, shape in expected.items()
        if name.endswith("_proj.weight")
    }
    known = expected | biases | {f"{LAST_NORM}.weight": (config.hidden_size,)}
    if unknown := sorted(config.shapes.keys() - known.keys()):
        return f"has tensors that are unknown here: {', '.join(unknown[:3])}"
    for name, shape in sorted(config.shapes.items()):
        if shape != known[name]:
            wanted = quoted(known[name])
            return f"has {name} of shape {quoted(shape)}, and its config.json makes it {wanted}"
    return None


def _expected(raw: dict[str, Any], config: LongConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that every draft of these sizes has, by canonical name."""
    hidden, inner = config.hidden_size, raw["intermediate_size"]
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    sizes = {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
        "o_proj": (hidden, queries), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }  # fmt: skip
    projections = {
        f"{part}.{name}.weight": sizes[name] for part, names in PROJECTIONS.items()
        for name in names
    }  # fmt: skip
    return projections | {f"{name}.weight": (hidden,) for name in NORMS}
