"""Which nodes are verified: against exhaustive search and the card's check values."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.control.budget import (
    best_chains,
    best_goodput,
    keep_nodes,
    most_productive,
    within_limits,
)


@pytest.mark.parametrize(
    ("acceptance", "length", "expected"),
    [(0.7, 3, 2.533), (0.7, 5, 2.941), (0.9, 5, 4.686), (0.5, 3, 1.875)],
)
def test_expected_tokens_of_a_chain(acceptance, length, expected):
    """SmartSpec's (1 - a^(k+1)) / (1 - a) is one plus the survival of the nodes."""
    survival = acceptance ** np.arange(1, length + 1)
    assert 1 + survival.sum() == pytest.approx(expected, abs=5e-4)
    free = np.full(length + 1, 0.01)  # rows that cost nothing: take all of them
    best, gain = best_goodput(survival, 1, free)
    assert (best, gain) == (length, pytest.approx(expected, abs=5e-4))


@st.composite
def batches(draw):
    """Up to 3 requests with trees of up to 4 nodes, and step times that need not be convex."""
    trees, start = [], 0
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, 4))
        parents = [draw(st.integers(-1, i - 1)) for i in range(count)]
        acceptance = [draw(st.floats(0.01, 0.99)) for _ in range(count)]
        survival = []
        for p, a in zip(parents, acceptance, strict=True):
            survival.append(a * (survival[p] if p >= 0 else 1.0))
        trees.append((parents, survival))
        start += count
    rises = [draw(st.floats(0, 1)) for _ in range(start)]
    return trees, 1.0 + np.concatenate(([0.0], np.cumsum(rises)))


@given(batches())
@settings(deadline=None, max_examples=60)
def test_the_budget_equals_exhaustive_search(batch):
    """Over all sets of nodes that are closed under parents, in all requests together."""
    trees, seconds = batch
    nodes = [(r, i) for r, (parents, _) in enumerate(trees) for i in range(len(parents))]
    best = 0.0
    for size in range(len(nodes) + 1):
        for chosen in combinations(nodes, size):
            if all((r, trees[r][0][i]) in chosen for r, i in chosen if trees[r][0][i] >= 0):
                tokens = len(trees) + sum(trees[r][1][i] for r, i in chosen)
                best = max(best, tokens / seconds[size])
    survival = np.array([trees[r][1][i] for r, i in nodes])
    order = np.argsort(-survival, kind="stable")
    count, gain = best_goodput(survival[order], len(trees), seconds)
    assert gain * len(trees) / seconds[0] == pytest.approx(best)
    kept = {nodes[i] for i in order[:count]}
    assert all((r, trees[r][0][i]) in kept for r, i in kept if trees[r][0][i] >= 0)


def test_zero_is_a_legal_answer_and_wins_ties():
    assert best_goodput(np.array([0.2]), 1, np.array([1.0, 1.3])) == (0, 1.0)
    assert best_goodput(np.array([0.5]), 1, np.array([1.0, 1.5])) == (0, 1.0)
    assert best_goodput(np.array([]), 4, np.array([1.0])) == (0, 1.0)


def test_a_dip_does_not_stop_the_search():
    """Step times have steps of their own: the first decrease of goodput is not the end."""
    survival = np.array([0.9, 0.8, 0.8, 0.8])
    seconds = np.array([1.0, 2.0, 2.0, 2.0, 2.0])
    count, _ = best_goodput(survival, 1, seconds)
    assert count == 4


@given(st.integers(0, 10_000))
@settings(deadline=None)
def test_kept_nodes_keep_their_paths(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 8, 3).astype(np.int32)
    parents = np.concatenate([[rng.integers(-1, i) for i in range(n)] for n in counts])
    parents = parents.astype(np.int32)
    tokens = rng.permutation(len(parents)).astype(np.int32)  # distinct: they name the nodes
    kept = np.zeros(len(parents), bool)
    first = 0
    for n in counts:
        for i in range(n):
            above = parents[first + i]
            kept[first + i] = (above < 0 or kept[first + above]) and rng.random() < 0.7
        first += n

    def paths(tokens, parents, counts, wanted=None):
        out, first = [], 0
        for n in counts.tolist():
            for i in range(n):
                if wanted is not None and not wanted[first + i]:
                    continue
                path, node = [], i
                while node >= 0:
                    path.append(int(tokens[first + node]))
                    node = int(parents[first + node])
                out.append(path)
            first += n
        return out

    result = keep_nodes(tokens, parents, counts, kept)
    assert paths(*result) == paths(tokens, parents, counts, kept)
    assert [a.dtype for a in result] == [np.int32] * 3


def flat(trees) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(survival, parents, starts) of ``batches``' trees."""
    survival = np.array([s for _, each in trees for s in each], np.float32)
    parents = np.array([p for each, _ in trees for p in each], np.int32)
    return survival, parents, np.cumsum([0] + [len(each) for each, _ in trees]).astype(np.int32)


