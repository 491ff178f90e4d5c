"""Layer-parallel drafting (EasySpec, arXiv 2502.02493).

A layer is ``x -> b = x + A(x) -> b + M(b)``. Where the draft has devices to spare, the
attentions of ``N`` consecutive layers read the *same* input and run at the same time::

    a_j = A_j(h), j in the group;   then in order:  h <- h + a_j;  h <- h + M_j(h)

which is close to the exact result, since hidden states change slowly from layer to layer.
The first and the last layer stay exact. Text is always read exactly (the paper's bonus
calibration): accepted nodes are read again with the next token, so that what the fuzzy
passes wrote is never built upon. The text that is output does not change: nodes are
verified against the distributions they were drawn from, fuzzy or not.
"""

from __future__ import annotations

from typing import Protocol

import torch

from vllm_specplus.drafting.cache import PagedCache
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.passes import PagedAttention, Rows


def layer_groups(num_layers: int, size: int) -> list[range]:
    """Layers that run together: the first and the last alone, the others by ``size``."""
    middle = range(1, num_layers - 1)
    groups = [middle[i : i + size] for i in range(0, len(middle), size)]
    last = [range(num_layers - 1, num_layers)] if num_layers > 1 else []
    return [range(1), *groups, *last]


def layer_owner(layer: int, num_layers: int, size: int, shards: int) -> int:
    """The shard that holds a layer's attention and its keys and values."""
    if layer in (0, num_layers - 1):
        return 0
    return (layer - 1) % size % shards


def layers_of(shard: int, num_layers: int, size: int, shards: int) -> list[int]:
    """The layers whose attention ``shard`` holds."""
    return [j for j in range(num_layers) if layer_owner(j, num_layers, size, shards) == shard]


class Attentions(Protocol):
    """Who computes the attentions of a pass."""

    def begin(self, rows: Rows, exact: bool) -> None:
        """The coming calls belong to a pass over these rows."""

    def layer_group(self, layers: range, hidden: torch.Tensor) -> list[torch.Tensor]:
        """A_j of the same input [T, d], for every layer of a group."""

    def one_layer(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """A_j of its own input."""


class LocalAttentions:
    """All in this process, one after the other: the reference."""

    def __init__(self, model: DraftModel, cache: PagedCache):
        self._model, self._cache = model, cache
        self._rotary = self._attend = None

    def begin(self, rows, exact):
        self._attend = PagedAttention(self._cache, rows)
        self._rotary = self._model.rotary(rows.positions)

    def layer_group(self, layers, hidden):
        return [self.one_layer(layer, hidden) for layer in layers]

    def one_layer(self, layer, hidden):
        return self._model.attention(layer, hidden, self._rotary, self._attend)


class LayerParallelExecutor(DraftExecutor):
    """A draft executor whose tree levels are fuzzy."""

    model: DraftModel

    def __init__(self, model: DraftModel, max_slots: int, max_nodes: int, group_size: int):
        super().__init__(model, max_slots, max_nodes)
        self._groups = layer_groups(model.num_layers, group_size)
        self.attentions: Attentions = LocalAttentions(model, self.cache)

    def _forward(self, tokens, rows, exact):
        model, attentions = self.model, self.attentions
        attentions.begin(rows, exact)
        hidden = model.embed(tokens)
        for group in self._groups:
            if exact or len(group) == 1:
                for layer in group:
                    hidden = hidden + attentions.one_layer(layer, hidden)
                    hidden = hidden + model.mlp(layer, hidden)
            else:
                for layer, a in zip(group, attentions.layer_group(group, hidden), strict=True):
                    hidden = hidden + a
                    hidden = hidden + model.mlp(layer, hidden)
        return hidden
