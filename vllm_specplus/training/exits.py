"""Learning at several exits of a model at once.

S2D's SoFT (arXiv 2407.01955) sums the losses of a draft that may be left after some of its layers;
LayerSkip (arXiv 2404.16710) weights those of a target that later drafts for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vllm_specplus.training.losses import Loss
from vllm_specplus.training.slices import RowsOf, gradient_in_slices


def layer_weights(exits: Sequence[int], layers: int, scale: float) -> list[float]:
    """LayerSkip's (equation 6), of exits after so many of ``layers`` layers, ascending, the last of
    them ``layers`` itself. Earlier ones count less by the square of their depth, all of them
    ``scale`` times what is left for the last one; the sum is 1."""
    weights = [scale * (e - 1) * e / 2 for e in exits[:-1]]
    weights.append(layers - 1 + scale * (layers - 2) * (layers - 1) / 2)
    return [weight / sum(weights) for weight in weights]


def backward_exits(
    states: Sequence[Tensor],
    weights: Sequence[float],
    rows_of: Callable[[int], RowsOf],
    loss: Loss,
) -> list[Tensor]:
    """Runs the backward pass of the sum over exits of their mean losses, each times its weight;
    returns each exit's losses [N].

    ``states``: of each exit [N, hidden]; ``rows_of(exit)`` makes its rows. Logits exist by slices
    only, and the model is gone through once.
    """
    losses, gradients = [], []
    for number, (each, weight) in enumerate(zip(states, weights, strict=True)):
        share = torch.full((len(each),), weight / max(len(each), 1), device=each.device)
        of_exit, gradient = gradient_in_slices(each, rows_of(number), loss, share)
        losses.append(of_exit)
        gradients.append(gradient)
    torch.autograd.backward(list(states), gradients)
    return losses
