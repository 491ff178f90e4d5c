"""benchmarks/replicas.py: how requests are spread, and what replicas of several loads sum up to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import replicas

from vllm_specplus.metrics import COUNTERS

OF_LOAD = {
    2: {"none": 10.0, "controller": 15.0, "nodes_per_request": 8.0},
    4: {"none": 18.0, "controller": 18.0, "nodes_per_request": 0.0},
}


def test_every_request_is_somewhere():
    assert replicas.routed("evenly", 10, 3) == {3: 10}
    spread = replicas.routed("at random", 100, 5)
    assert sum(spread.values()) == 100
    assert sum(load * count for load, count in spread.items()) == 500
    assert len(spread) > 3


def test_replicas_are_summed_as_often_as_there_are():
    found = replicas.summed(replicas.Counter({0: 5, 2: 3, 4: 1}), OF_LOAD)
    assert found["tokens_per_s"] == 3 * 15 + 18
    assert found["to_none"] == pytest.approx(63 / 48)
    assert found["nodes_per_request"]["p50"] == 8.0
    assert found["least_and_most_in_flight"] == [0, 4]


def test_metrics_are_a_series_per_counter_and_replica():
    found = replicas.scraped(1000)
    assert found["series_per_engine"] == len(COUNTERS)
    assert found["series"] == 1000 * len(COUNTERS)
    assert found["bytes"] > 50 * found["series"]
