"""The target's embedding and output layer in a process that has no target."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import embedding, linear

from vllm_specplus.overlap.messages import arrays_of, from_bytes


class SentVocabulary:
    """A ``drafting.eagle.Vocabulary`` made of what :func:`told` says."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], size: int, cap: float | None, scale: float
    ):
        """``tensors``: "rows" [n, hidden] of the embedding, and "output" [m, hidden], "bias" [m] of
        the output layer where it has its own; ``size``: the vocabulary's; ``cap``, ``scale``: of
        logits, soft cap first."""
        self._rows = tensors["rows"]
        self._output, self._bias = tensors.get("output", self._rows), tensors.get("bias")
        self._size, self._cap, self._scale = size, cap, scale

    @classmethod
    def of(
        cls, told: dict[str, Any] | None, arrays: dict[str, np.ndarray], dtype: torch.dtype,
        device: torch.device,
    ) -> SentVocabulary | None:  # fmt: skip
        """What was :func:`told`, on ``device``; None: nothing was."""
        if told is None:
            return None
        tensors = {name: from_bytes(each, dtype, device) for name, each in arrays.items()}
        return cls(tensors, told["size"], told["cap"], told["scale"])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., hidden]."""
        return embedding(tokens, self._rows)

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        """[..., hidden], behind the last norm -> float32 logits [..., vocab]."""
        logits = linear(normed.to(self._output.dtype), self._output, self._bias)
        logits = logits[..., : self._size].float()
        if self._cap is not None:
            logits = (logits / self._cap).tanh() * self._cap
        return logits * self._scale


def told(vocabulary: Any, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(JSON, arrays) that say what the target's ``vocabulary`` is: a
    vocabulary of ``engine.target_vocabulary``."""
    tensors, size, cap, scale = vocabulary.parts()
    about = {"size": size, "cap": cap, "scale": scale}
    return about, arrays_of({name: each.to(dtype) for name, each in tensors.items()})
