"""REST: the tree of the paper's code, and what is drafted of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.datastores import build_datastore
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.rest import CHOICES, LONG, Rest, RestConfig
from vllm_specplus.retrieval.datastore import Datastore
from vllm_specplus.retrieval.search import heaviest, longest_match
from vllm_specplus.step import bare_step

VOCAB = 1000
#: The context that is looked up.
ASKED = [1, 2]


def drafted(store: Path, nodes: int = CHOICES, **keys) -> set[tuple[int, ...]]:
    """Paths of the tree after ``ASKED``."""
    rest = Rest(
        RestConfig(datastore=str(store), num_speculative_tokens=64, **keys), Services(VOCAB)
    )
    batch = rest.propose(bare_step(rest.sources, np.array([[0, *ASKED]], np.int32), nodes))
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(batch.tokens.tolist(), batch.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


def cut_to_choices(continuations: list[list[int]], choices: int = CHOICES) -> set[tuple[int, ...]]:
    """As the paper's code does it, with ties broken by length and then by order."""
    weights: Counter[tuple[int, ...]] = Counter()
    for tokens in continuations:
        weights.update(tuple(tokens[:n]) for n in range(1, len(tokens) + 1))
    kept = sorted(weights, key=lambda path: (-weights[path], len(path)))[:choices]
    while sum(len(set(path)) for path in kept) > choices:
        longest = max(map(len, kept))
        kept.remove(next(path for path in reversed(kept) if len(path) == longest))
    return set(kept)


@pytest.mark.parametrize(("matches", "nodes", "depth"), [(1, 10, 10), (2, 15, 8), (4, 20, 5)])
def test_the_paper_verifies_far_fewer_nodes_than_it_counts(tmp_path, matches, nodes, depth):
    """Every path is counted on its own, so that a few of them use up all choices."""
    after = [list(range(10 + 20 * i, 30 + 20 * i)) for i in range(matches)]
    store = build_datastore(tmp_path / "store", [ASKED + each for each in after], VOCAB)
    paths = drafted(store, tree="heaviest")
    assert len(paths) == nodes
    assert max(map(len, paths)) == depth


def continuations(store: Path) -> list[list[int]]:
    """What follows ``ASKED`` in the datastore, in its order."""
    opened, ranges = Datastore.open(store), np.zeros((1, 2), np.int64)
    text = np.array(ASKED, np.int32)
    arrays = opened.tokens, opened.order, opened.first, opened.shards
    longest_match(*arrays, text, 2, 2, 16, ranges)
    tokens, end = opened.tokens.tolist(), opened.manifest.separator
    places = opened.order[ranges[0, 0] : ranges[0, 1]].tolist()
    return [tokens[place + 1 : tokens.index(end, place)] for place in places]


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_is_that_of_the_papers_code(tmp_path, seed):
    rng = np.random.default_rng(seed)
    documents = [ASKED + rng.integers(5, 8, rng.integers(1, 14)).tolist() for _ in range(30)]
    store = build_datastore(tmp_path / "store", documents, VOCAB)
    after = continuations(store)
    assert len(after) == 30
    assert drafted(store, tree="heaviest") == cut_to_choices([each[:LONG] for each in after])


@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_the_heaviest_nodes_are_those_of_the_naive_cut(seed, choices):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 30))
    tokens = rng.integers(0, 4, count).astype(np.int32)
    parents = np.array([rng.integers(-1, i) for i in range(count)], np.int32)
    weights, depths = np.zeros(count, np.int32), np.zeros(count, np.int32)
    for i, parent in enumerate(parents):
        weights[i] = rng.integers(1, 1 + (weights[parent] if parent >= 0 else 20))
        depths[i] = 1 + (depths[parent] if parent >= 0 else 0)

    def path(i: int) -> list[int]:
        return [*(path(parents[i]) if parents[i] >= 0 else []), int(tokens[i])]

    kept = sorted(range(count), key=lambda i: (-int(weights[i]), depths[i], i))[:choices]
    while sum(len(set(path(i))) for i in kept) > choices:
        deepest = max(depths[i] for i in kept)
        kept.remove(next(i for i in reversed(kept) if depths[i] == deepest))
    found = heaviest(tokens, parents, weights, depths, choices)
    assert np.flatnonzero(found).tolist() == sorted(kept)


def test_the_budget_holds_for_both_trees(tmp_path):
    rng = np.random.default_rng(0)
    documents = [ASKED + rng.integers(5, 900, 20).tolist() for _ in range(20)]
    store = build_datastore(tmp_path / "store", documents, VOCAB)
    for tree in ("best_first", "heaviest"):
        assert len(drafted(store, nodes=7, tree=tree)) == 7
