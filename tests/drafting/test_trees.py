"""Trimming and fusing draft trees."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.drafting.trees import Fusion, keep_best
from vllm_specplus.step import DEPTHS, PROBABILITY_CLASSES, Source, StepContext, bare_step
from vllm_specplus.tree import DraftBatch

seeds = st.integers(0, 2**32 - 1)


def random_tree(rng, most=40, vocab=4):
    """(tokens, parents) without siblings of equal token."""
    tokens, parents, seen = [], [], set()
    for _ in range(int(rng.integers(0, most + 1))):
        parent, token = int(rng.integers(-1, len(tokens))), int(rng.integers(vocab))
        if (parent, token) not in seen:
            seen.add((parent, token))
            parents.append(parent)
            tokens.append(token)
    return np.array(tokens, np.int32), np.array(parents, np.int32)


def paths_of(tokens, parents) -> list[tuple[int, ...]]:
    paths = []
    for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def random_acceptance(rng, parents):
    """(sources, acceptance, survival): every node has a source of its own, by which one can
    tell it; powers of two, so that products are exact."""
    count = len(parents)
    own = rng.choice([0.25, 0.5, 1.0], count).astype(np.float32)
    survival = np.empty(count, np.float32)
    for i, parent in enumerate(parents):
        survival[i] = (survival[parent] if parent >= 0 else 1.0) * own[i]
    return np.arange(count, dtype=np.int32), np.tile(own, (1, DEPTHS, 1)), survival


NO_LAWS = np.full(60, -1, np.int32)


@given(seeds, st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_the_best_nodes_are_kept(seed, budget):
    rng = np.random.default_rng(seed)
    tokens, parents = random_tree(rng)
    sources, acceptance, survival = random_acceptance(rng, parents)
    out = np.empty((4, 60), np.int32)
    count = keep_best(tokens, parents, sources, NO_LAWS, acceptance, budget, False, out)
    kept = out[2, :count]
    expected = sorted(range(len(tokens)), key=lambda i: (-survival[i], i))[:budget]
    assert sorted(expected) == kept.tolist()
    assert paths_of(*out[:2, :count]) == [paths_of(tokens, parents)[i] for i in kept]


@given(seeds, st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_a_chain_follows_the_best_child(seed, budget):
    rng = np.random.default_rng(seed)
    tokens, parents = random_tree(rng)
    sources, acceptance, survival = random_acceptance(rng, parents)
    out = np.empty((4, 60), np.int32)
    count = keep_best(tokens, parents, sources, NO_LAWS, acceptance, budget, True, out)
    assert out[1, :count].tolist() == list(range(-1, count - 1))
    node, expected = -1, []
    while len(expected) < budget and (parents == node).any():
        node = int(np.argmax(np.where(parents == node, survival, -1)))
        expected.append(int(tokens[node]))
    assert out[0, :count].tolist() == expected


# -- fusion -----------------------------------------------------------------------------

#: One source per probability, so that a test can give every node the one it wants.
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 0.9)
MEMBER = tuple(Source(str(p), "m", p) for p in LEVELS)


def step(fusion: Fusion, max_nodes=80, requests=1) -> StepContext:
    """Acceptance as stated by the sources; agreeing nodes are as good as the best of theirs."""
    table = [s.prior for s in fusion.sources[: fusion.agreement]] + list(PROBABILITY_CLASSES) * 2
    bare = bare_step(fusion.sources, np.zeros((requests, 4), np.int32), max_nodes)
    bare.acceptance[:] = np.array(table, np.float32)
    return bare


def batch(trees) -> DraftBatch:
    tokens, parents, sources = (
        np.concatenate([np.array(t[i], np.int32) for t in trees]) for i in range(3)
    )
    return DraftBatch(tokens, parents, np.array([len(t[0]) for t in trees], np.int32), sources)


def with_sources(rng, tree):
    return (*tree, rng.integers(0, len(MEMBER), len(tree[0])).astype(np.int32))


@given(seeds, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_fusion_is_the_union_of_paths(seed, members):
    rng = np.random.default_rng(seed)
    requests = 3
    fusion = Fusion([MEMBER] * members)
    trees = [[with_sources(rng, random_tree(rng)) for _ in range(requests)] for _ in range(members)]
    fused = fusion.fuse([batch(t) for t in trees], step(fusion, 500, requests=requests))
    starts = np.concatenate(([0], np.cumsum(fused.counts)))
    for r in range(requests):
        nodes = slice(starts[r], starts[r + 1])
        paths = paths_of(fused.tokens[nodes], fused.parents[nodes])
        union = {p for member in trees for p in paths_of(*member[r][:2])}
        assert len(paths) == len(set(paths))  # nothing is verified twice
        assert set(paths) == union
        by_path = dict(zip(paths, fused.sources[nodes].tolist(), strict=True))
        for path, source in by_path.items():
            proposing = [
                (m, int(member[r][2][paths_of(*member[r][:2]).index(path)]))
                for m, member in enumerate(trees)
                if path in paths_of(*member[r][:2])
            ]
            if len(proposing) == 1:
                ((m, own),) = proposing
                assert source == fusion.offsets[m] + own
            else:
                best = float(np.float32(max(LEVELS[own] for _, own in proposing)))
                column = next(i for i, high in enumerate(PROBABILITY_CLASSES) if best <= high)
                more = len(PROBABILITY_CLASSES) * (len(proposing) > 2)
                assert source == fusion.agreement + more + column


def test_fusing_a_tree_with_itself_changes_nothing():
    rng = np.random.default_rng(5)
    fusion = Fusion([MEMBER, MEMBER])
    for _ in range(20):
        tree = with_sources(rng, random_tree(rng))
        fused = fusion.fuse([batch([tree])] * 2, step(fusion, 500))
        assert paths_of(fused.tokens, fused.parents) == paths_of(*tree[:2])


@given(seeds, st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_the_union_is_trimmed_to_the_best(seed, budget):
    rng = np.random.default_rng(seed)
    fusion = Fusion([MEMBER, MEMBER])
    drafts = [batch([with_sources(rng, random_tree(rng))]) for _ in range(2)]
    whole = fusion.fuse(drafts, step(fusion, 500))
    table = step(fusion).acceptance[0, 0]
    survival = {}
    paths = paths_of(whole.tokens, whole.parents)
    for path, source in zip(paths, whole.sources.tolist(), strict=True):
        survival[path] = survival.get(path[:-1], np.float32(1.0)) * table[source]
    trimmed = fusion.fuse(drafts, step(fusion, budget))
    kept = paths_of(trimmed.tokens, trimmed.parents)
    assert len(kept) == min(budget, len(paths))
    assert sorted(survival[p] for p in kept) == sorted(survival.values())[len(paths) - len(kept) :]


def test_worked_example():
    """Card rasd.md, section 2: draft {a: 0.6, b: 0.3}, a -> {c: 0.5}; retrieved a c d three
    times, b e once, z z four times. z is impossible; five nodes remain, three of them shared."""
    a, b, c, d, e, z = range(6)
    fusion = Fusion([MEMBER, MEMBER])
    level = {p: i for i, p in enumerate(LEVELS)}
    drafted = ([a, b, c], [-1, -1, 0], [level[0.6], level[0.3], level[0.5]])
    high = level[0.9]
    retrieved = ([a, c, d, b, e, z, z], [-1, 0, 1, -1, 3, -1, 5], [high] * 7)
    drafts = [batch([drafted]), batch([retrieved])]
    possible = np.array([True] * 3 + [True] * 5 + [False, True])
    fused = fusion.fuse(drafts, step(fusion), possible)
    paths = paths_of(fused.tokens, fused.parents)
    assert sorted(paths) == [(a,), (a, c), (a, c, d), (b,), (b, e)]
    shared = {p for p, s in zip(paths, fused.sources, strict=True) if s >= fusion.agreement}
    assert shared == {(a,), (b,), (a, c)}
    found = dict(zip(paths, fusion.finders.tolist(), strict=True))
    assert found == {(a,): 3, (b,): 3, (a, c): 3, (a, c, d): 2, (b, e): 2}


def test_what_is_below_an_impossible_node_goes_with_it():
    rng = np.random.default_rng(8)
    fusion = Fusion([MEMBER, MEMBER])
    for _ in range(30):
        trees = [with_sources(rng, random_tree(rng)) for _ in range(2)]
        possible = rng.random(sum(len(t[0]) for t in trees)) < 0.7
        fused = fusion.fuse([batch([t]) for t in trees], step(fusion, 500), possible)
        expected, first = set(), 0
        for t in trees:
            bad = {p for p, ok in zip(paths_of(*t[:2]), possible[first:], strict=False) if not ok}
            first += len(t[0])
            expected |= {
                p for p in paths_of(*t[:2])
                if not any(p[:n] in bad for n in range(1, len(p) + 1))
            }  # fmt: skip
        assert set(paths_of(fused.tokens, fused.parents)) == expected


@given(seeds, st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_who_found_a_node(seed, budget):
    rng = np.random.default_rng(seed)
    fusion = Fusion([MEMBER] * 3)
    trees = [with_sources(rng, random_tree(rng)) for _ in range(3)]
    fused = fusion.fuse([batch([t]) for t in trees], step(fusion, budget))
    found = [set(paths_of(*t[:2])) for t in trees]
    for path, bits in zip(
        paths_of(fused.tokens, fused.parents), fusion.finders.tolist(), strict=True
    ):
        assert bits == sum(1 << m for m in range(3) if path in found[m])


def test_what_was_retrieved_hangs_below_the_first_of_equal_draws():
    """No rule accepts a token that it has rejected, so that nodes below its twin are lost."""
    fusion = Fusion([MEMBER, MEMBER])
    draws = batch([([7, 7, 8], [-1, -1, -1], [0, 0, 0])])
    draws.drawn_from, draws.draft_probs = np.zeros(3, np.int32), torch.ones(1, 9)
    found = batch([([7, 9], [-1, 0], [6, 6])])
    fused = fusion.fuse([draws, found], step(fusion))
    assert fused.tokens.tolist() == [7, 7, 8, 9]
    assert fused.parents.tolist() == [-1, -1, -1, 0]
