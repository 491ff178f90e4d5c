"""The bound by which self-speculation's benchmark projects acceptance onto a large target."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vllm_specplus.bench.methods import parse_methods

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from self_speculation import LLAMA_2_7B, best_projected, method, projected, shares


def test_the_target_has_seven_billion_parameters():
    total = LLAMA_2_7B.layers * LLAMA_2_7B.layer + 2 * LLAMA_2_7B.head
    assert total == pytest.approx(6.74e9, rel=0.01)


def test_a_draft_of_all_layers_gains_nothing():
    """Every draft is right, and takes as long as the target."""
    assert projected([1.0] * 4, 1.0) == pytest.approx(1.0)
    assert projected([], 0.5) == 1.0


def test_a_draft_of_no_layers_costs_the_output_layer():
    cost = LLAMA_2_7B.seconds(0.0) / LLAMA_2_7B.seconds(1.0)
    assert projected([0.9, 0.8], 0.0) == pytest.approx(2.7 / (1 + 2 * cost))


def test_break_even_is_that_of_the_card():
    """c = 0.55, four levels: drafts pay above an acceptance of 0.775 (its output layer aside)."""

    def chain(a: float) -> list[float]:
        return [a, a**2, a**3, a**4]

    assert projected(chain(0.75), 0.55) < 1 < projected(chain(0.81), 0.55)


def test_the_best_number_of_levels_is_taken():
    found = best_projected([0.9, 0.1, 0.01], 0.3)
    assert found["levels"] == 1
    assert found["speed"] == projected([0.9], 0.3)
    assert best_projected([0.01], 0.9) == {"levels": 0, "speed": 1.0, "share_of_layers": 0.9}


def test_shares_of_layers():
    assert shares({"method": "layer_skip"}, 32) == [1 - 27 / 64]
    assert shares({"method": "early_exit"}, 32) == [0.25, 0.75]
    assert shares({"method": "early_exit", "exit_layers": [4, 8]}, 16) == [0.25, 0.5]


def test_methods_are_those_that_bench_reads():
    keys = {"shape": "chain", "stop": {"rule": "confidence"}, "num_speculative_tokens": 3}
    (spec,) = parse_methods(method("layer_skip", **keys))
    assert spec.speculative_config == {"method": "layer_skip"} | keys
