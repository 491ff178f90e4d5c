"""Losses of many positions, a few of them at a time.

The logits of one position are as many as the vocabulary has tokens: of a batch of 2,048 and 49,152
tokens they take 400 MB, and as much again for each function of them that a gradient needs. So they
are computed, judged and differentiated by slices, of which each is gone before the next one comes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_specplus.training.losses import Loss, Rows

#: Positions of a slice: few enough for the cache of a CPU.
SLICE = 128

RowsOf = Callable[[slice, Tensor], Rows]
"""What a loss reads at the positions of a slice, of the draft's hidden states [n, hidden] there."""


def slices(count: int) -> list[slice]:
    """``count`` positions in order, by slices."""
    return [slice(at, min(at + SLICE, count)) for at in range(0, count, SLICE)]


def gradient_in_slices(
    states: Tensor, rows_of: RowsOf, loss: Loss, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The losses float32 [N] at ``states`` [N, hidden], and the gradient [N, hidden] of their sum
    times ``weights`` [N] (None: of their mean).

    Parameters that ``rows_of`` uses, as an output layer of the draft's own, get their gradients
    added; what ``states`` were computed from does not: see :func:`backward_in_slices`.
    """
    count, given = len(states), states.detach()
    if weights is None:
        weights = torch.full((count,), 1 / max(count, 1), device=states.device)
    losses, gradient = torch.zeros(count, device=states.device), torch.zeros_like(given)
    for here in slices(count):
        # A leaf of its own: the gradient of a part of one would be as large as the whole.
        leaf = given[here].requires_grad_()
        part = loss(rows_of(here, leaf))
        (part * weights[here]).sum().backward()
        losses[here] = part.detach()
        if leaf.grad is not None:
            gradient[here] = leaf.grad
    return losses, gradient


def backward_in_slices(
    states: Tensor, rows_of: RowsOf, loss: Loss, weights: Tensor | None = None
) -> Tensor:
    """The same, with the backward pass of ``states`` behind it; returns the losses [N]."""
    losses, gradient = gradient_in_slices(states, rows_of, loss, weights)
    states.backward(gradient)
    return losses


@torch.no_grad()
def losses_in_slices(states: Tensor, rows_of: RowsOf, loss: Loss) -> Tensor:
    """The losses float32 [N] alone."""
    parts = [loss(rows_of(here, states[here])) for here in slices(len(states))]
    return torch.cat(parts) if parts else torch.zeros(0, device=states.device)
