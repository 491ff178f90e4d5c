"""Trained models as folders in Hugging Face's format, which vLLM and transformers load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_specplus.files import read_json

#: Files of a model's folder that say how its tokens are read and written.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def own_dtype(folder: Path) -> torch.dtype:
    """Of a model's weights, by its ``config.json``; float32 where that says nothing."""
    config = read_json(folder / "config.json", f"{folder / 'config.json'}")
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def write_model(model: nn.Module, folder: Path, like: Path, dtype: torch.dtype) -> None:
    """Writes a causal language model of transformers into an existing folder, its weights as
    ``dtype``, with the tokenizer of the model in the folder ``like``."""
    config = type(model.config)(**model.config.to_dict())
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    weights = dict(model.state_dict())
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(stored(weights, dtype), folder / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER:
        if (like / name).exists():
            shutil.copy(like / name, folder / name)


def stored(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of ``weights`` as ``dtype``, each in memory of its own."""
    return {
        name: weight.detach().to("cpu", dtype, copy=True).contiguous()
        for name, weight in weights.items()
    }
