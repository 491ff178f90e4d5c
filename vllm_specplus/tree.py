"""Draft trees as flat arrays.

A request's draft is a tree below its *root*, the last sampled token, whose KV is
not in the cache yet. Nodes are numbered 0.. in topological order; ``parents[i]``
is a node or -1 for the root. *Rows* are what the target model verifies: row 0 is
the root, row i + 1 is node i. Everything here is NumPy (compiled by numba where
it loops); nothing knows vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

if TYPE_CHECKING:
    import torch


class DraftTokens(list):
    """A request's draft tokens as the list vLLM's scheduler carries.

    Tree structure rides along in ``parents``: it survives the scheduler's prefix
    cut and pickling to every rank. A plain list (``parents`` lost in a copy)
    reads as a chain, which is always safe to verify.
    """

    __slots__ = ("parents",)

    def __init__(self, tokens: Sequence[int] = (), parents: np.ndarray | None = None):
        super().__init__(tokens)
        self.parents = parents

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if isinstance(index, slice) and self.parents is not None:
            if index.start not in (None, 0) or index.step not in (None, 1):
                return item  # not a prefix: no longer a tree below the same root
            return DraftTokens(item, self.parents[: len(item)])
        return item

    def __reduce__(self):
        return DraftTokens, (list(self), self.parents)


@dataclass(slots=True)
class DraftBatch:
    """The drafts of R requests, back to back."""

    tokens: np.ndarray
    """int32 [N] token of each node."""
    parents: np.ndarray
    """int32 [N] parent within the request's nodes, -1 = root."""
    counts: np.ndarray
    """int32 [R] nodes of each request."""
    sources: np.ndarray | None = None
    """int32 [N] index into the proposer's ``sources``: which rule proposed the node."""
    draft_probs: torch.Tensor | None = None
    """float32 [M, V'] on the target's device: distributions that nodes were drawn from;
    ids from V' on have probability 0."""
    drawn_from: np.ndarray | None = None
    """int32 [N] row of ``draft_probs`` that each node was drawn from, siblings in draw order;
    -1: the node is no draw but a function of the past."""
    next_probs: torch.Tensor | None = None
    """float32 [A, V'] on the target's device: a draft model's distributions behind the texts that
    it drafted for; None: there is no such model."""
    next_row: np.ndarray | None = None
    """int32 [R] row of ``next_probs`` for each request, -1: it has none."""

    @classmethod
    def empty(cls, num_requests: int) -> DraftBatch:
        none = np.empty(0, np.int32)
        return cls(none, none, np.zeros(num_requests, np.int32))

    @property
    def has_trees(self) -> bool:
        """Is some request's draft no chain?"""
        starts = np.cumsum(self.counts) - self.counts
        above = np.arange(len(self.parents)) - np.repeat(starts, self.counts) - 1
        return bool((self.parents != above).any())

    def split(self) -> list[DraftTokens]:
        """One scheduler list per request; chains carry no ``parents``."""
        out, start = [], 0
        for count in self.counts.tolist():
            parents = self.parents[start : start + count]
            chain = bool((parents == np.arange(-1, count - 1)).all())
            tokens = self.tokens[start : start + count].tolist()
            # A copy: the scheduler may keep it for steps, the proposer reuses its arrays.
            out.append(DraftTokens(tokens, None if chain else parents.copy()))
            start += count
        return out


# Signatures make numba compile at import, while the engine starts, not in its first step.
@njit("int32[::1](int32[::1], int32[::1])", cache=True)
def row_depths(parents, starts):
    """Depth of every row, the root's being 0.

    ``parents`` int32 [L]: parent *row* within the request, -1 for roots;
    ``starts`` int32 [R + 1] first row of each request. Returns int32 [L].
    """
    depths = np.zeros(parents.shape[0], np.int32)
    for r in range(starts.shape[0] - 1):
        for i in range(starts[r] + 1, starts[r + 1]):
            depths[i] = depths[starts[r] + parents[i]] + 1
    return depths


@njit("bool_[:, ::1](int32[::1], int32[::1], int64)", cache=True)
def ancestor_mask(parents, starts, width):
    """bool [L, width]: may row i see row j of its own request (ancestor-or-self)?"""
    mask = np.zeros((parents.shape[0], width), np.bool_)
    for r in range(starts.shape[0] - 1):
        for i in range(starts[r], starts[r + 1]):
            if parents[i] >= 0:
                mask[i] = mask[starts[r] + parents[i]]
            mask[i, i - starts[r]] = True
    return mask


def moves(path: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows' keys and values have to be copied, once a path was accepted.

    A tree's rows lie in the KV cache at consecutive slots after the context, in node order. Keys
    carry the rotary phase of the node's depth, which is its final position; so the accepted rows
    only have to be copied, in the order of the path, to the slots right after the root.

    ``path`` int32 [R, width] as :func:`accepted_paths` returns it. Returns (request, source row,
    destination row), int64 [n] each, in an order safe to copy in: row ``path[r, j]`` becomes row j
    of its request, and a path never descends below its own column, so no source is overwritten
    before it is read.
    """
    columns = np.arange(path.shape[1])
    request, column = np.nonzero((path != columns) & (path >= 0))
    return request, path[request, column].astype(np.int64), column


@njit(
    "Tuple((int32[:, ::1], int32[::1]))(int32[::1], int32[::1], int32[::1], int32[::1])", cache=True
)
def accepted_paths(tokens, parents, starts, sampled):
    """Follow, from every root, the child that equals the token sampled at its parent.

    ``tokens``, ``parents``, ``sampled`` int32 [L] (the target's own sample at each
    row), ``starts`` int32 [R + 1]. Returns ``path`` int32 [R, width], the accepted
    rows of each request starting with its root's 0 and padded with -1, and
    ``lengths`` int32 [R]. The request's output is ``sampled`` along its path: the
    accepted nodes' tokens, then one token that no draft node predicted.

    Siblings of equal token: the first one wins; the other is never visited. A row whose
    ``sampled`` is negative is not entered: the token before it ends the output.
    """
    num_requests = starts.shape[0] - 1
    width = 1
    for r in range(num_requests):
        width = max(width, starts[r + 1] - starts[r])
    path = np.full((num_requests, width), -1, np.int32)
    lengths = np.ones(num_requests, np.int32)
    for r in range(num_requests):
        first = starts[r]
        row = 0
        path[r, 0] = 0
        # Children come after their parent, so one forward scan finds the path.
        for i in range(1, starts[r + 1] - first):
            if (
                parents[first + i] == row
                and tokens[first + i] == sampled[first + row]
                and sampled[first + i] >= 0
            ):
                row = i
                path[r, lengths[r]] = row
                lengths[r] += 1
    return path, lengths
