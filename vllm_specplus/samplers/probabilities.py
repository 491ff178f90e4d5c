"""Rows of probabilities, and how tokens are drawn from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Probabilities:
    """The distributions that a step is judged by."""

    target: torch.Tensor
    """float32 [L, V] the target's at every row."""
    draft: torch.Tensor
    """float32 [M, V] those that nodes were drawn from."""

    def draft_mass(self, draft_rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Returns q(x), float32 [n, ...], of each of ``tokens`` int64 [n, ...] by row
        ``draft_rows`` int64 [n, ...] of ``draft``; 1 where the row is negative: the token is
        deterministic."""
        if not len(self.draft):
            return torch.ones(tokens.shape, device=tokens.device)
        return torch.where(draft_rows >= 0, self.draft[draft_rows.clamp(min=0), tokens], 1.0)


def padded(draft_probs: torch.Tensor, size: int) -> torch.Tensor:
    """Pads ``draft_probs`` [..., V'] with zeros up to ``size``."""
    return torch.nn.functional.pad(draft_probs, (0, size - draft_probs.shape[-1]))


def draw(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draws a token int64 [n] from each row of ``weights`` float [n, V], with probability
    proportional to them, by uniform ``noise`` [n] in [0, 1); never one of weight 0."""
    cdf = weights.cumsum(-1, dtype=torch.float64)
    # Below the total, so that the first token to exceed it exists, and has weight.
    return torch.searchsorted(cdf, noise.double()[:, None] * cdf[:, -1:], right=True)[:, 0]
