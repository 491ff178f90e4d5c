"""What may come of a step, against an enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.overlap.toy import V, law
from vllm_specplus.overlap.outcomes import DraftedTree, Outcome, likely_outcomes

HALF = np.full(4, 0.5)


def tree(parents: list[int], tokens: list[int], drawn: bool = False) -> DraftedTree:
    none = np.zeros(len(tokens), np.int32)
    return DraftedTree(
        np.array(tokens, np.int32), np.array(parents, np.int32), none, none - (not drawn)
    )


def opinions(table: np.ndarray, text: list[int], drafted: DraftedTree, k: int) -> tuple:
    """Best tokens and log-probabilities at every place of a tree."""
    places = [[*text, *drafted.path(node)] for node in range(-1, len(drafted))]
    q = np.stack([table[place[-2], place[-1]] for place in places])
    ids = np.argsort(-q, kind="stable")[:, :k]
    return ids, np.log(np.take_along_axis(q, ids, 1))


def probabilities(table: np.ndarray, text: list[int], drafted: DraftedTree) -> dict:
    """By walking every text of enough tokens: probability of each outcome."""
    edges = zip(drafted.parents.tolist(), drafted.tokens.tolist(), strict=True)
    child = {edge: i for i, edge in enumerate(edges)}
    found: dict[Outcome, float] = {}
    for tokens in itertools.product(range(V), repeat=4):
        whole, node, probability = list(text), -1, 1.0
        outcome = None
        for token in tokens:
            probability *= float(table[whole[-2], whole[-1], token])
            if outcome is None:
                below = child.get((node, token))
                if below is None:
                    outcome = Outcome(node, token)
                else:
                    node = below
            whole.append(token)
        assert outcome is not None
        found[outcome] = found.get(outcome, 0.0) + probability
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_most_probable_outcomes_are_those_of_an_enumeration(seed):
    """Of a target that is the draft; all outcomes together are certain."""
    table, text = law(seed), [1, 2]
    drafted = tree([-1, -1, 0, 1, 0, 2], [2, 0, 1, 3, 0, 2])
    exact = probabilities(table, text, drafted)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    ids, log_q = opinions(table, text, drafted, V)
    every = likely_outcomes(drafted, ids, log_q, HALF, 100)
    assert set(every) == set(exact)
    ranked = [exact[each] for each in every]
    assert ranked == sorted(ranked, reverse=True)
    # With as many tokens of each place as can be needed, the best are the same.
    ids, log_q = opinions(table, text, drafted, 3 + 2)
    assert likely_outcomes(drafted, ids, log_q, HALF, 3) == every[:3]


def test_paths_of_drawn_nodes_count_by_how_often_such_are_accepted():
    """What was drawn is there because it was drawn: 0.8, then 0.6, whatever q says of it."""
    table, text = law(3), [0, 3]
    drafted = tree([-1, 0], [2, 1], drawn=True)
    ids, log_q = opinions(table, text, drafted, V)
    every = likely_outcomes(drafted, ids, log_q, np.array([0.8, 0.6]), 100)
    q = {(o.node, o.token): float(table[tuple([*text, *drafted.path(o.node)][-2:])][o.token])
         for o in every}  # fmt: skip
    weight = {-1: 0.2, 0: 0.8 * 0.4, 1: 0.8 * 0.6}
    expected = sorted(every, key=lambda o: -weight[o.node] * q[o.node, o.token])
    assert every == expected
    assert len(every) == 3 + 3 + 4


def test_siblings_that_were_drawn_are_tried_one_after_the_other():
    """Together they are accepted at the rate of their level: 0.75 is one half, twice."""
    drafted = tree([-1, -1], [2, 1], drawn=True)
    ids = np.tile(np.arange(V), (3, 1))
    log_q = np.log(np.full((3, V), 0.25))
    every = likely_outcomes(drafted, ids, log_q, np.array([0.75]), 100)
    # 1/2 behind the first, 1/4 behind the second, 1/4 at the text's end.
    assert [each.node for each in every] == [0] * 4 + [-1] * 2 + [1] * 4


def test_the_papers_outcome_is_behind_the_deepest_node():
    """However improbable it is that the text comes there."""
    drafted = tree([-1, -1, 1], [2, 0, 1])
    ids = np.tile(np.arange(V), (4, 1))
    log_q = np.log(np.array([[0.97, 0.01, 0.01, 0.01]] * 4))
    assert likely_outcomes(drafted, ids, log_q, HALF, 1, deepest=True) == [Outcome(2, 0)]
    assert likely_outcomes(drafted, ids, log_q, HALF, 1) != [Outcome(2, 0)]
    nothing = DraftedTree()
    assert likely_outcomes(nothing, ids[:1], log_q[:1], HALF, 2) == [Outcome(-1, 0), Outcome(-1, 1)]


def test_a_part_of_a_tree_keeps_what_it_was_drawn_from():
    drafted = tree([-1, 0, 1], [2, 1, 0], drawn=True)
    upper = drafted.first(2)
    assert (upper.tokens.tolist(), upper.parents.tolist()) == ([2, 1], [-1, 0])
    assert upper.q is drafted.q
    assert drafted.first(7) is drafted
    assert drafted.path(2) == [2, 1, 0]
    assert drafted.depths().tolist() == [1, 2, 3]
