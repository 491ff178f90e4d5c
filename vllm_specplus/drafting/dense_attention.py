"""Attention by a mask over keys that are all at hand: of training, which needs gradients, and of
checks. Serving attends over pages (``passes.py``)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention


class Keys(Protocol):
    """What came before the rows of a pass."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, kv_heads, n, head_dim] each; return all there are, in the same layout."""


class DenseAttention:
    """An ``Attend`` (``passes.py``) of B texts of n rows each, back to back."""

    def __init__(self, mask: torch.Tensor, keys: Keys | None = None):
        """``mask`` bool [B, 1, n, S]: which keys each row sees; ``keys``: those of earlier passes,
        None: there are only the rows' own."""
        self._mask, self._keys = mask, keys

    def __call__(self, layer, query, keys, values, scale, window=0, soft_cap=0.0):
        texts, _, rows, _ = self._mask.shape
        query, keys, values = (
            each.unflatten(0, (texts, rows)).transpose(1, 2) for each in (query, keys, values)
        )
        if self._keys is not None:
            keys, values = self._keys.update(keys, values, layer)
        mask = self._mask
        if window:
            places = torch.arange(mask.shape[-1], device=mask.device)
            mask = mask & (places > places[-rows:, None] - window)
        if soft_cap:
            out = _capped(query, keys, values, mask, scale, soft_cap)
        else:
            out = scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(0, 1)


def _capped(query, keys, values, mask, scale, soft_cap):
    group = query.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(group, 1) for each in (keys, values))
    scores = soft_cap * (query @ keys.transpose(-1, -2) * (scale / soft_cap)).tanh()
    weights = scores.masked_fill(~mask, float("-inf")).float().softmax(-1)
    return weights.to(values.dtype) @ values
