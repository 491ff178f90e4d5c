"""Losses by slices against those of all positions at once."""

from __future__ import annotations

import torch

from vllm_specplus.training.losses import LOSSES, Rows
from vllm_specplus.training.slices import (
    SLICE,
    backward_in_slices,
    gradient_in_slices,
    losses_in_slices,
)

COUNT, HIDDEN, VOCAB = 2 * SLICE + 7, 6, 19


def make():
    torch.manual_seed(0)
    body, head = torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Linear(HIDDEN, VOCAB)
    given, target = torch.randn(COUNT, HIDDEN), torch.randn(COUNT, VOCAB)
    sizes = []

    def rows(here: slice, states: torch.Tensor) -> Rows:
        sizes.append(len(states))
        return Rows(target[here], head(states), torch.zeros(len(states), dtype=torch.long))

    return body, head, given, rows, sizes


def gradients(*modules: torch.nn.Module) -> list[torch.Tensor]:
    return [each.grad for module in modules for each in module.parameters()]


def test_gradients_are_those_of_the_whole():
    """Of what comes before the states, and of an output layer behind them."""
    body, head, given, rows, sizes = make()
    weights = torch.rand(COUNT)
    losses = backward_in_slices(body(given), rows, LOSSES["forward_kl"], weights)
    assert max(sizes) <= SLICE < COUNT
    found = [each.clone() for each in gradients(body, head)]
    body.zero_grad()
    head.zero_grad()
    whole = LOSSES["forward_kl"](rows(slice(None), body(given)))
    (whole * weights).sum().backward()
    torch.testing.assert_close(losses, whole.detach())
    torch.testing.assert_close(found, gradients(body, head))
    body.zero_grad()
    (LOSSES["forward_kl"](rows(slice(None), body(given))) * (1 - weights)).sum().backward()
    assert not torch.allclose(found[0], body.weight.grad)


def test_without_weights_it_is_the_mean():
    body, _, given, rows, _ = make()
    _, gradient = gradient_in_slices(body(given), rows, LOSSES["total_variation"])
    states = body(given).detach().requires_grad_()
    LOSSES["total_variation"](rows(slice(None), states)).mean().backward()
    torch.testing.assert_close(gradient, states.grad)


def test_no_positions_are_no_error():
    body, _, given, rows, _ = make()
    assert backward_in_slices(body(given[:0]), rows, LOSSES["forward_kl"]).shape == (0,)
    assert not body.weight.grad.any()
    assert losses_in_slices(given[:0], rows, LOSSES["forward_kl"]).shape == (0,)


def test_losses_alone_need_no_gradient():
    body, _, given, rows, sizes = make()
    losses = losses_in_slices(body(given), rows, LOSSES["reverse_kl"])
    assert max(sizes) <= SLICE
    assert not losses.requires_grad
    whole = LOSSES["reverse_kl"](rows(slice(None), body(given)))
    torch.testing.assert_close(losses, whole.detach())
