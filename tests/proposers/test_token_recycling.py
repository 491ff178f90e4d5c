from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from vllm_specplus.proposer import Services
from vllm_specplus.proposers import token_recycling as tr
from vllm_specplus.proposers.token_recycling import TokenRecyclingConfig
from vllm_specplus.step import Observation, StepContext, bare_step, prior_tables

V = 10


def make(vocab=V, fingerprint="model|tokenizer", **keys):
    return tr.TokenRecycling(TokenRecyclingConfig(**keys), Services(vocab, fingerprint))


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
        acceptance=prior_tables(proposer.sources, 1),
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


def paths(parents, ranks):
    """Each node's path of ranks from the root."""
    out = []
    for p, rank in zip(parents.tolist(), ranks.tolist(), strict=True):
        out.append((*(out[p] if p >= 0 else ()), rank))
    return out


def test_template_nodes_are_in_the_papers_order():
    order = paths(*tr.template_nodes(tr.TEMPLATE_222))
    assert order == sorted(order, key=lambda path: (len(path), path))
    for path, count in tr.TEMPLATE_222.items():  # c children own ranks 0..c-1
        children = [p[-1] for p in order if p[:-1] == path]
        assert children == list(range(count))


@pytest.mark.parametrize("budget", [1, 2, 7, 12, 16, 40, 79, 80])
def test_smaller_templates_keep_the_most_probable_nodes(budget):
    """A kept node without its parent would change its path, and so its probability."""

    def scores(nodes):
        acceptance = tr.TOKEN_RANK_ACCEPTANCE
        return sorted((np.prod([acceptance[r] for r in path]) for path in nodes), reverse=True)

    kept = paths(*tr.template_subset(budget))
    full = paths(*tr.template_nodes(tr.TEMPLATE_222))
    assert set(kept) <= set(full)
    assert scores(kept) == pytest.approx(scores(full)[:budget])


@pytest.mark.parametrize("budget", range(1, 81))
def test_smaller_templates_are_trees(budget):
    parents, ranks = tr.template_subset(budget)
    assert len(parents) == budget
    assert all(p < i for i, p in enumerate(parents))
    assert len(set(zip(parents.tolist(), ranks.tolist(), strict=False))) == budget


@pytest.mark.parametrize("most", [1, 8, 80])
def test_template_is_filled_with_its_best_nodes(most):
    proposer = make(num_speculative_tokens=80, tree="2.2.2")
    toy_matrix(proposer)
    tokens, parents = draft(proposer, [4], most)
    expected_parents, ranks = tr.template_subset(most)
    assert parents == expected_parents.tolist()
    for p, r, token in zip(parents, ranks, tokens, strict=True):
        assert token == (3 * (tokens[p] if p >= 0 else 4) + r + 1) % V


def test_a_template_that_is_cut_expects_what_the_best_nodes_do():
    """0.65 is what the root's eight children would bring: the paper's order, cut."""
    parents, ranks = tr.template_subset(80)

    def expected(parents, ranks):
        survival = []
        for p, r in zip(parents, ranks, strict=True):
            survival.append(tr.TOKEN_RANK_ACCEPTANCE[r] * (survival[p] if p >= 0 else 1.0))
        return sum(survival)

    assert expected(parents[:8], ranks[:8]) == pytest.approx(0.8, abs=0.01)
    children = tr.template_nodes(tr.TEMPLATE_222)
    assert expected(children[0][:8], children[1][:8]) == pytest.approx(0.65)


def test_a_chain_of_the_template_is_as_long_as_it_may_be():
    proposer = make(num_speculative_tokens=80, tree="2.2.2")
    toy_matrix(proposer)
    _, parents = draft(proposer, [4], 6, chain=True)
    assert parents == [-1, 0, 1, 2, 3, 4]


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
    with pytest.raises(ValueError, match="no safetensors file or cut short"):
        make(load_matrix=str(path))


def fill(proposer, rng, rows):
    """Learn ``rows`` random rows, some of them cut short by unset successors."""
    k = proposer.top_k
    top_ids = np.array([rng.permutation(V)[:k] for _ in range(rows)]).reshape(rows, k)
    top_ids[np.arange(k) >= rng.integers(0, 2 * k, rows)[:, None]] = tr.UNSET
    observation = observe(
        rng.integers(0, V, rows), top_ids, rng.random(rows) < 0.5, rng.integers(-1, V, rows)
    )
    proposer.observe_prompt(observation)
    return observation


