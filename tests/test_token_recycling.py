from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specplus.config import TokenRecyclingConfig
from vllm_specplus.proposers import token_recycling as tr
from vllm_specplus.proposers.base import Observation, StepContext

V = 10


def make(vocab=V, fingerprint="model|tokenizer", **keys):
    return tr.TokenRecycling(TokenRecyclingConfig(**keys), vocab, fingerprint)


def observe(tokens, top_ids, accepted=None, previous=None):
    n = len(tokens)
    return Observation(
        np.array(tokens, np.int32),
        np.full(n, -1, np.int32) if previous is None else np.array(previous, np.int32),
        np.array(top_ids, np.int32),
        np.ones(n, bool) if accepted is None else np.array(accepted),
    )


def draft(proposer, text, budget, chain=False):
    """(tokens, parents) drafted after ``text``, with nothing new to learn."""
    nothing = observe([], np.empty((0, proposer.top_k)))
    step = StepContext(
        ["r"], np.array([text], np.int32), np.array([len(text)], np.int32),
        np.array([budget], np.int32), np.array([chain]), nothing,
    )  # fmt: skip
    drafts = proposer.propose(step)
    return drafts.tokens.tolist(), drafts.parents.tolist()


def toy_matrix(proposer):
    """The card's M[x][r] = (3x + r + 1) mod 10."""
    x, r = np.ogrid[:V, : proposer.top_k]
    proposer.matrix[...] = (3 * x + r + 1) % V


def test_the_papers_template():
    parents, ranks = tr.template_nodes(tr.TEMPLATE_222)
    depth = []
    for p in parents:
        depth.append(1 if p < 0 else depth[p] + 1)
    assert np.bincount(depth)[1:].tolist() == [8, 21, 25, 15, 8, 3]
    assert len(set(range(80)) - set(parents.tolist())) == 40  # leaves
    assert ranks[:8].tolist() == list(range(8))


@pytest.mark.parametrize("budget", range(1, 81))
def test_smaller_templates_are_trees(budget):
    parents, ranks = tr.template_subset(budget)
    assert len(parents) == budget
    assert all(p < i for i, p in enumerate(parents))
    assert len(set(zip(parents.tolist(), ranks.tolist(), strict=False))) == budget


def test_template_is_filled_breadth_first_by_rank():
    proposer = make(num_speculative_tokens=80, tree="2.2.2")
    toy_matrix(proposer)
    tokens, parents = draft(proposer, [4], 80)
    expected_parents, ranks = tr.template_nodes(tr.TEMPLATE_222)
    assert parents == expected_parents.tolist()
    for i, (p, r) in enumerate(zip(parents, ranks, strict=False)):
        assert tokens[i] == (3 * (tokens[p] if p >= 0 else 4) + r + 1) % V


def test_unset_rows_cut_the_tree():
    proposer = make(num_speculative_tokens=80, tree="2.2.2")
    assert draft(proposer, [4], 80) == ([], [])
    proposer.matrix[4] = [5, 6, 7, 8, 9, 0, 1, 2]
    tokens, parents = draft(proposer, [4], 80)
    assert tokens == [5, 6, 7, 8, 9, 0, 1, 2]
    assert parents == [-1] * 8


def reference_tree(matrix, text, budget):
    """Best first over one-token rows, by definition: the best of all candidates, again
    and again. Returns the set of (path of tokens)."""
    taken = {(): 1.0}
    while len(taken) - 1 < budget:
        candidates = {}
        for path, score in taken.items():
            row = matrix[path[-1] if path else text[-1]]
            for rank, token in enumerate(row):
                if token >= 0 and (*path, int(token)) not in taken:
                    candidates[(*path, int(token))] = np.float32(score) * np.float32(
                        tr.TOKEN_RANK_ACCEPTANCE[rank]
                    )
        if not candidates:
            break
        best = max(candidates, key=candidates.get)
        taken[best] = candidates[best]
    return sorted(float(s) for path, s in taken.items() if path)


