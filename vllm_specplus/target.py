"""The model that is served, as far as a drafting method has to fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """Described by the engine's configuration; nothing is loaded."""

    load_tokenizer: Callable[[], Any]
    """Returns its Hugging Face tokenizer, or None if the engine runs without one."""
    vocab_size: int
    family: str
    """``model_type`` of its config."""
    num_layers: int
    tensor_parallel_size: int
    hidden_size: int
    has_codebook: bool = False
    """Does it generate image codes?"""
    latents: dict[str, Any] | None = None
    """Its config, if it generates latents."""