@given(st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_recycle_is_a_plain_overwrite(seed):
    """The last of (rejected rows, then accepted rows) wins, per token and per pair's slot."""
    rng = np.random.default_rng(seed)
    proposer = make()
    o = fill(proposer, rng, int(rng.integers(1, 40)))
    by_token, by_slot = {}, {}
    for i in np.argsort(o.accepted, kind="stable"):
        token, previous = int(o.tokens[i]), int(o.previous[i])
        by_token[token] = o.top_ids[i].tolist()
        if previous >= 0:
            slot = int(tr.pair_slot(previous, token, tr.PAIR_SLOTS))
            by_slot[slot] = ([previous, token], o.top_ids[i, : tr.PAIR_WIDTH].tolist())
    unset = [tr.UNSET] * 8
    assert proposer.matrix.tolist() == [by_token.get(x, unset) for x in range(V)]
    written = np.flatnonzero(proposer.pair_keys[:, 0] >= 0).tolist()
    assert written == sorted(by_slot)
    for slot, (key, row) in by_slot.items():
        assert proposer.pair_keys[slot].tolist() == key
        assert proposer.pair_rows[slot].tolist() == row


class Naive:
    """Drafting by definition, from a proposer's state: nodes are (parent's node, token)
    and carry score, last two tokens and where the suffix match goes on."""

    def __init__(self, proposer, text):
        self.matrix = proposer.matrix.tolist()
        self.pairs = {
            tuple(key): row
            for key, row in zip(
                proposer.pair_keys.tolist(), proposer.pair_rows.tolist(), strict=True
            )
            if key[0] >= 0
        }
        self.longest = proposer.longest_match
        self.text = text
        where, length = -1, 0
        for end in range(1, len(text)):
            for n in range(1, min(self.longest, end) + 1):
                if text[end - n : end] == text[-n:] and n >= length:
                    where, length = end, n
        previous = text[-2] if len(text) > 1 else -1
        self.root = (np.float32(1), (previous, text[-1]), where, length)

    def children(self, node):
        """{token: node} of everything that may follow ``node``."""
        score, (previous, token), where, length = node
        found = {}
        if 0 <= where < len(self.text):
            p = score * np.float32(tr.MATCH_ACCEPTANCE[min(length, self.longest) - 1])
            found[self.text[where]] = (p, where + 1, length + 1)
        row, acceptance = self.matrix[token], tr.TOKEN_RANK_ACCEPTANCE
        if (previous, token) in self.pairs:
            row, acceptance = self.pairs[previous, token], tr.PAIR_RANK_ACCEPTANCE
        for child, p in zip(row, acceptance, strict=False):
            if child < 0:
                break
            p = score * np.float32(p)
            if child in found:
                p = score * np.float32(tr.AGREED_ACCEPTANCE[min(length, self.longest) - 1])
                found[child] = (p, *found[child][1:])
            else:
                found[child] = (p, -1, 0)
        return {c: (p, (token, c), where, length) for c, (p, where, length) in found.items()}

    def best_first(self, budget):
        """Scores of the ``budget`` best nodes."""
        count, scores = 0, []
        heap = [(-node[0], i, node) for i, node in enumerate(self.children(self.root).values())]
        heapq.heapify(heap)
        while heap and len(scores) < budget:
            _, _, node = heapq.heappop(heap)
            scores.append(node[0])
            for child in self.children(node).values():
                count += 1
                heapq.heappush(heap, (-child[0], 100 + count, child))
        return scores

    def walk(self, tokens, parents):
        """Every drafted node as ours; KeyError when it is nobody's child."""
        nodes = []
        for token, p in zip(tokens, parents, strict=True):
            nodes.append(self.children(nodes[p] if p >= 0 else self.root)[token])
        return nodes


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"pair_keys": False}, {"match_context": False}])
@given(seed=st.integers(0, 10_000), budget=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_growing_equals_the_definition(keys, seed, budget):
    rng = np.random.default_rng(seed)
    proposer = make(num_speculative_tokens=budget, **keys)
    fill(proposer, rng, int(rng.integers(0, 40)))
    text = rng.integers(0, rng.integers(1, V + 1), rng.integers(1, 30)).tolist()
    naive = Naive(proposer, text)

    tokens, parents = draft(proposer, text, budget)
    assert all(p < i for i, p in enumerate(parents))
    assert len(set(zip(parents, tokens, strict=True))) == len(tokens) <= budget
    # By score: equally probable nodes may be taken in any order.
    scores = [node[0] for node in naive.walk(tokens, parents)]
    assert scores == naive.best_first(budget)

    tokens, parents = draft(proposer, text, budget, chain=True)
    assert parents == list(range(-1, len(tokens) - 1))
    nodes = [naive.root, *naive.walk(tokens, parents)]
    for above, node in pairwise(nodes):
        assert node[0] == max(child[0] for child in naive.children(above).values())
    assert len(tokens) == budget or not naive.children(nodes[-1])


def test_nodes_name_their_sources():
    proposer = make(num_speculative_tokens=80)
    names = [source.name for source in proposer.sources]
    assert len(set(names)) == len(names) == 8 + 4 + 8 + 8
    rows = [[5, 0, 1, 2, 3, 4, 6, 7], [6, 0, 1, 2, 3, 4, 5, 7]]
    proposer.observe_prompt(observe([3, 3], rows, previous=[2, 1]))
    for text, token, name in [
        ([3], 6, "token rank 0"),
        ([3], 0, "token rank 1"),
        ([2, 3], 5, "pair rank 0"),
        ([8, 3, 9, 8, 3], 9, "match of 2"),
        ([8, 9, 4, 8, 9, 4, 8], 9, "match of 4"),
        ([2, 3, 5, 2, 3], 5, "agreed match of 2"),
    ]:
        nothing = observe([], np.empty((0, 8)))
        one, budget = np.array([len(text)], np.int32), np.array([9], np.int32)
        step = StepContext(
            ["r"], np.array([text], np.int32), one, budget, np.array([False]), nothing,
            acceptance=prior_tables(proposer.sources, 1),
        )  # fmt: skip
        drafts = proposer.propose(step)
        child = np.flatnonzero((drafts.tokens == token) & (drafts.parents == -1))
        assert [names[drafts.sources[i]] for i in child] == [name]


@pytest.mark.parametrize("tree", ["best_first", "2.2.2"])
def test_acceptance_tables_shape_the_tree(tree):
    """A source that never succeeds is drafted last."""
    proposer = make(num_speculative_tokens=80, tree=tree)
    toy_matrix(proposer)
    nothing = observe([], np.empty((0, 8)))
    tables = prior_tables(proposer.sources, 1)
    tables[:, 0, 0] = 1e-6
    step = StepContext(
        ["r"], np.array([[4]], np.int32), np.array([1], np.int32), np.array([12], np.int32),
        np.array([False]), nothing, acceptance=tables,
    )  # fmt: skip
    drafts = proposer.propose(step)
    rank_0 = (drafts.sources == 0) & (drafts.parents == -1)
    assert rank_0.sum() == (tree == "2.2.2")  # the template is static; the controller cuts it


def test_an_empty_state_drafts_the_suffix_match_or_nothing():
    assert draft(make(), [1, 2, 3], 8) == ([], [])
    assert draft(make(match_context=False), [1, 2, 3, 1, 2], 8) == ([], [])
    # ...up to the end of the text
    assert draft(make(), [1, 2, 3, 1, 2], 8) == ([3, 1, 2], [-1, 0, 1])


def test_requests_are_drafted_back_to_back():
    """A batch drafts what its requests draft alone; 0 nodes means none."""
    proposer = make()
    fill(proposer, np.random.default_rng(1), 60)
    texts = np.array([[1, 2, 3, 1], [5, 6, 7, 8], [9, 9, 9, 9]], np.int32)
    budgets = np.array([12, 0, 5], np.int32)
    nothing = observe([], np.empty((0, 8)))
    chain = np.array([False, False, True])
    priors = prior_tables(proposer.sources, 3)
    four = np.full(3, 4, np.int32)
    step = StepContext(["a", "b", "c"], texts, four, budgets, chain, nothing, acceptance=priors)
    together = [(list(d), d.parents) for d in proposer.propose(step).split()]
    for i, (tokens, parents) in enumerate(together):
        alone = draft(proposer, texts[i].tolist(), budgets[i], chain[i])
        chain_parents = list(range(-1, len(tokens) - 1))
        assert alone == (tokens, chain_parents if parents is None else parents.tolist())


@pytest.mark.parametrize("tree", ["best_first", "2.2.2"])
def test_two_proposers_fed_the_same_draft_the_same(tree):
    def run():
        rng, proposer = np.random.default_rng(7), make(tree=tree)
        drafts = []
        for _ in range(10):
            fill(proposer, rng, 13)
            drafts.append(draft(proposer, rng.integers(0, V, 20).tolist(), 12))
        return drafts, proposer.matrix.tobytes(), proposer.pair_rows.tobytes()

    assert run() == run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_safetensors_file_is_refused(tmp_path, dtype):
    """A user may well name the model's weights."""
    path = str(tmp_path / "model.safetensors")
    if dtype == "float32":
        save_file({"w": np.zeros(2, np.float32)}, path)
    else:
        save_torch_file({"w": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match="is not a Token Recycling matrix"):
        make(load_matrix=path)


@pytest.mark.parametrize("table", ["matrix", "pair_keys", "pair_rows"])
@pytest.mark.parametrize("token", [V, -2])
def test_ids_outside_the_vocabulary_are_refused_in_every_table(tmp_path, table, token):
    path = str(tmp_path / "matrix.safetensors")
    wrong = make()
    getattr(wrong, table)[-1, -1] = token
    wrong.save(path)
    with pytest.raises(ValueError, match=r"load_matrix .* holds token ids outside the vocabulary"):
        make(load_matrix=path)


@pytest.mark.parametrize("tree", ["best_first", "2.2.2"])
def test_ids_without_a_row_are_left_alone(tree):
    """Padding (-1) and placeholders beyond the vocabulary neither teach nor are looked up."""
    proposer = make(num_speculative_tokens=8, tree=tree)
    proposer.observe_prompt(observe([-1, V, V + 5], np.ones((3, 8)), accepted=[False, True, True]))
    assert (proposer.matrix == tr.UNSET).all()
    assert draft(proposer, [3, V + 5], 8) == ([], [])
    toy_matrix(proposer)
    text = [V + 5, 4, V + 6, 7, V + 5]  # the match continues into another placeholder
    tokens, _ = draft(proposer, text, 8)
    assert (tokens == []) == (tree == "2.2.2")  # the token before it is drafted
    assert all(0 <= token < V for token in tokens)


def salted(proposer, salts, texts, rows, budget=8):
    """One step of a request per text, each with one observed row (token, top ids): its drafts,
    [(tokens, parents)]."""
    step = bare_step(proposer.sources, np.array(texts, np.int32), budget)
    step.cache_salts = salts
    step.observation = observe([token for token, _ in rows], [top for _, top in rows])
    step.row_starts = np.arange(len(texts) + 1, dtype=np.int32)
    drafts, out, first = proposer.propose(step), [], 0
    for count in drafts.counts.tolist():
        own = slice(first, first + count)
        out.append((drafts.tokens[own].tolist(), drafts.parents[own].tolist()))
        first += count
    return out


@pytest.mark.parametrize("seed_from_prompt", [False, True])
def test_salts_learn_nothing_from_each_other(seed_from_prompt):
    """Every salt is drafted what it is drafted alone, also the empty one and what is saved."""
    rng = np.random.default_rng(0)
    names = ["", "a", "b", "a", ""]
    together = make()
    alone = {name: make() for name in names}
    for _ in range(30):
        texts = rng.integers(0, V, (len(names), 12)).tolist()
        rows = [(text[-1], rng.permutation(V)[:8].tolist()) for text in texts]
        if seed_from_prompt:
            for name, text in zip(names, texts, strict=True):
                prompt = observe(text[:3], rng.integers(0, V, (3, 8)))
                prompt.cache_salt = name
                together.observe_prompt(prompt)
                alone[name].observe_prompt(replace(prompt, cache_salt=""))
        drafted = salted(together, names, texts, rows)
        for name in alone:
            mine = [i for i, each in enumerate(names) if each == name]
            own = salted(
                alone[name], [""] * len(mine), [texts[i] for i in mine], [rows[i] for i in mine]
            )
            assert own == [drafted[i] for i in mine]
    assert (together.matrix == alone[""].matrix).all()
    assert (together.pair_rows == alone[""].pair_rows).all()
    assert (together.matrix != alone["a"].matrix).any()


def test_matrices_of_20_000_salts_stay_below_the_bound():
    proposer = make(vocab=2000, max_memory_mb=2)
    text, row = [[1, 2, 3]], [(3, list(range(8)))]
    for i in range(20_000):
        salted(proposer, [f"salt {i}"], text, row)
    kept = sum(table.nbytes for tables in proposer._salted.values() for table in tables)
    assert 1e6 < kept <= 2e6
    assert (proposer.matrix == tr.UNSET).all()
    assert salted(proposer, ["salt 19999"], [[0, 0, 3]], [(0, [tr.UNSET] * 8)])[0][0]
    assert salted(proposer, ["salt 0"], [[0, 0, 3]], [(0, [tr.UNSET] * 8)]) == [([], [])]


def test_more_salts_in_a_step_than_memory_has_room_for():
    """Those without a table learn nothing, and do not take those of others in the step."""
    proposer = make(vocab=2000, max_memory_mb=1, match_context=False)
    names = [f"salt {i}" for i in range(proposer._most_salts + 2)]
    rows = [(3, [i + 10] * 8) for i in range(len(names))]
    drafted = salted(proposer, names, [[1, 2, 3]] * len(names), rows, budget=1)
    assert [tokens for tokens, _ in drafted] == [
        [i + 10] if i < proposer._most_salts else [] for i in range(len(names))
    ]
    assert list(proposer._salted) == names[: proposer._most_salts]
