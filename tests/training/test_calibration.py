"""Thresholds that keep a promise."""

from __future__ import annotations

import pytest
import torch

from vllm_specplus.training.calibration import at_most, calibrate, upper_bound


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (0, 30), (1, 30), (7, 100), (99, 100)])
def test_the_bound_is_clopper_and_pearsons(hits, count):
    stats = pytest.importorskip("scipy.stats")
    assert upper_bound(hits, count) == pytest.approx(stats.beta.ppf(0.95, hits + 1, count - hits))
    assert at_most(hits, count, 0.3) == pytest.approx(stats.binom.cdf(hits, count, 0.3))


def test_nothing_is_known_of_nothing():
    assert upper_bound(0, 0) == upper_bound(3, 3) == 1.0


def test_the_lowest_threshold_that_keeps_it():
    """By trying all of them."""
    rng = torch.Generator().manual_seed(0)
    errors, right = torch.rand(120, generator=rng) ** 2, torch.rand(300, generator=rng) ** 0.5
    errors[10:20] = errors[10]  # equal ones are accepted together
    for risk in (0.03, 0.1, 0.5):
        found = calibrate(errors, right, risk)
        allowed = [
            float(score)
            for score in errors
            if upper_bound(int((errors > float(score)).sum()), 120) <= risk
        ]
        assert found.threshold == min(allowed)
        accepted = int((errors > found.threshold).sum())
        assert found.errors_accepted == accepted / 120
        assert found.errors_accepted_high == upper_bound(accepted, 120) <= risk
        good = int((right > found.threshold).sum())
        assert found.right_accepted == good / 300
        assert found.wrong_share == accepted / (accepted + good)
        assert found.wrong_share_low <= found.wrong_share <= found.wrong_share_high


def test_too_few_errors_promise_nothing():
    """28 without a hit are the fewest for 10 %, since 0.9 ** 28 is above 0.05 and 0.9 ** 29 not."""
    scores = torch.linspace(0, 0.9, 40)
    assert calibrate(scores[:28], scores, 0.1) is None
    assert calibrate(scores[:29], scores, 0.1) is not None
    assert calibrate(torch.zeros(0), scores, 0.1) is None


def test_the_promise_is_kept():
    """Of many calibrations of a judge whose law is known, less than 5 % (and some, for chance)
    accept more errors than they promise."""
    rng, broken, runs = torch.Generator().manual_seed(1), 0, 200
    for _ in range(runs):
        found = calibrate(torch.rand(80, generator=rng), torch.ones(1), 0.2)
        broken += 1 - found.threshold > 0.2  # uniform scores: that share is above it
    assert 0 < broken <= 0.05 * runs + 2 * (0.05 * 0.95 * runs) ** 0.5
