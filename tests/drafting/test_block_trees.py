"""Trees of blocks: the card's examples, and the optimum among all prefixes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vllm_specplus.control.budget import best_goodput
from vllm_specplus.drafting.block_trees import Laws, best_first, every_prefix, factorised, markov
from vllm_specplus.drafting.dflash2 import CandidateSelector, convolved


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


def schedule(confidence: torch.Tensor, seconds: np.ndarray) -> tuple[list[int], float]:
    """How many nodes each of R requests gets, and the expected tokens per second: chains of one
    candidate per depth, with ``confidence`` [R, D]; ``seconds`` [R * D + 1] by the number of nodes.
    """
    laws = factorised(torch.zeros(*confidence.shape, 1), 1, trust=confidence.log()[..., None])
    trees = [survivals(best_first(laws, r, 9)) for r in range(len(confidence))]
    owners = np.repeat(np.arange(len(trees)), [len(tree) for tree in trees])
    survival = np.concatenate(trees)
    ranked = np.argsort(-survival, kind="stable")
    count, _ = best_goodput(survival[ranked], len(trees), seconds)
    lengths = np.bincount(owners[ranked[:count]], minlength=len(trees)).tolist()
    return lengths, (len(trees) + survival[ranked[:count]].sum()) / seconds[count]


def test_the_schedule_of_the_card():
    """Example 5: 8 and 1 for each row; four nodes, three and one."""
    confidence = torch.tensor([[0.9, 0.8, 0.5], [0.6, 0.5, 0.2]])
    lengths, goodput = schedule(confidence, 8 + 2.0 + np.arange(7))
    assert lengths == [3, 1]
    assert goodput == pytest.approx(0.3271, abs=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_the_schedule_of_confidences_is_the_best_of_all(seed):
    """Of all lengths of three requests' chains."""
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.05 + 0.9 * torch.rand(3, 4, generator=generator)
    rng = np.random.default_rng(seed)
    seconds = 5 + np.cumsum(rng.random(13))
    _, goodput = schedule(confidence, seconds)
    survival = np.concatenate((np.zeros((3, 1)), np.cumprod(confidence.numpy(), 1).cumsum(1)), 1)
    best = max(
        (3 + sum(survival[r, n] for r, n in enumerate(lengths))) / seconds[sum(lengths)]
        for lengths in itertools.product(range(5), repeat=3)
    )
    assert goodput == pytest.approx(best, rel=1e-5)


def test_how_far_a_law_is_trusted_says_nothing_about_its_tokens():
    """It may depend on the parent, and never on the child: all siblings count for as much less."""
    generator = torch.Generator().manual_seed(3)
    logits, anchors = torch.randn(2, 3, 6, generator=generator), torch.tensor([1, 5])
    rows, columns = torch.randn(2, 6, 4, generator=generator)
    plain = markov(logits, 4, anchors, rows, columns)
    laws = markov(logits, 4, anchors, rows, columns, trust=lambda before: -before.pow(2).sum(-1))
    assert (laws.tokens == plain.tokens).all()
    assert (laws.order == plain.order).all()
    less = laws.given - plain.given
    assert less == pytest.approx(np.broadcast_to(less[..., :1], less.shape), abs=1e-5)
    for a in range(2):
        assert less[a, 0, 0, 0] == pytest.approx(-float(rows[anchors[a]].pow(2).sum()), abs=1e-5)
        for parent in range(4):
            before = rows[int(plain.tokens[a, 1, parent])]
            assert less[a, 2, parent, 0] == pytest.approx(-float(before.pow(2).sum()), abs=1e-4)


def test_a_law_that_is_not_trusted_gets_fewer_nodes():
    """Two depths alike, the second one less trusted in one of two trees."""
    logits = torch.tensor([0.6, 0.4]).log().expand(2, 2, 2)
    trust = torch.tensor([[1.0, 1.0], [1.0, 0.1]]).log()[..., None]
    laws = factorised(logits, 2, trust=trust)
    assert paths(best_first(laws, 0, 3)) == [(0,), (1,), (0, 0)]
    assert paths(best_first(laws, 1, 2)) == [(0,), (1,)]
    assert best_first(laws, 1, 3).given.tolist() == pytest.approx([0.6, 0.4, 0.06])


def test_the_convolution_and_the_selector_of_the_card():
    """Example 6: base (1, .5) in blocks of three, and two scores."""
    rows = torch.tensor([1.0, 2, 3, 4, 5, 0]).view(2, 3, 1)
    kernel = torch.tensor([1.0, 0.5]).view(1, 1, 2, 1).expand(2, 3, 2, 1)
    assert convolved(rows, kernel).flatten()[:5].tolist() == [1, 2.5, 4, 4, 7]
    selector = CandidateSelector(2, 2, 2)
    with torch.no_grad():
        selector.predecessor_codebook.copy_(torch.tensor([[0.0, 0], [1, 2]]))
        selector.successor_codebook.copy_(torch.tensor([[2.0, 0], [0, 1]]))
        selector.hidden_projection.weight.copy_(torch.eye(2))
        logits, hidden = torch.tensor([[[1.0, 0.2]]]), torch.tensor([[[0.5, 1.0]]])
        laws = selector.laws(logits, 2, hidden, torch.tensor([1]))
    # U (1, .2) and edges (1, 2): 2.0 and 2.2.
    assert laws.tokens[0, 0, laws.order[0, 0, 0]].tolist() == [1, 0]
    wanted = torch.tensor([2.2, 2.0]).log_softmax(-1).tolist()
    assert laws.given[0, 0, 0].tolist() == pytest.approx(wanted)


def test_impossible_tokens_are_not_drafted():
    logits = torch.tensor([[[0.0, float("-inf"), float("-inf")], [1.0, 0.0, float("-inf")]]])
    tree = best_first(factorised(logits, 3), 0, 9)
    assert paths(tree) == [(0,), (0, 0), (0, 1)]
