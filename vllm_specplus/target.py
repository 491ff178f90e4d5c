"""The model that is served, as far as a drafting method has to fit it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TargetDevice:
    """What one rank of the target runs on."""

    host: str
    """Name of its node."""
    name: str
    """How ``CUDA_VISIBLE_DEVICES`` names it there; "" on the CPU."""
    uuid: str
    """What all processes call it; "" on the CPU."""


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
    gives_layers: Callable[[], bool] = lambda: True
    """Does vLLM hand out the hidden states that enter its layers? Asked of its class."""
    has_codebook: bool = False
    """Does it generate image codes?"""
    latents: dict[str, Any] | None = None
    """Its config, if it generates latents."""
    keeps: int | None = None
    """How many tokens of a text stay in its KV cache, if all its layers have a sliding window that
    texts may exceed; None: all do."""
    eager: bool = False
    """Is it run layer by layer, neither compiled nor recorded?"""
    fp8_cache: bool = False
    """Are the keys and values in its cache bytes?"""
    device_type: str = "cpu"
    """What it runs on, as torch names it."""

    def check_keeps_texts(self, method: str) -> None:
        """Raise ValueError if a text that grows loses what ``method`` goes on reading."""
        if self.keeps is not None:
            raise ValueError(
                f"method {method!r} reads whole texts in the target's KV cache, which keeps "
                f"{self.keeps} tokens here (sliding-window attention): set --max-model-len to that "
                f"at most, or use another method, such as 'token_recycling'"
            )
