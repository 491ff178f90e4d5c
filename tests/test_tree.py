from __future__ import annotations

import itertools
import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.tree import (
    DraftBatch,
    DraftTokens,
    accepted_paths,
    ancestor_mask,
    row_depths,
)


@st.composite
def forests(draw):
    """(parents, starts) of up to three requests' rows; row 0 is the root."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    parents = []
    for n in sizes:
        parents += [-1] + [draw(st.integers(0, i - 1)) for i in range(1, n)]
    return np.array(parents, np.int32), np.cumsum([0, *sizes]).astype(np.int32)


def ancestors(parents, first, row):
    """Rows on the path from the root to ``row``, by definition."""
    path = [row]
    while parents[first + path[0]] >= 0:
        path.insert(0, int(parents[first + path[0]]))
    return path


@given(forests())
@settings(deadline=None)
def test_depths_and_masks(forest):
    parents, starts = forest
    width = int(np.diff(starts).max())
    mask = ancestor_mask(parents, starts, width)
    depths = row_depths(parents, starts)
    for first, end in itertools.pairwise(starts):
        for row in range(end - first):
            path = ancestors(parents, first, row)
            assert np.flatnonzero(mask[first + row]).tolist() == path
            assert depths[first + row] == len(path) - 1


@given(forests(), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_accepted_paths(forest, random):
    parents, starts = forest
    tokens = np.array([random.randrange(3) for _ in parents], np.int32)
    sampled = np.array([random.randrange(3) for _ in parents], np.int32)
    path, lengths = accepted_paths(tokens, parents, starts, sampled)
    for r, (first, end) in enumerate(itertools.pairwise(starts)):
        row, expected = 0, [0]
        while True:
            children = [
                i for i in range(1, end - first)
                if parents[first + i] == row and tokens[first + i] == sampled[first + row]
            ]  # fmt: skip
            if not children:
                break
            row = children[0]
            expected.append(row)
        assert path[r, : lengths[r]].tolist() == expected
        assert (path[r, lengths[r] :] == -1).all()


def test_draft_tokens_keep_parents_through_cuts_and_pickles():
    tree = DraftTokens([5, 6, 7, 8], np.array([-1, -1, 0, 2], np.int32))
    cut = tree[:3]
    assert cut == [5, 6, 7]
    assert cut.parents.tolist() == [-1, -1, 0]
    again = pickle.loads(pickle.dumps(cut))
    assert again == cut
    assert again.parents.tolist() == [-1, -1, 0]


def test_what_is_no_prefix_is_no_tree():
    tree = DraftTokens([5, 6, 7], np.array([-1, -1, 0], np.int32))
    assert getattr(tree[1:], "parents", None) is None
    assert getattr(tree[::2], "parents", None) is None
    assert getattr(list(tree), "parents", None) is None


def test_split_gives_chains_no_parents():
    batch = DraftBatch(
        np.array([1, 2, 3, 4], np.int32),
        np.array([-1, 0, -1, -1], np.int32),
        np.array([2, 0, 2], np.int32),
    )
    chain, nothing, tree = batch.split()
    assert chain == [1, 2]
    assert chain.parents is None
    assert nothing == []
    assert tree == [3, 4]
    assert tree.parents.tolist() == [-1, -1]


@given(forests(), st.builds(slice, *[st.none() | st.integers(-4, 4)] * 2))
@settings(deadline=None)
def test_exactly_the_prefixes_stay_trees(forest, cut):
    parents, starts = forest
    above = parents[1 : starts[1]] - 1  # node numbers instead of rows
    nodes = list(range(len(above)))
    part = DraftTokens(nodes, above)[cut]
    assert part == nodes[cut]
    if cut.start in (None, 0):
        assert part.parents.tolist() == above[: len(part)].tolist()
    else:
        assert getattr(part, "parents", None) is None


@given(forests())
@settings(deadline=None)
def test_split_loses_nothing(forest):
    """A node's parent is the one given, or the node before it where none are given."""
    parents, starts = forest
    is_node = np.ones(len(parents), bool)
    is_node[starts[:-1]] = False
    nodes = parents[is_node] - 1
    counts = np.diff(starts) - 1
    drafts = DraftBatch(np.arange(len(nodes), dtype=np.int32), nodes, counts).split()
    assert [len(d) for d in drafts] == counts.tolist()
    assert [token for d in drafts for token in d] == list(range(len(nodes)))
    again = [range(-1, len(d) - 1) if d.parents is None else d.parents.tolist() for d in drafts]
    assert [p for above in again for p in above] == nodes.tolist()


def test_split_does_not_share_the_proposers_arrays():
    """The scheduler keeps a draft it has no room for, while the proposer drafts again."""
    parents = np.array([-1, -1, 0], np.int32)
    (draft,) = DraftBatch(np.arange(3, dtype=np.int32), parents, np.array([3], np.int32)).split()
    parents[:] = 7
    assert draft.parents.tolist() == [-1, -1, 0]


def test_an_empty_batch_has_a_draft_for_every_request():
    assert DraftBatch.empty(3).split() == [[], [], []]
