"""Trees of blocks: the card's examples, and the optimum among all prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_specplus.control.budget import best_goodput
from vllm_specplus.drafting.block_trees import Laws, best_first, every_prefix, factorised, markov


def logs(*rows: tuple[float, ...]) -> torch.Tensor:
    """[1, D, V] log-probabilities."""
    return torch.tensor(rows)[None].log()


def paths(tree) -> list[tuple[int, ...]]:
    """The tokens from the root to each node."""
    found: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        above = () if parent < 0 else found[parent]
        found.append((*above, int(token)))
    return found


def survivals(tree) -> np.ndarray:
    """Probability of each node's path."""
    found = np.zeros(len(tree.tokens))
    for i, (parent, given) in enumerate(zip(tree.parents, tree.given, strict=True)):
        found[i] = given * (1 if parent < 0 else found[parent])
    return found


THREE = logs((0.5, 0.28, 0.22), (0.6, 0.3, 0.1), (0.7, 0.2, 0.1))


def test_the_most_probable_prefixes():
    """Example 1 of the card: a ad b c adg bd."""
    tree = best_first(factorised(THREE, 6), 0, 6)
    assert paths(tree) == [(0,), (0, 0), (1,), (2,), (0, 0, 0), (1, 0)]
    assert 1 + survivals(tree).sum() == pytest.approx(2.678)
    # Those behind the less probable siblings.
    assert tree.astray.tolist() == [False, False, False, False, False, True]
    chain = best_first(factorised(THREE, 6), 0, 6, chain=True)
    assert paths(chain) == [(0,), (0, 0), (0, 0, 0)]
    assert 1 + survivals(chain).sum() == pytest.approx(2.01)


def test_the_controller_stops_where_the_card_does():
    """Example 1: a draft of 4, and 10 + .9 for each row."""
    survival = survivals(best_first(factorised(THREE, 20), 0, 20))
    seconds = 4 + 10 + 0.9 * (1 + np.arange(len(survival) + 1))
    assert best_goodput(survival, 1, seconds, 0)[0] == 8


def test_a_law_by_the_parent_keeps_whole_phrases():
    """Example 2: "of course" or "no problem", half each; four nodes."""
    half = np.log(np.array([[[[0.5, 0.5], [0.5, 0.5]], [[1, 1e-9], [1, 1e-9]]]], np.float32))
    tokens = np.array([[[0, 1], [2, 3]]], np.int32)
    order = np.array([[[[0, 1], [0, 1]], [[0, 1], [1, 0]]]], np.int32)
    tree = best_first(Laws(tokens, half, order), 0, 4)
    assert set(paths(tree)) == {(0,), (1,), (0, 2), (1, 3)}
    assert 1 + survivals(tree).sum() == pytest.approx(3)
    # Marginals hold every word at its place, whatever was before it.
    flat = best_first(factorised(logs((0.5, 0.5, 0, 0), (0, 0, 0.5, 0.5)), 4), 0, 4)
    truths = [{(0,), (0, 2)}, {(1,), (1, 3)}]
    assert np.mean([1 + len(truth & set(paths(flat))) for truth in truths]) == 2.5


def test_the_markov_head_of_the_card():
    """Example 4."""
    logits = logs((0.5, 0.3, 0.2), (0.4, 0.35, 0.25))
    rows, columns = torch.tensor([[1.0], [-1], [0]]), torch.tensor([[1.0], [0], [-1]])
    laws = markov(logits, 3, torch.tensor([2]), rows, columns)
    second = {parent: [float(p) for p in np.exp(laws.given[0, 1, parent])] for parent in range(2)}
    assert second[0] == pytest.approx([0.711, 0.229, 0.060], abs=1e-3)
    assert second[1] == pytest.approx([0.578, 0.297, 0.125], abs=1e-3)
    tree = best_first(laws, 0, 4)
    assert paths(tree) == [(0,), (0, 0), (1,), (2,)]
    assert survivals(tree)[1] == pytest.approx(0.355, abs=1e-3)


@pytest.mark.parametrize("conditional", [False, True], ids=["marginal", "markov"])
@pytest.mark.parametrize("width", [2, 5])
def test_trees_are_the_best_of_all_prefixes(conditional, width):
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(4, 3, 9, generator=generator) * 2
    if conditional:
        rows, columns = torch.randn(2, 9, 4, generator=generator)
        laws = markov(logits, width, torch.arange(4), rows, columns)
    else:
        laws = factorised(logits, width)
    for tree in range(4):
        known = every_prefix(laws, tree)
        best = sorted(known.values(), reverse=True)
        for budget in (1, 2, 7, 12):
            grown = best_first(laws, tree, budget)
            probabilities = [known[path] for path in paths(grown)]
            assert probabilities == pytest.approx(best[: len(probabilities)], rel=1e-4)
            assert len(probabilities) == min(budget, len(known))
            assert survivals(grown) == pytest.approx(probabilities, rel=1e-4)
            assert len(set(paths(grown))) == len(probabilities)


def test_growing_all_children_of_a_node_at_once_is_worse():
    """What JetSpec's code does: the comparison above would notice it."""
    known = every_prefix(factorised(THREE, 3), 0)
    theirs = [(0,), (1,), (2,), (0, 0), (0, 1), (0, 2)]
    assert 1 + sum(known[each] for each in theirs) == pytest.approx(2.50)
    assert 1 + sum(sorted(known.values())[-6:]) == pytest.approx(2.678)


def test_laws_by_the_parent_are_those_of_the_formula():
    """Over the candidates, with a vocabulary of the head's own."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 6, generator=generator)
    rows, columns = torch.randn(20, 4, generator=generator), torch.randn(6, 4, generator=generator)
    own = torch.tensor([1, 4, 5, 11, 12, 19])
    anchors = torch.tensor([7, 19])
    laws = markov(logits, 6, anchors, rows, columns, own)
    for a in range(2):
        for depth in range(3):
            for parent in range(6 if depth else 1):
                before = laws.tokens[a, depth - 1, parent] if depth else anchors[a]
                wanted = (logits[a, depth] + columns @ rows[int(before)]).log_softmax(-1)
                for place, candidate in enumerate(laws.order[a, depth, parent]):
                    token = int(laws.tokens[a, depth, candidate])
                    number = int((own == token).nonzero())
                    given = laws.given[a, depth, parent, place]
                    assert given == pytest.approx(float(wanted[number]), abs=1e-4)
            assert (np.diff(laws.given[a, depth], axis=-1) <= 0).all()


def test_impossible_tokens_are_not_drafted():
    logits = torch.tensor([[[0.0, float("-inf"), float("-inf")], [1.0, 0.0, float("-inf")]]])
    tree = best_first(factorised(logits, 3), 0, 9)
    assert paths(tree) == [(0,), (0, 0), (0, 1)]
