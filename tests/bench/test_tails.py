"""Percentiles of two methods over the same requests."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.bench.tails import FEWEST, compare


def times(count: int, factor: float = 1.0, seed: int = 0) -> dict[tuple[int, str], float]:
    values = np.random.default_rng(seed).lognormal(size=count)
    return {(0, str(i)): factor * value for i, value in enumerate(values.tolist())}


def test_what_is_slower_by_a_factor_is_so_at_every_percentile():
    """In every resample too: each question is drawn with both of its times."""
    tails = compare(times(300, 1.25), times(300))
    assert tails.requests == 300
    for ratio in (tails.p50, tails.p95, tails.p99):
        assert list(ratio.model_dump().values()) == pytest.approx([1.25] * 4)


def test_unlike_requests_have_an_interval_around_the_ratio():
    tails = compare(times(400, seed=1), times(400, seed=2))
    assert tails.p99.low < tails.p99.ratio < tails.p99.high
    assert tails.p50.high - tails.p50.low < tails.p99.high - tails.p99.low


def test_only_requests_of_both_count_and_few_have_no_tail():
    assert compare(times(FEWEST + 5), times(FEWEST)).requests == FEWEST
    assert compare(times(FEWEST + 5), times(FEWEST - 1)) is None
