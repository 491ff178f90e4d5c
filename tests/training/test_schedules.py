"""The learning rate and the loss in the course of a run."""

from __future__ import annotations

import pytest
import torch

from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.losses import LOSSES, Rows
from vllm_specplus.training.schedules import LEAST_RATE, WARM_UP, Phases, learning_rate

ROWS = Rows(torch.randn(2, 5), torch.randn(2, 5), torch.zeros(2, dtype=torch.long))


def test_the_rate_rises_then_falls():
    assert learning_rate(0.0) == LEAST_RATE
    assert learning_rate(WARM_UP / 2) == pytest.approx(0.5)
    assert learning_rate(WARM_UP) > 0.99
    assert learning_rate(0.5) == pytest.approx(0.5)
    assert learning_rate(1.0) == LEAST_RATE
    assert learning_rate(1.2) == LEAST_RATE
    rates = [learning_rate(i / 1000) for i in range(60, 1000)]
    assert rates == sorted(rates, reverse=True)


def test_the_loss_changes_towards_the_end():
    phases = Phases.of("forward_kl", {"total_variation": 2.0}, 0.4)
    for done, expected in (
        (0.0, LOSSES["forward_kl"](ROWS)), (0.599, LOSSES["forward_kl"](ROWS)),
        (0.601, 2 * LOSSES["total_variation"](ROWS)), (1.0, 2 * LOSSES["total_variation"](ROWS)),
    ):  # fmt: skip
        torch.testing.assert_close(phases.at(done)(ROWS), expected)


@pytest.mark.parametrize(("share", "name"), [(0.0, "forward_kl"), (1.0, "total_variation")])
def test_there_may_be_one_loss_only(share, name):
    phases = Phases.of("forward_kl", "total_variation", share)
    for done in (0.0, 0.5, 1.0):
        assert phases.at(done)(ROWS).equal(LOSSES[name](ROWS))


def test_both_losses_have_to_be_some():
    with pytest.raises(TrainingError, match="unknown loss"):
        Phases.of("forward_kl", "kl", 0.4)
