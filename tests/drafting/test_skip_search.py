"""Which layers to leave out: by planted blocks that can be spared, and by traffic that changes."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.drafting import skip_search
from vllm_specplus.drafting.skip_search import BAYES_EVERY, PATIENCE, Block, Fall, SkipSearch

LAYERS, SEEN = 14, 100
#: Of each kind of traffic, the layers whose blocks cost nothing to leave out.
CODE, DIALOGUE = range(3, 7), range(8, 12)


def share(blocks: set[Block], spared: range) -> float:
    """Of right predictions without some ``blocks``: each that is needed costs 6 of 100."""
    return max(1 - 0.06 * sum(layer not in spared for _, layer in blocks), 0.0)


def trial(search: SkipSearch, spared: range) -> None:
    candidate = search.candidate()
    assert len(candidate) == len(search.best)
    assert {layer for _, layer in candidate} <= set(range(1, LAYERS - 1))
    right = round(SEEN * share(candidate, spared))
    if search._form == "swift":
        search.score(candidate, right, SEEN)
    else:
        search.judge(candidate, right, round(SEEN * share(search.best, spared)), SEEN)


def serve(search: SkipSearch, spared: range, rounds: int, told: bool = True) -> float:
    """Draft and try in turn, as an engine does; the acceptance of the last rounds."""
    rng = np.random.default_rng(1)
    drafted = accepted = 0
    for number in range(rounds):
        here = share(search.best, spared)
        right = int((rng.random(6) < here).cumprod().sum())
        if told:
            search.accepted(6, right)
        if number >= rounds - 200:
            drafted += min(right + 1, 6)
            accepted += right
        if not search.resting:
            trial(search, spared)
    return accepted / drafted


def test_the_first_set_is_swifts():
    search = SkipSearch(32, 0.45)
    assert len(search.best) == int(2 * 30 * 0.45) == 27
    assert {layer for _, layer in search.best if layer % 2 == 0} == set()


@pytest.mark.parametrize("form", ["paired", "swift"])
def test_what_does_no_harm_is_found(form):
    """Random sets of a third of 24 blocks hardly ever are all in those eight: neighbours are."""
    search = SkipSearch(LAYERS, 1 / 3, form)
    before = share(search.best, CODE)
    while not search.resting:
        trial(search, CODE)
    found = share(search.best, CODE)
    assert found > before
    if form == "paired":
        assert found == 1.0
        assert search.trials < 500


def test_every_twenty_fifth_candidate_is_bayesian(monkeypatch):
    asked = []
    propose = skip_search.Bayes.propose

    def watched(self):
        asked.append(len(self.values))
        return propose(self)

    monkeypatch.setattr(skip_search.Bayes, "propose", watched)
    search = SkipSearch(LAYERS, 0.5, "swift")
    for _ in range(2 * BAYES_EVERY):
        candidate = search.candidate()
        search.score(candidate, 10, SEEN)
    assert asked == [BAYES_EVERY - 1, 2 * BAYES_EVERY - 1]


def test_swift_keeps_a_record_and_pairs_do_not():
    """A set that was measured on easy text: in pairs, another one may still win."""
    swift, paired = SkipSearch(LAYERS, 0.5, "swift"), SkipSearch(LAYERS, 0.5)
    easy, hard = swift.candidate(), paired.candidate()
    swift.score(easy, 90, SEEN)
    swift.score(swift.candidate(), 60, SEEN)
    assert swift.best == easy
    paired.judge(easy, 90, 50, SEEN)
    paired.judge(hard, 60, 40, SEEN)
    assert paired.best == hard


def test_the_search_gives_up():
    search = SkipSearch(LAYERS, 0.5)
    first = search.best
    while not search.resting:
        search.judge(search.candidate(), 3, 3, 10)
    assert search.trials == PATIENCE
    assert search.best == first


@pytest.mark.parametrize("form", ["paired", "swift"])
def test_other_traffic_is_told_and_learnt(form):
    """Code, then dialogue, which needs what code could spare."""
    search = SkipSearch(LAYERS, 1 / 3, form)
    code = serve(search, CODE, 1500)
    assert search.restarts == 0
    at_first = share(search.best, DIALOGUE)
    dialogue = serve(search, DIALOGUE, 1500)
    assert search.restarts >= 1
    assert dialogue > at_first + 0.05
    if form == "paired":
        assert code > 0.9
        assert dialogue > 0.9


def test_without_being_told_it_rests_for_ever():
    """As the paper's search does: the test before this one can fail."""
    search = SkipSearch(LAYERS, 1 / 3)
    serve(search, CODE, 1500, told=False)
    assert search.resting
    best = search.best
    serve(search, DIALOGUE, 1500, told=False)
    assert search.best == best


def test_a_fall_is_told_soon_and_nothing_else_is():
    rng = np.random.default_rng(0)
    steady = Fall()
    assert not any(steady.observe(float(x)) for x in rng.random(4000) < 0.7)
    falls = Fall()
    assert not any(falls.observe(float(x)) for x in rng.random(500) < 0.85)
    told = [falls.observe(float(x)) for x in rng.random(300) < 0.4]
    assert 20 < told.index(True) < 120
    rises = Fall()
    assert not any(rises.observe(float(x)) for x in rng.random(500) < 0.4)
    assert not any(rises.observe(float(x)) for x in rng.random(500) < 0.9)


def test_what_is_behind_a_rejection_is_not_counted(monkeypatch):
    seen = []
    monkeypatch.setattr(Fall, "observe", lambda self, value: seen.append(value))
    search = SkipSearch(LAYERS, 0.5)
    for drafted, accepted in ((4, 2), (3, 3), (2, 0)):
        search.accepted(drafted, accepted)
    assert seen == [1, 1, 0, 1, 1, 1, 0]
