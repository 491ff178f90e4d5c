"""The most probable tree of a block's distributions, all of which are known at once.

A head that drafts a block in one pass gives a distribution for each depth. DDTree (liranringel's)
grows the tree best first from a heap: the most probable prefix is taken, and its next sibling and
its first child take its place. No prefix is more probable than what it goes on from, so the first B
that are taken are the B most probable ones: the tree of B nodes of which most become text, if the
distributions are right. Where they depend on the parent's token (DSpark's Markov head), the same
holds, with the law of each parent in place of one for all.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit


@dataclass(slots=True)
class Laws:
    """What each of A trees may hold: K candidates per depth, and how probable they are."""

    tokens: np.ndarray
    """int32 [A, D, K]"""
    given: np.ndarray
    """float32 [A, D, P, K] log-probabilities in descending order, by the parent's number among its
    depth's candidates; P is 1 where it does not matter, else K. The first depth has one parent.
    They sum to less than 1 where a law is not fully trusted: what it gives then counts for less."""
    order: np.ndarray
    """int32 [A, D, P, K] numbers of the candidates in that order."""

    @classmethod
    def of(cls, tokens: torch.Tensor, given: torch.Tensor) -> Laws:
        """``tokens`` int64 [A, D, K]; ``given`` float32 [A, D, P, K] log-probabilities, of the
        candidates in the order of ``tokens``."""
        given, order = given.sort(dim=-1, descending=True, stable=True)
        return cls(
            *(each.contiguous().cpu().numpy() for each in (tokens.int(), given, order.int()))
        )

    @classmethod
    def joined(cls, parts: list[Laws]) -> Laws:
        """Those of several groups of trees."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("tokens", "given", "order")
            )
        )


@dataclass(slots=True)
class Tree:
    """The ``n`` most probable nodes of one tree, the most probable first."""

    tokens: np.ndarray
    """int32 [n]"""
    parents: np.ndarray
    """int32 [n] nodes, -1 = root."""
    given: np.ndarray
    """float32 [n] probability of each, given its parent."""
    astray: np.ndarray
    """bool [n] is its parent, or one further up, not the most probable of its siblings?"""


def best_first(laws: Laws, tree: int, budget: int, chain: bool = False) -> Tree:
    """The ``budget`` most probable prefixes of one of the trees; ``chain``: only the path of most
    probable tokens."""
    out = np.empty((2, budget), np.int32)
    given, astray = np.empty(budget, np.float32), np.empty(budget, np.bool_)
    n = _grow(laws.tokens[tree], laws.given[tree], laws.order[tree], chain, out, given, astray)
    return Tree(out[0, :n], out[1, :n], given[:n], astray[:n])


@njit(cache=True, nogil=True)
def _grow(tokens, given, order, chain, out, probabilities, astray):
    """Fill ``out`` int32 [2, B] (tokens, parents) and the others; returns the number of nodes."""
    depths, parents, width = given.shape
    budget = out.shape[1]
    number = np.empty(budget, np.int64)  # of each node among its depth's candidates
    ranks = np.empty(budget, np.int64)
    prefix = np.empty(budget, np.float64)  # log-probability
    # (-log-probability, tie-breaker, depth, parent, rank among the siblings)
    heap = [(-np.float64(given[0, 0, 0]), 0, 0, -1, 0)]
    pushed, count = 1, 0
    while heap and count < budget:
        cost, _, depth, parent, rank = heapq.heappop(heap)
        if cost == np.inf:
            break
        above = 0.0 if parent < 0 else prefix[parent]
        law = number[parent] if parents > 1 and parent >= 0 else 0
        number[count] = order[depth, law, rank]
        out[0, count], out[1, count] = tokens[depth, number[count]], parent
        probabilities[count] = np.exp(given[depth, law, rank])
        astray[count] = parent >= 0 and (astray[parent] or ranks[parent] > 0)
        prefix[count], ranks[count] = -cost, rank
        if rank + 1 < width and not chain:
            sibling = -(above + given[depth, law, rank + 1])
            heapq.heappush(heap, (sibling, pushed, depth, parent, rank + 1))
            pushed += 1
        if depth + 1 < depths:
            law = number[count] if parents > 1 else 0
            child = cost - given[depth + 1, law, 0]
            heapq.heappush(heap, (child, pushed, depth + 1, count, 0))
            pushed += 1
        count += 1
    return count


def every_prefix(laws: Laws, tree: int) -> dict[tuple[int, ...], float]:
    """Token by token, all prefixes and their probabilities: the reference of :func:`best_first`,
    whose nodes are the first of these by probability."""
    depths, width = laws.tokens.shape[1:]
    found = {}
    for depth in range(1, depths + 1):
        for path in itertools.product(range(width), repeat=depth):
            logarithm, parent = 0.0, 0
            for at, candidate in enumerate(path):
                law = parent if laws.given.shape[2] > 1 and at else 0
                place = int(np.flatnonzero(laws.order[tree, at, law] == candidate)[0])
                logarithm += float(laws.given[tree, at, law, place])
                parent = candidate
            ids = tuple(int(laws.tokens[tree, at, each]) for at, each in enumerate(path))
            found[ids] = float(np.exp(logarithm))
    return found


def factorised(
    logits: torch.Tensor, width: int, tokens: torch.Tensor | None = None,
    trust: torch.Tensor | None = None,
) -> Laws:  # fmt: skip
    """Laws that do not depend on parents: the ``width`` most probable tokens of each depth.

    ``logits`` float32 [A, D, V']; ``tokens`` int64 [V']: their ids, None: as they are numbered;
    ``trust`` float32 [A, D, 1] logarithms of how far each law can be trusted, None: fully.
    """
    given, ids = logits.log_softmax(-1).topk(min(width, logits.shape[-1]), -1)
    if trust is not None:
        given = given + trust
    return Laws.of(ids if tokens is None else tokens[ids], given[:, :, None])


def markov(
    logits: torch.Tensor, width: int, anchors: torch.Tensor, rows: torch.Tensor,
    columns: torch.Tensor, tokens: torch.Tensor | None = None,
    trust: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Laws:  # fmt: skip
    """Laws of a child given its parent, softmax(U + W2 W1[parent]) over the ``width`` candidates of
    each depth: those most probable by U, of the first depth by the law itself.

    ``logits`` float32 [A, D, V'] U; ``anchors`` int64 [A] the newest tokens; ``rows`` [V, r] W1,
    ``columns`` [V', r] W2; ``tokens`` int64 [V'] the ids of the tokens that W2 and U are of;
    ``trust``: of W1 of the tokens before [A, D, K, r], logarithms float32 [A, D, K or 1] of how far
    each law can be trusted, None: fully.
    """
    width = min(width, logits.shape[-1])
    first = (logits[:, 0] + (rows[anchors] @ columns.T).float()).log_softmax(-1)
    best, number = first.topk(width, -1)
    own = torch.cat((number[:, None], logits[:, 1:].topk(width, -1).indices), 1)
    ids = own if tokens is None else tokens[own]
    before = torch.cat((anchors[:, None, None].expand(-1, 1, width), ids[:, :-1]), 1)
    before = rows[before]  # [A, D, K, r]
    bias = before[:, 1:] @ columns[own[:, 1:]].transpose(-1, -2)  # [A, D - 1, K, K]
    later = logits[:, 1:].gather(-1, own[:, 1:])[:, :, None] + bias.float()
    given = torch.cat((best[:, None, None].expand(-1, 1, width, -1), later.log_softmax(-1)), 1)
    if trust is not None:
        given = given + trust(before)[..., None]
    return Laws.of(ids, given)
