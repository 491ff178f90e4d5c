"""The report of texts in batches: its figures, and what it takes for an error."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import batch_equality
from batch_equality import BEYOND, compared

REFERENCE = [
    {"ids": [5, 6, 7, 8], "top": [{"5": -0.1}, {"6": -0.7, "9": -0.7005}, {"7": -0.1}, {"8": 0.0}]},
    {"ids": [1, 2], "top": [{"1": -0.1, "3": -2.1}, {"2": -0.1}]},
]


def test_equal_answers():
    report = compared(REFERENCE, [[5, 6, 7, 8], [1, 2]], 0.001)
    assert report["exact"] == report["partial"] == 1.0
    assert report["differences"] == []


def test_a_near_tie_is_no_error_and_another_token_is():
    report = compared(REFERENCE, [[5, 9, 7, 8], [3, 2]], 0.001)
    assert (report["exact"], report["large_differences"]) == (0.0, 1)
    assert report["partial"] == (1 / 4 + 0) / 2
    near, far = report["differences"]
    assert (near["prompt"], near["position"]) == (0, 1)
    assert near["nats_below_best"] == pytest.approx(0.0005)
    assert far["nats_below_best"] == pytest.approx(2.0)


@pytest.mark.parametrize("given", [[5, 6, 7], [5, 6, 7, 8, 9], [5, 6, 7, 4]])
def test_an_early_or_late_end_and_an_unheard_token_are_errors(given):
    report = compared(REFERENCE, [given, [1, 2]], 0.001)
    assert report["large_differences"] == 1
    assert report["differences"][0]["nats_below_best"] == BEYOND
    assert report["exact"] == 0.5


def test_as_many_requests_are_in_flight_as_asked(monkeypatch):
    class Engine:
        """Every request takes three steps."""

        def __init__(self):
            self.left, self.most = {}, 0

        def add_request(self, name, prompt, params):
            self.left[name] = 3
            self.most = max(self.most, len(self.left))

        def step(self):
            self.left = {name: left - 1 for name, left in self.left.items()}
            done = [name for name, left in self.left.items() if not left]
            self.left = {name: left for name, left in self.left.items() if left}
            output = SimpleNamespace
            return [output(request_id=n, finished=True, outputs=[f"text {n}"]) for n in done]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(TokensPrompt=dict))
    engine = Engine()
    llm = SimpleNamespace(llm_engine=engine)
    answers = batch_equality.serve(llm, [[1]] * 10, None, 4)
    assert answers == [f"text {number}" for number in range(10)]
    assert engine.most == 4
