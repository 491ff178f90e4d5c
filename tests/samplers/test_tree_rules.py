"""Rules for sampled trees, in a world of four tokens whose probabilities are known exactly.

The toy's drafts are drawn here, verified by the references of ``samplers/sampled.py``, and the
outcome is compared with ``tree_rules_oracle.py``, which computes the same in rational
arithmetic: the distribution of three tokens, and the expected tokens of a step. Wrong ways to
use a rule must be told from right ones by the same test.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests import tree_rules_oracle as oracle
from vllm_specplus.samplers.registry import rule_class
from vllm_specplus.samplers.sampled import best_rho
from vllm_specplus.step import DraftProbs, Rows
from vllm_specplus.tree import accepted_paths, row_depths

V = oracle.V
CONTEXTS = sorted(oracle.p, key=lambda c: (len(c), c))
INDEX = {context: i for i, context in enumerate(CONTEXTS)}
P = np.array([[float(x) for x in oracle.p[c]] for c in CONTEXTS])
DRAFTED = [c for c in CONTEXTS if c in oracle.q]
Q = np.array([[float(x) for x in oracle.q[c]] for c in DRAFTED])
#: context, token -> the context one token longer.
CHILD = np.array([[INDEX.get((*c, v), -1) for v in range(V)] for c in CONTEXTS])


class Drafts:
    """``n`` trees: every node at depth d has ``branching[d]`` children."""

    def __init__(self, branching, mode, n, order=None, fixed=0):
        """``mode``: how siblings are drawn ("with" or "without" replacement, or "top");
        ``order``: sorts them, which is wrong; ``fixed``: deterministic siblings after them."""
        rng = np.random.default_rng(7)
        parents, depth_of = [-1], [0]
        tokens, contexts = [np.zeros((n, 1), int)], [np.zeros((n, 1), int)]
        level = [0]
        for depth, k in enumerate(branching):
            at = contexts[depth]
            drawn = self._draw(rng, Q[at], k, mode)
            if order is not None:
                keys = np.take_along_axis(order(Q[at]), drawn, -1)
                drawn = np.take_along_axis(drawn, keys.argsort(-1, kind="stable"), -1)
            if fixed:
                others = self._others(drawn, depth)[..., :fixed]
                drawn = np.concatenate([drawn, others], -1)
            below = []
            for node in level:
                for _ in range(k + fixed):
                    below.append(len(parents))
                    parents.append(node)
                    depth_of.append(depth + 1)
            tokens.append(drawn.reshape(n, -1))
            contexts.append(CHILD[at[..., None], drawn].reshape(n, -1))
            level = below
        width = len(parents)
        self.n, self.branching, self.fixed = n, branching, fixed
        flat = np.concatenate(tokens, 1).astype(np.int32).reshape(-1)
        starts = np.arange(0, n * width + 1, width, dtype=np.int32)
        parents = np.tile(np.array(parents, np.int32), n)
        self.rows = Rows(flat, parents, starts, row_depths(parents, starts))
        self.contexts = np.concatenate(contexts, 1).reshape(-1)
        inner = np.tile(np.array(depth_of) < len(branching), n)
        k = np.array([*branching, 0])[np.tile(np.array(depth_of), n)]
        self.index = np.where(inner, self.contexts, -1).astype(np.int32)
        self.drawn = np.where(inner, k, 0).astype(np.int32)

    @staticmethod
    def _draw(rng, q, k, mode):
        if mode == "with":
            cdf = q.cumsum(-1)
            return (rng.random((*q.shape[:-1], k, 1)) >= cdf[..., None, :-1]).sum(-1)
        noise = rng.gumbel(size=q.shape) if mode == "without" else 0.0
        return np.argsort(-(np.log(q) + noise), -1, kind="stable")[..., :k]

    @staticmethod
    def _others(drawn, depth):
        """Tokens that were not drawn, in an order that ignores the draws."""
        order = np.array(sorted(range(V), key=lambda x: (x * 7 + depth) % 5))
        taken = (drawn[..., None] == order).any(-2)
        first = np.argsort(taken, -1, kind="stable")
        return order[first]

    def verify(self, rule, deterministic=False) -> tuple[float, float, float]:
        """(distance from the target's distribution, tokens per step, its standard error)."""
        torch.manual_seed(3)
        draft_probs = DraftProbs(torch.tensor(Q, dtype=torch.float32), self.index, self.drawn)
        if deterministic:
            draft_probs.index, draft_probs.drawn = (
                np.full_like(self.index, -1),
                np.zeros_like(self.drawn),
            )
        rows = self.rows
        p = torch.tensor(P[self.contexts], dtype=torch.float32)
        sampled = verify(
            rule, p, rows, draft_probs, torch.rand(len(rows.tokens)), torch.rand(self.n)
        ).numpy()
        path, lengths = accepted_paths(rows.tokens, rows.parents, rows.starts, sampled)
        output = np.where(path >= 0, sampled[rows.starts[:-1, None] + np.maximum(path, 0)], -1)
        counts = Counter(tuple(t for t in row if t >= 0) for row in output.tolist())
        found = {text: Fraction(count, self.n) for text, count in counts.items()}
        return float(oracle.tv(found)), lengths.mean(), lengths.std() / self.n**0.5


def verify(rule, *step):
    return rule_class(rule)().reference(*step)


def floor(n):
    """Expected distance of a sample of ``n`` from its own distribution of 64 texts."""
    return (64 / (2 * np.pi * n)) ** 0.5


RIGHT = [
    ("without_replacement", [1, 1], "with", {}, oracle.step([1, 1], "with", "keepq")),
    ("without_replacement", [1, 1, 1], "with", {}, oracle.step([1, 1, 1], "with", "keepq")),
    ("with_replacement", [2, 2], "with", {}, oracle.step([2, 2], "with", "keepq")),
    ("without_replacement", [2, 2], "without", {}, oracle.step([2, 2], "without", "renormq")),
    ("without_replacement", [3, 2], "without", {}, oracle.step([3, 2], "without", "renormq")),
    ("block", [1, 1], "with", {}, oracle.block(2)),
    ("block", [1, 1, 1], "with", {}, oracle.block(3)),
    ("traversal", [1, 1], "with", {}, oracle.block(2)),
    ("traversal", [2, 2], "without", {}, oracle.traversal([2, 2])),
    (
        "without_replacement", [1, 1], "with", {"fixed": 1},
        oracle.step([1, 1], "with", "keepq", extra=1),
    ),
    (
        "without_replacement", [2, 2], "without", {"fixed": 1},
        oracle.step([2, 2], "without", "renormq", extra=1),
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "branching", "mode", "keys", "found"), RIGHT)
def test_right_rules(rule, branching, mode, keys, found):
    assert oracle.tv(found) == 0
    n = 20_000
    distance, tokens, error = Drafts(branching, mode, n, **keys).verify(rule)
    assert distance < 1.5 * floor(n)
    assert tokens == pytest.approx(float(oracle.elen(found)), abs=4 * error)


@pytest.mark.parametrize("mode", ["top", "without"])
def test_any_draft_may_be_verified_as_deterministic(mode):
    n = 20_000
    distance, tokens, error = Drafts([2, 2], mode, n).verify("traversal", deterministic=True)
    found = oracle.step([2, 2], mode, "onehot")
    assert distance < 1.5 * floor(n)
    assert tokens == pytest.approx(float(oracle.elen(found)), abs=4 * error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("k", "rho", "accepted"), [(1, 1.0, 0.6), (2, 1.5, 0.75), (3, 1.93377, 0.79669)]
)
def test_k_seq(k, rho, accepted):
    p, q = torch.tensor(P[0]), torch.tensor(Q[0])
    assert best_rho(p, q, k) == pytest.approx(rho, abs=1e-5)
    n = 8_000
    distance, tokens, error = Drafts([k], "with", n).verify("k_seq")
    assert distance < 1.5 * floor(n)
    assert tokens == pytest.approx(1 + accepted, abs=4 * error)


@pytest.mark.slow
def test_k_seq_over_two_levels():
    distance, tokens, _ = Drafts([2, 2], "with", 8_000).verify("k_seq")
    assert distance < 1.5 * floor(8_000)
    assert tokens > float(oracle.elen(oracle.step([2, 2], "with", "keepq")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "mode", "order", "n"),
    [
        ("with_replacement", "without", None, 60_000),  # q not renormalised: .0577
        ("without_replacement", "with", None, 60_000),  # q renormalised: .0610
        ("without_replacement", "without", lambda q: -q, 20_000),  # sorted by q: .1855
        ("without_replacement", "without", lambda q: np.arange(V) + 0 * q, 20_000),  # by id: .2577
        ("without_replacement", "top", None, 20_000),  # top-k with p/q: .665
        ("traversal", "without", lambda q: -q, 20_000),
    ],
)
def test_wrong_uses_are_noticed(rule, mode, order, n):
    distance, _, _ = Drafts([2, 2], mode, n, order).verify(rule)
    assert distance > 3 * floor(n)


def test_a_mixed_batch():
    """A chain, a root alone, a deterministic tree and a drawn one; q shorter than p."""
    torch.manual_seed(0)
    p = torch.rand(9, 6).softmax(-1)
    q = torch.rand(2, 4).softmax(-1)
    parents = np.array([-1, 0, 1, -1, -1, 0, 0, -1, 0], np.int32)
    starts = np.array([0, 3, 4, 7, 9], np.int32)
    tokens = np.array([0, 0, 0, 0, 0, 3, 5, 0, 0], np.int32)
    rows = Rows(tokens, parents, starts, row_depths(parents, starts))
    draft_probs = DraftProbs(
        q, np.array([0, 1, -1, -1, -1, -1, -1, 1, -1], np.int32),
        np.array([1, 1, 0, 0, 0, 0, 0, 1, 0], np.int32),
    )  # fmt: skip
    counts = np.zeros((4, 6))
    for _ in range(4000):
        tokens[[1, 2, 8]] = q[[0, 1, 1]].multinomial(1)[:, 0]
        sampled = verify("traversal", p, rows, draft_probs, torch.rand(9), torch.rand(4)).numpy()
        assert (sampled[starts[:-1]] >= 0).all()
        np.add.at(counts, (np.arange(4), sampled[starts[:-1]]), 1)
    np.testing.assert_allclose(counts / 4000, p[starts[:-1].tolist()].numpy(), atol=0.04)


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_a_draft_that_has_nothing_left(rule):
    """q is certain of a token that p excludes: the siblings repeat it, and all are rejected."""
    p, q = torch.eye(3)[[0, 1, 1, 1]], torch.eye(3)[[2, 2]]
    parents, starts = np.array([-1, 0, 0, 2], np.int32), np.array([0, 4], np.int32)
    rows = Rows(np.array([0, 2, 2, 2], np.int32), parents, starts, row_depths(parents, starts))
    draft_probs = DraftProbs(q, np.array([0, -1, 1, -1]), np.array([2, 0, 1, 0]))
    for noise in (0.0, 0.5, 0.999):
        sampled = verify(
            rule, p, rows, draft_probs, torch.full((4,), noise), torch.full((1,), noise)
        )
        assert sampled.tolist() == [0, -1, -1, -1]


def test_what_rules_over_whole_trees_do_not_take():
    parents, starts = np.array([-1, 0, 0], np.int32), np.array([0, 3], np.int32)
    rows = Rows(np.array([0, 1, 2], np.int32), parents, starts, row_depths(parents, starts))
    p, noise = torch.full((3, 4), 0.25), torch.zeros(3)
    draft_probs = DraftProbs(p[:1], np.array([0, -1, -1]), np.array([1, 0, 0]))
    for rule in ("block", "traversal"):
        with pytest.raises(ValueError, match="no deterministic siblings"):
            verify(rule, p, rows, draft_probs, noise, noise[:1])
    draft_probs.drawn[0] = 2
    with pytest.raises(ValueError, match="chains only"):
        verify("block", p, rows, draft_probs, noise, noise[:1])
