"""Whether to wait for drafts: against the rates of both policies, written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vllm_specplus.overlap.pace import FIRST_SECONDS, Average, Pace

#: Seconds of a step and of drafting, expected tokens, and rates at which outcomes are foreseen
#: after steps with trees and without.
WORLDS = list(
    itertools.product((0.02,), (0.002, 0.01, 0.03, 0.08), (0.3, 1.0, 2.5), (0.1, 0.6), (0.3, 0.9))
)


def tokens_per_second(world: tuple, waits: bool) -> float:
    """Of one request, for ever: each step's outcome was foreseen or not."""
    step, drafting, expected, after, before = world
    if waits:  # every step verifies a tree
        return (1 + expected) / (step + (1 - after) * drafting)
    # Share of steps without trees: they follow any step that was not foreseen.
    bare = (1 - after) / (1 - after + before)
    return (bare + (1 - bare) * (1 + expected)) / step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pace_of(world: tuple, rate: float, paper: bool = False) -> Pace:
    """A pace that has seen a world for long, at a rate of tokens per second."""
    _, drafting, _, after, before = world
    clock = Clock()
    pace = Pace(paper, clock)
    for i in range(400):
        pace.stepped({"a": 10 * i})
        clock.now += 10 / rate
        pace.passed(drafting / 4)  # three levels
        for verified, share in ((True, after), (False, before)):
            pace.answered(i % 10 < round(10 * share), verified)
    # Averages of the newest ten are not exactly the shares.
    pace._foreseen[True].value, pace._foreseen[False].value = after, before
    return pace


@pytest.mark.parametrize("rate_of", [True, False])
def test_waiting_is_chosen_where_it_gives_more_tokens_per_second(rate_of):
    """Whichever of both is done at present, the rule improves on it or keeps it."""
    chosen = {True: 0, False: 0}
    for world in WORLDS:
        rates = {waits: tokens_per_second(world, waits) for waits in (True, False)}
        pace = pace_of(world, rates[rate_of])
        (token,) = pace.worth(np.ones((1, 1)), np.array([1]))
        waits = world[2] * token > pace.price(3)
        chosen[waits] += 1
        better = rates[True] > rates[False]
        if rates[True] != pytest.approx(rates[False], rel=1e-3):
            assert waits == better, world
    assert min(chosen.values()) > 5


def test_the_worth_of_a_tree_is_its_expected_tokens():
    pace = pace_of((0.02, 0.01, 1.0, 0.5, 0.5), rate=50.0)
    followed = np.array([[0.5, 0.4], [0.9, 0.9]], np.float32)
    worth = pace.worth(followed, np.array([3, 1]))
    assert worth == pytest.approx(np.array([0.5 + 0.2 + 0.08, 0.9]) / 50, rel=1e-5)
    assert pace.worth(followed, np.array([0, 0])).tolist() == [0, 0]


def test_the_paper_never_waits_for_what_was_not_foreseen():
    assert pace_of((0.02, 0.001, 5.0, 0.0, 0.0), 10.0, paper=True).price(3) == math.inf


def test_nothing_known_is_as_without_overlap():
    pace = Pace(paper=False)
    assert pace.price(3) < 0
    assert pace.limit(3) == FIRST_SECONDS
    assert pace.charged(0.25, 3) == 0.25


def test_the_engine_waits_as_long_as_the_slowest_of_the_latest_rounds():
    pace = Pace(paper=False)
    for seconds in (0.5, *[0.01] * 15, 0.02):
        pace.passed(seconds)
        pace.passed(None)
    assert pace.limit(2) == pytest.approx(3 * 0.02)


def test_what_is_hidden_is_not_charged():
    """Of ten steps nine were foreseen: a tenth of drafting is charged, whatever a step took."""
    pace = Pace(paper=False)
    for i in range(500):
        pace.passed(0.01)
        pace.waited(0.04 if i % 10 == 0 else 0.0, depth=3)
    for seconds in (0.0, 0.04):
        assert pace.charged(seconds, 3) == pytest.approx(0.1 * 0.04, rel=0.75)
    pace.waited(9.0, 3)  # no more than all of it
    assert pace.charged(0.0, 3) < 0.3 * 0.04


def test_an_idle_engine_is_no_slow_step():
    clock = Clock()
    pace = Pace(False, clock)
    for i in range(20):
        pace.stepped({"a": 5 * i})
        clock.now += 0.1
    clock.now += 60
    pace.stepped({"a": 5 * 20, "b": 7})
    assert pace._step.value == pytest.approx(0.1)
    assert pace._tokens.value == pytest.approx(5)


def test_an_average_begins_with_its_first_value():
    average = Average(0.5)
    average.add(3.0)
    assert average.value == 3.0
    average.add(1.0)
    assert average.value == 2.0
