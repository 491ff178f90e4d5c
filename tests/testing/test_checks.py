"""The checks for authors fail where they should."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus import testing
from vllm_specplus.testing import distribution


def results(monkeypatch, *outcomes):
    left = list(outcomes)
    monkeypatch.setattr(testing.models, "build_model", lambda *args: "model")
    monkeypatch.setattr(testing.engine, "run", lambda *args: left.pop(0))


def outcome(ids, accepted=1, drafted=1, failures=0):
    counters = {
        "nodes_accepted": accepted, "nodes_drafted": drafted, "draft_failures": failures,
    }  # fmt: skip
    return {"batches": [[{"ids": [ids]}]], "counters": counters, "preemptions": 1}


def test_equal_texts_pass_and_the_first_difference_is_told(monkeypatch, tmp_path):
    results(monkeypatch, outcome([1, 2, 3]), outcome([1, 2, 3]))
    testing.assert_lossless_greedy({"method": "mine"}, tmp_path)
    results(monkeypatch, outcome([1, 2, 3]), outcome([1, 2, 4]))
    with pytest.raises(AssertionError, match=r"request 0 of batch 0 .* token 2 on: \[4\] instead"):
        testing.assert_lossless_greedy({"method": "mine"}, tmp_path)
    results(monkeypatch, outcome([1, 2, 3]), outcome([1, 2]))
    with pytest.raises(AssertionError, match="token 2 on"):
        testing.assert_lossless_greedy({"method": "mine"}, tmp_path)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"accepted": 0}, "no draft was accepted"),
        ({"drafted": 0}, "nothing was drafted"),
        ({"failures": 1}, "drafting failed"),
    ],
)
def test_a_check_that_shows_nothing_fails(monkeypatch, tmp_path, counts, words):
    results(monkeypatch, outcome([1]), outcome([1], **counts))
    with pytest.raises(AssertionError, match=words):
        testing.assert_lossless_greedy({"method": "mine"}, tmp_path)


def test_chi_square_tells_the_right_distribution_from_another():
    rng = np.random.default_rng(0)
    law = {(0,): 0.5, (1,): 0.3, (2,): 0.2}
    right = [(int(i),) for i in rng.choice(3, 5000, p=list(law.values()))]
    wrong = [(int(i),) for i in rng.choice(3, 5000, p=[0.45, 0.35, 0.2])]
    assert distribution.chi_square(law, right) > 1e-3
    assert distribution.chi_square(law, wrong) < 1e-6
    assert distribution.chi_square(law, [*right, (7,)]) == 0.0
