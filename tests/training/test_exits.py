"""Learning at several exits at once, against the sum of their losses."""

from __future__ import annotations

import pytest
import torch

from vllm_specplus.training.exits import backward_exits, layer_weights
from vllm_specplus.training.losses import LOSSES, Rows
from vllm_specplus.training.slices import SLICE

COUNT, HIDDEN, VOCAB = SLICE + 9, 6, 13


def model() -> torch.nn.ModuleList:
    torch.manual_seed(0)
    return torch.nn.ModuleList([torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])


def states_of(layers: torch.nn.ModuleList, given: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for layer in layers:
        given = given + layer(given).tanh()
        found.append(given)
    return found


@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.0, 0.8]])
def test_one_pass_gives_the_gradient_of_the_weighted_sum(weights):
    layers = model()
    head = torch.randn(VOCAB, HIDDEN)
    given, target = torch.randn(COUNT, HIDDEN), torch.randn(COUNT, VOCAB)
    labels = torch.zeros(COUNT, dtype=torch.long)
    loss = LOSSES["forward_kl"]

    def rows(here: slice, states: torch.Tensor) -> Rows:
        return Rows(target[here], states @ head.T, labels[here])

    losses = backward_exits(states_of(layers, given), weights, lambda number: rows, loss)
    found = [each.grad.clone() for each in layers.parameters()]
    layers.zero_grad()
    naive = [loss(rows(slice(None), states)) for states in states_of(layers, given)]
    sum(w * each.mean() for w, each in zip(weights, naive, strict=True)).backward()
    torch.testing.assert_close(losses, [each.detach() for each in naive])
    torch.testing.assert_close(found, [each.grad for each in layers.parameters()])
    # The last exit alone teaches the first layer something else.
    layers.zero_grad()
    loss(rows(slice(None), states_of(layers, given)[-1])).mean().backward()
    assert not torch.allclose(layers[0].weight.grad, found[0])


def test_weights_of_layers():
    """LayerSkip's, by hand: of 8 layers, exits after 2 and 4; sums of the layers' numbers below."""
    early = [0.5 * 1, 0.5 * (1 + 2 + 3)]
    last = 7 + 0.5 * (1 + 2 + 3 + 4 + 5 + 6)
    total = sum(early) + last
    expected = [each / total for each in (*early, last)]
    assert layer_weights([2, 4, 8], 8, 0.5) == pytest.approx(expected)
