"""One layer of a draft model, of transformers' modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_specplus.drafting.layer_parts import LayerParts


class TransformersLayer(LayerParts[dict[str, Any]]):
    """Its attention and its MLP; those that another device holds are None."""

    def __init__(self, block: nn.Module, window: int | None):
        """``window``: how many positions its rows see, None: all."""
        # transformers names what attends so in every family.
        super().__init__(block, lambda each: "Attention" in type(each).__name__)
        self.window = window

    def mix(self, normed: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """Return the attention of ``normed`` [R, n, hidden]; ``given``: what else transformers' own
        is called with, by name."""
        return self.attention(hidden_states=normed, **given)[0]

    def keep(self, attention: bool, mlp: bool) -> None:
        """Let go of the parts that another device holds."""
        self.norms = []
        if not attention:
            self.attention, self.placed[:2] = None, [None, None]
        if not mlp:
            self.mlp, self.placed[2:] = None, [None, None]
