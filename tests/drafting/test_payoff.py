"""Sources that take more than they bring rest, and come back when they pay again."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.drafting.payoff import LEAST_TOKENS, RESTS, TRIAL, Payoff, credit
from vllm_specplus.step import Source, bare_step
from vllm_specplus.tree import DraftBatch

SOURCES = (Source("any", "any", 0.5),)
STEP_S = 0.010
TEXT = np.arange(1 << 16, dtype=np.int32)[None]


class Loop:
    """One request whose next tokens are 1, 2, 3, ...; two sources, of which one is dear."""

    def __init__(self):
        self.payoff = Payoff(2)
        self.known = 1
        self.asked_dear = []

    def step(self, cheap: list[int], dear: list[int], dear_s: float, learning_s: float = 0.0):
        """Both sources draft a chain if asked: these tokens beyond the next one are right."""
        step = bare_step(SOURCES, TEXT, 8)
        step.num_tokens[:] = self.known
        self.payoff.learn(step, STEP_S)
        asked, _ = self.payoff.ask()
        self.asked_dear.append(bool(asked[1]))
        chains = [cheap if asked[0] else [], dear if asked[1] else []]
        longest = max(chains, key=len)
        finders = [sum(1 << m for m in range(2) if i < len(chains[m])) for i in range(len(longest))]
        tokens = np.array([self.known + i for i in longest], np.int32)
        drafts = DraftBatch(
            tokens,
            np.arange(-1, len(tokens) - 1, dtype=np.int32),
            np.array([len(tokens)], np.int32),
        )
        times = np.array([1e-6, dear_s if asked[1] else learning_s])
        self.payoff.drafted(step, times, drafts, np.array(finders, np.int32))
        self.known += 1 + len(tokens)

    def run(self, steps: int, *args, **keys) -> float:
        """Share of these steps in which the dear source was asked."""
        for _ in range(steps):
            self.step(*args, **keys)
        return float(np.mean(self.asked_dear[-steps:]))


def test_a_node_is_credited_to_the_cheapest_of_those_who_found_it():
    finders = np.array([0b01, 0b11, 0b10, 0b110], np.int32)
    assert credit(finders, np.array([1, 0, 2])).tolist() == [0, 1, 1, 1]
    assert credit(finders, np.array([2, 0, 1])).tolist() == [0, 0, 1, 2]


def test_a_source_that_brings_less_than_it_takes_rests():
    loop = Loop()
    loop.run(100, [0], [0], 0.003)  # 30 % of a step, and nothing of its own
    assert loop.payoff.resting.tolist() == [False, True]
    assert loop.run(3000, [0], [0], 0.003) < 2 * TRIAL / RESTS[1]


def test_one_that_brings_more_is_always_asked():
    loop = Loop()
    # Of four tokens a step it alone brings two.
    assert loop.run(1000, [0], [0, 1, 2], 0.003) == 1.0


def test_two_that_find_the_same_do_not_both_rest():
    loop = Loop()
    loop.payoff._took[:] = 0.1  # both take a tenth
    loop.payoff._seconds[:] = 1.0
    loop.run(500, [0, 1], [0, 1], 0.001)
    assert loop.payoff.resting.tolist() == [False, True]


def test_it_comes_back_when_traffic_changes():
    loop = Loop()
    loop.run(3000, [0], [0], 0.003)
    assert loop.payoff.resting[1]
    loop.run(RESTS[1] + TRIAL + 1, [0], [0, 1, 2], 0.003)
    assert not loop.payoff.resting[1]
    assert loop.run(500, [0], [0, 1, 2], 0.003) == 1.0


def test_learning_is_not_saved_by_rest():
    """It takes 30 %, nearly all for learning, and brings a tenth of the tokens."""
    loop = Loop()
    keys = {"dear_s": 0.003, "learning_s": 0.0028}
    for i in range(4000):
        dear = [0, 1] if i % 6 == 0 else [0]
        loop.step([0], dear, **keys)
    assert np.mean(loop.asked_dear[-2000:]) > 0.8


def test_nothing_is_judged_by_a_few_tokens():
    loop = Loop()
    loop.run(int(LEAST_TOKENS) // 2 - 2, [0], [0], 0.009)
    assert not loop.payoff.resting.any()


@pytest.mark.parametrize("gap", [0.01, 100.0])
def test_a_pause_is_no_step(gap):
    """Nobody asks for a while: the source's share of the time is not smaller for that."""
    loop = Loop()
    loop.run(200, [0], [0, 1, 2], 0.003)
    share = loop.payoff._takes()[1]
    step = bare_step(SOURCES, TEXT, 8)
    step.num_tokens[:] = loop.known
    loop.payoff.learn(step, gap)
    assert loop.payoff._takes()[1] == pytest.approx(share, rel=0.1)


def test_who_is_gone_teaches_nothing():
    """Its id comes again, with another text."""
    loop = Loop()
    loop.run(100, [0], [0, 1, 2], 0.003)
    brought = loop.payoff._brought.copy()
    loop.payoff.forget("request 0")
    step = bare_step(SOURCES, TEXT, 8)
    step.num_tokens[:] = loop.known
    loop.payoff.learn(step, STEP_S)
    assert loop.payoff._brought.tolist() == brought.tolist()
