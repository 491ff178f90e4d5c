"""Heads as they are served: the ``speculators`` formats of EAGLE-3 and DFlash, which vLLM's loaders
and those of ``drafting/`` read, and EAGLE's own.

The package ``speculators`` is not asked to write it: it wants a model of its own classes, and
dependencies that do not go with every vLLM. What it writes is a ``config.json`` and a
``model.safetensors``; which keys and tensors, says its version 0.9.0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPECULATORS = "0.9.0"
#: What a decoder layer of a target and that of its head have in common.
_LAYER_KEYS = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "initializer_range", "vocab_size", "bos_token_id", "eos_token_id",
)  # fmt: skip
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Eagle3Format:
    """What an EAGLE-3 head's ``config.json`` says beside its layer."""

    draft_vocab_size: int
    layer_ids: tuple[int, ...]
    """As vLLM counts them: ``n`` is what enters layer ``n``."""
    speculative_tokens: int
    """The length of the chain that ``vllm serve HEAD`` drafts."""
    norm_before_residual: bool = False
    fc_norm: bool = False
    norm_output: bool = False


@dataclass(frozen=True)
class DFlashFormat:
    """What a DFlash head's ``config.json`` says beside its layers' sizes."""

    draft_vocab_size: int
    layer_ids: tuple[int, ...]
    """As of :class:`Eagle3Format`."""
    layers: int
    """Its own."""
    block_size: int
    """Rows of a pass: the newest token, and masks."""
    mask_token_id: int


def layer_config(target: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a Llama layer as wide as those of ``target``, a ``config.json``.

    Its projections have no biases, whatever the target's have: Qwen2 has some of them only, and
    vLLM's heads have all or none.
    """
    layer = {key: target[key] for key in _LAYER_KEYS if target.get(key) is not None}
    return layer | {
        "model_type": "llama", "num_hidden_layers": 1, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False,
    }  # fmt: skip


def eagle_config(target: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of an EAGLE head for ``target``."""
    return {"architectures": ["EagleLlamaForCausalLM"], "dtype": "bfloat16"} | layer_config(target)


def eagle3_config(target: Mapping[str, Any], name: str, head: Eagle3Format) -> dict[str, Any]:
    """``config.json`` of an EAGLE-3 head for ``target``, to be found at ``name``, a folder."""
    return _speculator("eagle3", "Eagle3Speculator", target, name, head.speculative_tokens) | {
        "transformer_layer_config": layer_config(target),
        "draft_vocab_size": head.draft_vocab_size,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": list(head.layer_ids),
        "norm_before_residual": head.norm_before_residual,
        "norm_before_fc": False,
        "fc_norm": head.fc_norm,
        "norm_output": head.norm_output,
        "embed_requires_grad": False,
    }


def dflash_config(target: Mapping[str, Any], name: str, head: DFlashFormat) -> dict[str, Any]:
    """``config.json`` of a DFlash head of Qwen3 layers as wide as those of ``target``, which is to
    be found at ``name``, a folder."""
    heads = target["num_attention_heads"]
    # What Qwen3's configuration would take to be other than Llama's where nothing is said.
    sizes = {
        "head_dim": target.get("head_dim") or target["hidden_size"] // heads,
        "num_key_value_heads": target.get("num_key_value_heads") or heads,
    }
    layers = layer_config(target) | sizes | {
        "model_type": "qwen3", "num_hidden_layers": head.layers,
        "layer_types": ["full_attention"] * head.layers, "use_sliding_window": False,
    }  # fmt: skip
    return _speculator("dflash", "DFlashDraftModel", target, name, head.block_size - 1) | {
        "transformer_layer_config": layers,
        "draft_vocab_size": head.draft_vocab_size,
        "target_hidden_size": None,
        "block_size": head.block_size,
        "mask_token_id": head.mask_token_id,
        "aux_hidden_state_layer_ids": list(head.layer_ids),
        "sample_from_anchor": False,
        # vLLM reads false as causal in all layers, whether they have windows or not.
        "sliding_window_non_causal": True,
    }


def _speculator(
    kind: str, architecture: str, target: Mapping[str, Any], name: str, tokens: int
) -> dict[str, Any]:
    """What ``config.json`` says of a head of any kind; ``vllm serve HEAD`` drafts so many
    ``tokens``."""
    return {
        "architectures": [architecture],
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS,
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": name, "architectures": target.get("architectures", [])},
        },
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def write_head(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a head into an existing folder; what is floating point as bfloat16.

    ``weights`` have canonical names (``canonical`` of ``drafting/eagle_checkpoint.py`` or
    ``block_checkpoint.py``); the files have those that ``speculators`` and the authors write.
    Whoever wants a folder that is whole or absent hands in one that is renamed afterwards.
    """
    tensors = {
        name.replace("layer.", "layers.0.", 1) if name.startswith("layer.") else name: stored(each)
        for name, each in weights.items()
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stored(weight: Tensor) -> Tensor:
    """``weight`` as files have it: bfloat16, if it is floating point."""
    kept = weight.detach().cpu()
    return (kept.to(torch.bfloat16) if kept.is_floating_point() else kept).clone().contiguous()
