"""One layer of a draft model, of transformers' modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface

from vllm_specplus.drafting.layer_parts import LayerParts
from vllm_specplus.drafting.passes import Attend

#: transformers' name for attention that is passed in, in its configs.
PASSED_IN = "specplus_passed_in"


def _attend(
    module: nn.Module, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: None,
    *, scaling: float, attend: Attend, window_of_layer: int | None, softcap: float | None = None,
    **_,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers' attention modules call: [1, heads, T, head_dim] each -> [1, T, heads,
    head_dim]. Of windows its configs say more than its masks do, so they are passed in as well."""
    query, keys, values = (each[0].transpose(0, 1) for each in (query, keys, values))
    layer = module.layer_idx
    out = attend(layer, query, keys, values, scaling, window_of_layer or 0, softcap or 0.0)
    return out[None], None


AttentionInterface.register(PASSED_IN, _attend)


@dataclass(frozen=True, slots=True)
class Given:
    """What an attention takes beside the rows."""

    rotary: tuple[torch.Tensor, torch.Tensor]
    """cos and sin [T, head_dim]"""
    attend: Attend


class TransformersLayer(LayerParts[Given]):
    """Its attention and its MLP; those that another device holds are None."""

    def __init__(self, block: nn.Module, window: int | None):
        """``window``: how many positions its rows see, None: all."""
        # transformers names what attends so in every family.
        super().__init__(block, lambda each: "Attention" in type(each).__name__)
        self.window = window

    def arguments(self, given: Given) -> dict[str, object]:
        """Return what transformers' attention, and a layer of it, is called with, by name."""
        cos, sin = given.rotary
        return {
            "position_embeddings": (cos[None], sin[None]),
            "attention_mask": None,
            "attend": given.attend,
            "window_of_layer": self.window,
        }

    def mix(self, normed: torch.Tensor, given: Given) -> torch.Tensor:
        """Return the attention of ``normed`` [T, hidden]."""
        return self.attention(hidden_states=normed[None], **self.arguments(given))[0][0]

    def transform(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the MLP of ``normed`` [T, hidden]."""
        return self.mlp(normed[None])[0]  # experts want a batch

    def with_parts(self, attention: nn.Module | None, mlp: nn.Module | None) -> TransformersLayer:
        """Return the layer with these parts in the places of its own; None: another device's."""
        other = copy.copy(self)
        other.norms, other.attention, other.mlp = [], attention, mlp
        first, second = (
            places if part is not None else [None, None]
            for part, places in ((attention, self.placed[:2]), (mlp, self.placed[2:]))
        )
        other.placed = [*first, *second]
        return other
