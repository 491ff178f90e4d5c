from __future__ import annotations

import numpy as np

from vllm_specplus.metrics import COUNTERS, Counters, Increments


def test_increments_are_what_came_since_they_were_read():
    counters, increments = Counters(), Increments()
    assert increments.read(counters.values) == {}
    counters.add("nodes_drafted", 7)
    counters.add("draft_seconds", 0.125)
    assert increments.read(counters.values) == {
        "nodes_drafted": 7_000_000_000,
        "draft_seconds": 125_000_000,
    }
    counters.add("nodes_drafted")
    assert increments.read(counters.values) == {"nodes_drafted": 1_000_000_000}
    assert increments.read(counters.values) == {}


def test_increments_of_a_long_time_sum_up():
    rng = np.random.default_rng(0)
    counters, increments = Counters(), Increments()
    counters.values += rng.integers(0, 1 << 32, len(COUNTERS))  # a long-lived engine
    sums = dict.fromkeys(COUNTERS, 0)
    increments.read(counters.values)
    before = counters.as_dict()
    for _ in range(1000):
        counters.values += rng.integers(0, 600, len(COUNTERS))
        for name, count in increments.read(counters.values).items():
            assert count % 1_000_000_000 == 0  # whole numbers stay whole
            sums[name] += count
    for name, value in counters.as_dict().items():
        assert sums[name] * Increments.UNIT == value - before[name]
