"""Acceptance estimates: labels from the text, frequencies by source, offsets by request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.control.acceptance import AcceptanceEstimator, label_nodes, look_up, survivals
from vllm_specplus.step import DEPTHS, Source, prior_tables

SOURCES = (Source("good", "rows", 0.6), Source("bad", "rows", 0.1), Source("match", "match", 0.5))


def i32(*values):
    return np.array(values, np.int32)


@st.composite
def trees(draw, most=12, tokens=4):
    count = draw(st.integers(1, most))
    parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
    return i32(*(draw(st.integers(0, tokens - 1)) for _ in range(count))), i32(*parents)


@given(trees(), st.lists(st.integers(0, 3), min_size=2, max_size=12), st.data())
@settings(deadline=None)
def test_labels_equal_the_definition(tree, text, data):
    """A node is decided when its path up to its parent is the text and its place is known."""
    tokens, parents = tree
    drafted_at = data.draw(st.integers(1, len(text)))
    labels, depths = label_nodes(tokens, parents, i32(*text), drafted_at, len(text))
    for i in range(len(tokens)):
        path, node = [], i
        while node >= 0:
            path.insert(0, int(tokens[node]))
            node = int(parents[node])
        assert depths[i] == len(path)
        ahead = text[drafted_at:]
        if path[:-1] != ahead[: len(path) - 1] or len(path) > len(ahead):
            assert labels[i] == -1
        else:
            assert labels[i] == (path[-1] == ahead[len(path) - 1])


@given(trees(), st.integers(0, 100))
@settings(deadline=None)
def test_survival_is_the_product_along_the_path(tree, seed):
    _, parents = tree
    rng = np.random.default_rng(seed)
    sources = rng.integers(0, 3, len(parents)).astype(np.int32)
    tables = rng.random((2, DEPTHS, 3)).astype(np.float32)
    starts = i32(0, 0, len(parents))  # the first request has no tree
    acceptance, depths = look_up(parents, sources, starts, tables)
    out = survivals(parents, starts, acceptance)
    for i in range(len(parents)):
        expected, node = 1.0, i
        while node >= 0:
            expected *= tables[1, min(depths[node], DEPTHS) - 1, sources[node]]
            node = parents[node]
        assert out[i] == pytest.approx(expected, rel=1e-5)


class World:
    """Feeds an estimator single nodes that are accepted with a given probability."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.estimator = AcceptanceEstimator(SOURCES)

    def observe(self, request, source, probability, times):
        for _ in range(times):
            hit = self.rng.random() < probability
            text = i32(7, 1 if hit else 0).reshape(1, -1)
            self.estimator.learn(
                i32(1), i32(-1), i32(source), i32(0, 1), i32(1), [request], i32(0), text, i32(2)
            )


def test_priors_hold_until_something_is_seen():
    estimator = AcceptanceEstimator(SOURCES)
    assert estimator.tables(["a", "b"]) == pytest.approx(prior_tables(SOURCES, 2))
    assert prior_tables(SOURCES, 2)[1, 3].tolist() == pytest.approx([0.6, 0.1, 0.5])


def test_global_estimates_approach_the_truth():
    world = World()
    for i in range(100):  # many short requests
        world.observe(f"r{i}", 0, 0.3, 10)
        world.estimator.forget(f"r{i}")
    tables = world.estimator.tables(["new"])
    assert tables[0, 0, 0] == pytest.approx(0.3, abs=0.06)
    assert tables[0, 0, 2] == pytest.approx(0.5)  # another source: nothing was seen
    assert tables[0, 1, 0] == pytest.approx(0.6)  # another depth


def test_a_request_has_estimates_of_its_own():
    world = World()
    for _ in range(40):
        world.observe("easy", 0, 0.95, 2)
        world.observe("hard", 0, 0.1, 2)
    easy, hard, other = world.estimator.tables(["easy", "hard", "other"])[:, 0, :2]
    assert easy[0] > other[0] + 0.15 > hard[0] + 0.3
    assert easy[1] > other[1] > hard[1]  # the whole group of sources moves
    match = world.estimator.tables(["easy", "hard"])[:, 0, 2]
    assert match.tolist() == pytest.approx([0.5, 0.5])  # other groups do not


def test_a_change_within_a_request_is_followed():
    world = World()
    world.observe("r", 0, 0.9, 100)
    assert world.estimator.tables(["r"])[0, 0, 0] > 0.7
    world.observe("r", 0, 0.05, 30)
    assert world.estimator.tables(["r"])[0, 0, 0] < 0.35
    world.observe("r", 0, 0.95, 30)
    assert world.estimator.tables(["r"])[0, 0, 0] > 0.6


def test_offsets_are_forgotten_with_the_request():
    world = World()
    world.observe("r", 0, 0.99, 50)
    before = world.estimator.tables(["r", "new"])[:, 0, 0]
    assert before[0] > before[1]
    world.estimator.forget("r")
    world.estimator.forget("never seen")
    world.observe("next", 1, 0.1, 1)  # takes the freed slot
    after = world.estimator.tables(["next", "new"])
    assert after[0, 0, 2] == after[1, 0, 2]


def test_only_observed_nodes_are_counted():
    """Below a wrong token nothing is known: its children must not count as rejected."""
    estimator = AcceptanceEstimator(SOURCES)
    tokens, parents = i32(1, 2, 3), i32(-1, 0, 1)  # the text goes 9: node 0 is wrong
    sources, starts = i32(0, 0, 0), i32(0, 3)
    text = i32(5, 9, 2, 3).reshape(1, -1)
    seen = estimator.learn(
        tokens, parents, sources, starts, i32(1), ["r"], i32(0), text, i32(4)
    )  # fmt: skip
    assert seen == 1
    fresh = AcceptanceEstimator(SOURCES).tables(["x"])
    assert estimator.tables(["x"])[0, 1:] == pytest.approx(fresh[0, 1:])
    assert estimator.tables(["x"])[0, 0, 0] < 0.6


def test_requests_that_are_gone_are_not_labelled():
    estimator = AcceptanceEstimator(SOURCES)
    args = (i32(1, 1), i32(-1, -1), i32(0, 0), i32(0, 1, 2), i32(1, 1), ["gone", "here"])
    text = i32(7, 1).reshape(1, -1)
    assert estimator.learn(*args, i32(-1, 0), text, i32(2)) == 1


def test_finished_requests_leave_nothing_behind():
    """Their last trees are looked at once more, after they were forgotten."""
    estimator = AcceptanceEstimator(SOURCES)
    text = i32(7, 1).reshape(1, -1)
    for i in range(100):
        args = (i32(1), i32(-1), i32(0), i32(0, 1), i32(1), [f"r{i}"])
        estimator.learn(*args, i32(0), text, i32(2))
        estimator.forget(f"r{i}")
        estimator.learn(*args, i32(-1), text, i32(2))
    assert (estimator._requests.find([f"r{i}" for i in range(100)]) == -1).all()
    assert len(estimator._requests.arrays[0]) == 16


@pytest.mark.parametrize("prior", [0.0, 1.0, 1.2])
def test_impossible_priors_are_refused(prior):
    with pytest.raises(ValueError, match=r"source 'x': prior .* is not in \(0, 1\)"):
        AcceptanceEstimator([Source("x", "x", prior)])