def leading_chains(ranked, parents, starts) -> int:
    """How many of the best nodes, ``ranked``, are chains, one of each request at most."""
    end = {}  # of each request's chain
    for count, node in enumerate(ranked.tolist()):
        request = int(np.searchsorted(starts, node, side="right")) - 1
        if parents[node] != end.get(request, -1):
            return count
        end[request] = node - starts[request]
    return len(ranked)


@given(batches())
@settings(deadline=None, max_examples=60)
def test_leading_chains_end_where_a_request_first_branches(batch):
    trees, _ = batch
    survival, parents, starts = flat(trees)
    ranked = np.argsort(-survival, kind="stable")
    request = np.repeat(np.arange(len(trees)), np.diff(starts))

    def branches(count: int) -> bool:
        nodes = [(request[i], parents[i]) for i in ranked[:count]]
        return len(set(nodes)) < len(nodes)

    count = leading_chains(ranked, parents, starts)
    assert not branches(count)
    assert count == len(ranked) or branches(count + 1)


@given(batches())
@settings(deadline=None, max_examples=60)
def test_best_chains_are_the_paths_with_the_most_expected_tokens(batch):
    trees, _ = batch
    survival, parents, starts = flat(trees)
    kept = best_chains(survival, parents, starts)
    for r, (above, values) in enumerate(trees):
        paths = [[]]
        for i, parent in enumerate(above):
            paths.append([*(paths[parent + 1] if parent >= 0 else []), i])
        chosen = np.flatnonzero(kept[starts[r] : starts[r + 1]]).tolist()
        assert chosen in paths
        worth = [sum(values[i] for i in path) for path in paths]
        assert sum(values[i] for i in chosen) == pytest.approx(max(worth), rel=1e-6)


@given(batches(), st.data())
@settings(deadline=None, max_examples=60)
def test_limits_are_kept_by_exactly_the_numbers_of_nodes_that_keep_them(batch, data):
    trees, seconds = batch
    owners = np.array([r for r, (parents, _) in enumerate(trees) for _ in parents], np.int64)
    survival = np.array([s for _, survival in trees for s in survival], np.float32)
    some = st.floats(0.5, 4.0)
    limits, per_token = (
        np.array([data.draw(some) for _ in trees]) for _ in ("limits", "per token")
    )
    allowed = within_limits(owners, survival, seconds, limits, per_token)
    for count in range(len(owners) + 1):
        gained = np.bincount(owners[:count], survival[:count], minlength=len(trees))
        least = (limits + per_token * gained).min()
        if abs(seconds[count] - least) > 1e-9:
            assert allowed[count] == (seconds[count] < least)


def test_the_best_of_the_allowed_numbers_is_taken():
    survival, seconds = np.array([0.9, 0.8, 0.7]), np.ones(4)
    assert best_goodput(survival, 1, seconds)[0] == 3
    allowed = np.array([True, True, False, False])
    assert best_goodput(survival, 1, seconds, 0, allowed) == (1, pytest.approx(1.9))
    # What is verified anyway is, allowed or not.
    assert best_goodput(survival, 1, seconds, 2, allowed) == (2, pytest.approx(2.7))


@given(batches(), st.data())
@settings(deadline=None, max_examples=120)
def test_one_pass_chooses_as_the_parts_do(batch, data):
    """Chains and trees, with and without limits, with nodes that are verified anyway."""
    trees, chain_seconds = batch
    survival, parents, starts = flat(trees)
    ranked = np.argsort(-survival, kind="stable")
    least = data.draw(st.integers(0, len(ranked)))
    dearer = data.draw(st.floats(1.0, 1.5))
    seconds = np.stack((chain_seconds, dearer * chain_seconds))
    some = st.floats(0.5, 4.0)
    limits, per_token = (
        np.array([data.draw(some) for _ in trees]) for _ in ("limits", "per token")
    )
    ceiling = data.draw(st.floats(1.0, 5.0))
    owners = np.searchsorted(starts, ranked, side="right") - 1
    chains = leading_chains(ranked, parents, starts)
    count = np.arange(len(ranked) + 1)
    times = np.where(count > chains, seconds[1], seconds[0])[: len(ranked) + 1]
    in_order = survival[ranked].astype(np.float64)
    best, gain = best_goodput(in_order, len(trees), times, least)
    none = np.empty(0)
    plain = most_productive(
        ranked, survival, parents, starts, seconds, least, none, none, np.inf
    )  # fmt: skip
    assert plain == (best, pytest.approx(gain), times[best], False)
    allowed = within_limits(owners, in_order, times, limits, per_token) & (times <= ceiling)
    limited = bool(best != least and not allowed[best])
    if limited:
        best, gain = best_goodput(in_order, len(trees), times, least, allowed)
    found = most_productive(
        ranked, survival, parents, starts, seconds, least, limits, per_token, ceiling
    )  # fmt: skip
    assert found == (best, pytest.approx(gain), times[best], limited)
