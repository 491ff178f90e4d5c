"""For whom a step may become longer: each objective in a simulated world, and its limits."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tests.control.test_controller import CURVE, NOTHING, World
from vllm_specplus.control.ledger import Ledger
from vllm_specplus.control.objectives import Slo, make_objective
from vllm_specplus.control.settings import GoodputControl
from vllm_specplus.metrics import Counters
from vllm_specplus.step import StepContext

#: Of 8 requests two can be drafted for; rows are dear from the eighth on.
ACCEPTANCE = np.array([0.95, 0.95, 0, 0, 0, 0, 0, 0])
PLAIN = float(CURVE(8))


def run(**control) -> tuple[np.ndarray, float]:
    """Seconds per token of each request over those of plain decoding, float64 [8]; tokens per
    second over plain decoding's."""
    world = World(GoodputControl(**control), requests=8)
    world.run(200, ACCEPTANCE)  # what it does not know yet costs it some steps
    known, tokens, clock = world.known.copy(), world.tokens, world.clock
    world.run(600, ACCEPTANCE)
    seconds = world.clock - clock
    return seconds / (world.known - known) / PLAIN, (world.tokens - tokens) / seconds / 8 * PLAIN


def test_throughput_lets_the_slow_ones_pay():
    slowness, speed = run(objective="throughput")
    assert speed > 1.2
    assert slowness[2:].min() > 1.2
    assert slowness[:2].max() < 0.6


def test_latency_leaves_nobody_slower_but_for_the_margin():
    slowness, speed = run()
    assert slowness.max() < 1.05
    assert slowness[:2].max() < 0.95
    assert speed > 1.02


def test_a_target_is_kept_and_what_is_left_is_used():
    """15 % above plain decoding: more than the margin of "latency", less than anything goes."""
    slowness, speed = run(objective="slo", tpot_ms=1150 * PLAIN)
    assert 1.05 < slowness.max() < 1.18
    assert run()[1] < speed < run(objective="throughput")[1]


def make_step(**more) -> StepContext:
    return StepContext(
        ["a", "b"], np.zeros((2, 9), np.int32), np.full(2, 9, np.int32), np.full(2, 4, np.int32),
        np.zeros(2, bool), NOTHING, **more,
    )  # fmt: skip


def test_a_request_may_set_its_own_target():
    slo = make_objective(GoodputControl(objective="slo", tpot_ms=30.0), Ledger(), Counters())
    limits = slo.limits(make_step(tpot_targets=np.array([np.nan, 0.1])), 0.01, 0.0)
    assert limits.seconds.tolist() == [0.03, 0.1]
    assert limits.per_token.tolist() == [0.03, 0.1]
    assert limits.ceiling == np.inf


def test_without_a_target_anything_goes_for_that_request():
    slo = make_objective(GoodputControl(objective="slo", ttft_ms=500.0), Ledger(), Counters())
    limits = slo.limits(make_step(), 0.01, 0.3)
    assert limits.seconds.tolist() == [np.inf, np.inf]
    assert limits.ceiling == pytest.approx(0.1)  # two steps, and the reading of a prompt


def test_who_misses_the_target_undrafted_is_not_made_slower():
    slo = make_objective(GoodputControl(objective="slo", tpot_ms=5.0), Ledger(), Counters())
    limits = slo.limits(make_step(), 0.01, 0.0)
    assert limits.seconds.tolist() == limits.per_token.tolist() == [0.01, 0.01]


def test_missed_targets_are_counted_and_told_once(caplog):
    ledger, counters = Ledger(), Counters()
    slo = Slo(GoodputControl(objective="slo", tpot_ms=5.0), ledger, counters)
    with caplog.at_level(logging.WARNING, "vllm.specplus"):
        for seconds in (0.004, 0.02, 0.03):
            ledger.produced(["a", "b"], np.full(2, 5), None)
            ledger.produced(["a", "b"], np.full(2, 6), None)
            ledger.took(seconds, seconds, 0.0)
            slo.limits(make_step(), seconds, 0.0)
            slo.ended("a")
            for name in "ab":
                ledger.forget(name)
    assert counters["requests_above_target"] == 2
    (message,) = [record.getMessage() for record in caplog.records]
    assert "took 20.0 ms per token, its target is 5.0 ms" in message


def test_a_request_of_one_token_misses_no_target():
    """Nor does one without a target, or one that nobody knows."""
    ledger, counters = Ledger(), Counters()
    slo = Slo(GoodputControl(objective="slo", ttft_ms=5.0), ledger, counters)
    ledger.produced(["a", "b"], np.full(2, 5), None)
    slo.limits(make_step(tpot_targets=np.array([np.nan, 0.001])), 0.01, 0.0)
    for name in ("a", "b", "nobody"):
        slo.ended(name)
    assert counters["requests_above_target"] == 0
