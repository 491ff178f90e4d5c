"""Sizes of known models, and their folders."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_specplus.planning.sizes import Shape

LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128, 128256, False)
LLAMA_70B = Shape(80, 8192, 28672, 64, 8, 128, 128256, False)
QWEN_30B = Shape(48, 2048, 6144, 32, 4, 128, 151936, False, 128, 8, 768)


def config(shape: Shape, **keys) -> dict:
    """The config.json of a Llama of that shape."""
    return {
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "tie_word_embeddings": shape.tied,
    } | keys  # fmt: skip


def save(folder: Path, shape: Shape, **keys) -> Path:
    """A folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(shape, **keys)))
    return folder
