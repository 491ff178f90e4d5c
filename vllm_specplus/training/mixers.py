"""What is done to a head's inputs while it learns, lest it rely on their being the target's."""

from __future__ import annotations

import torch
from torch import Tensor

#: Falcon's share of wrong positions that are shown: what falls over the run, and what stays.
FALLING, STAYING = 0.35, 0.1


def noise(states: Tensor, scale: float, rng: torch.Generator) -> Tensor:
    """``states`` and, at each unit, noise uniform in ±``scale`` (EAGLE, arXiv 2401.15077)."""
    drawn = torch.rand(states.shape, generator=rng, device=states.device, dtype=states.dtype)
    return states + scale * (2 * drawn - 1)


def glance_share(done: float) -> float:
    """Share of the wrong positions that is shown when ``done`` of the run is over: 0.45 at first,
    0.10 in the end (Falcon, arXiv 2412.12639)."""
    return FALLING * (1 - done) + STAYING


def glanced(right: Tensor, learn: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Which positions bool [M] a glancing pass shows.

    A first pass, without gradient, says where the draft is ``right`` bool [M]. Of the positions to
    ``learn`` bool [M], as many as ``share`` of the wrong ones (rounded down) are drawn, right or
    wrong; there the second pass has what the target computed for input.
    """
    wrong = int((learn & ~right).sum())
    shown = torch.zeros_like(learn)
    places = learn.nonzero()[:, 0]
    order = torch.randperm(len(places), generator=rng, device=places.device)
    shown[places[order[: int(share * wrong)]]] = True
    return shown


def reveal(inputs: Tensor, truth: Tensor, shown: Tensor) -> Tensor:
    """``inputs`` [M, ...] with the rows of ``truth`` where ``shown`` bool [M] says."""
    return torch.where(shown.view(-1, *[1] * (inputs.dim() - 1)), truth, inputs)
