"""Acceptance at a given rate."""

from __future__ import annotations

import numpy as np
import pytest

from tests.samplers.test_relaxed import make_rows
from vllm_specplus.samplers import lossless
from vllm_specplus.samplers.synthetic import Synthetic

#: Root 1 with children 5 and 6; below 5 a chain 7, 8.
TREE = make_rows([1, 5, 6, 7, 8], [-1, 0, 0, 1, 3], [0, 5])


def text(rate: float, sampled: list[int], stop=frozenset()) -> list[int]:
    out, count = Synthetic(rate=rate).choose(TREE, np.array(sampled, np.int32), [stop])
    kept = lossless.accept(TREE, out)
    path = kept.path[0, : kept.lengths[0]]
    assert count == (out[path] != np.array(sampled)[path])[:-1].sum()
    return kept.output[0, : kept.lengths[0]].tolist()


def test_all_or_nothing():
    draws = [6, 7, 2, 3, 4]
    assert text(1.0, draws) == [5, 7, 8, 4]
    assert text(0.0, draws) == [0]  # also where the target drew what a node holds
    assert text(0.0, [9, 7, 2, 3, 4]) == [9]
    assert text(1.0, draws, stop=frozenset({7})) == [5, 0]  # nothing ends before its time
    assert text(0.0, draws, stop=frozenset({0, 2})) == [1]
    assert text(1.0, draws, stop=None) == [6, 2]  # a request that is verified losslessly


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_chains_are_as_long_as_the_rate_says(rate):
    count, depth = 4000, 4
    rows = make_rows([1, 5, 6, 7, 8] * count, [-1, 0, 1, 2, 3] * count, range(0, 5 * count + 1, 5))
    sampled = np.random.default_rng(1).integers(0, 10, len(rows.tokens)).astype(np.int32)
    out, _ = Synthetic(rate=rate).choose(rows, sampled, [frozenset()] * count)
    lengths = lossless.accept(rows, out).lengths
    expected = sum(rate**level for level in range(depth + 1))
    assert lengths.mean() == pytest.approx(expected, abs=0.05)