@pytest.mark.parametrize("budget", [1, 2, 5, 8, 16, 40, 80])
def test_best_first_takes_the_most_probable_nodes(budget):
    """Compared by score, since equally probable nodes may be taken in any order."""
    proposer = make(num_speculative_tokens=budget, pair_keys=False, match_context=False)
    toy_matrix(proposer)
    tokens, parents = draft(proposer, [4], budget)
    assert len(tokens) == budget
    assert len(set(zip(parents, tokens, strict=False))) == budget  # siblings are distinct
    score = []
    for token, p in zip(tokens, parents, strict=False):
        above = tokens[p] if p >= 0 else 4
        rank = proposer.matrix[above].tolist().index(token)
        score.append((score[p] if p >= 0 else 1.0) * tr.TOKEN_RANK_ACCEPTANCE[rank])
    assert score == pytest.approx(sorted(score, reverse=True), rel=1e-5)
    assert sorted(score) == pytest.approx(reference_tree(proposer.matrix, [4], budget), rel=1e-5)


def test_structured_output_gets_a_chain():
    proposer = make(num_speculative_tokens=8)
    toy_matrix(proposer)
    _, parents = draft(proposer, [4, 1, 4], 6, chain=True)
    assert parents == [-1, 0, 1, 2, 3, 4]


def test_pair_rows_come_before_token_rows():
    proposer = make(num_speculative_tokens=1, match_context=False)
    proposer.observe_prompt(observe([3, 3], [[1] * 8, [2] * 8], previous=[7, 8]))
    assert draft(proposer, [7, 3], 1)[0] == [1]
    assert draft(proposer, [8, 3], 1)[0] == [2]
    assert draft(proposer, [9, 3], 1)[0] == [2]  # unknown pair: the token's own row


def test_the_suffix_match_is_followed():
    proposer = make(num_speculative_tokens=3)
    tokens, parents = draft(proposer, [1, 2, 3, 4, 5, 9, 1, 2, 3], 3)
    assert tokens == [4, 5, 9]
    assert parents == [-1, 0, 1]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 8))
def test_suffix_match(text, longest):
    where, length = tr.suffix_match(np.array(text, np.int32), len(text), longest)
    best = (0, -1)
    for end in range(1, len(text)):  # a match may overlap the suffix it repeats
        for n in range(1, min(longest, end) + 1):
            if text[end - n : end] == text[len(text) - n :]:
                best = max(best, (n, end))
    assert (length, where) == best


def test_recycling_is_deterministic_under_duplicates():
    """Rejected rows first, accepted last; among equals the later one wins."""
    rows = np.arange(4 * 8).reshape(4, 8) % V
    a = make()
    a.observe_prompt(observe([6, 6, 6, 2], rows, accepted=[True, False, False, False]))
    assert a.matrix[6].tolist() == rows[0].tolist()
    assert a.matrix[2].tolist() == rows[3].tolist()
    b = make()
    b.observe_prompt(observe([6, 6], rows[:2], accepted=[False, False]))
    assert b.matrix[6].tolist() == rows[1].tolist()


def test_state_stays_below_two_megabytes():
    p = make(vocab=49152)
    assert p.matrix.nbytes + p.pair_keys.nbytes + p.pair_rows.nbytes < 2_000_000


def test_save_and_load(tmp_path):
    path = str(tmp_path / "matrix.safetensors")
    saved = make(save_matrix=path)
    toy_matrix(saved)
    saved.observe_prompt(observe([3], [[1] * 8], previous=[7]))
    saved.close()
    loaded = make(load_matrix=path)
    for name in ("matrix", "pair_keys", "pair_rows"):
        assert np.array_equal(getattr(loaded, name), getattr(saved, name))
    assert draft(loaded, [7, 3], 8) == draft(saved, [7, 3], 8)


@pytest.mark.parametrize(
    ("keys", "vocab", "fingerprint", "words"),
    [
        ({}, V, "another", "another model or tokenizer"),
        ({"top_k": 4}, V, "model|tokenizer", "other top_k"),
        ({}, 2 * V, "model|tokenizer", "other top_k"),
    ],
)
def test_a_matrix_of_something_else_is_refused(tmp_path, keys, vocab, fingerprint, words):
    path = str(tmp_path / "matrix.safetensors")
    make().save(path)
    with pytest.raises(ValueError, match=words):
        make(vocab, fingerprint, load_matrix=path, **keys)


def test_a_damaged_matrix_is_refused(tmp_path):
    path = tmp_path / "matrix.safetensors"
    wrong = make()
    wrong.matrix[0, 0] = V
    wrong.save(str(path))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        make(load_matrix=str(path))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not readable"):
        make(load_matrix=str(path))
