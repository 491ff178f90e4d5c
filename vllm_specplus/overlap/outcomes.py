"""What will most probably come of a step: its outcomes, and how probable the draft thinks them.

A step's text gains the tokens of a path of its tree and one more, which no node below that path's
end has. So an *outcome* is an edge that the tree lacks: a place in it (a node, or -1: the text's
end) and a token that is none of its children. Exactly one of them comes true. PEARL
(arXiv 2408.11850) goes on from the end of its chain with the draft's own next token; of a tree any
place may be the end, and the most probable outcomes are taken wherever they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

_NONE = np.empty(0, np.int32)
#: Probabilities below are taken for it.
_LEAST = 1e-9


@dataclass(slots=True)
class DraftedTree:
    """A tree of n nodes, in topological order, as a step verifies it."""

    tokens: np.ndarray = field(default_factory=lambda: _NONE)
    """int32 [n]"""
    parents: np.ndarray = field(default_factory=lambda: _NONE)
    """int32 [n], -1: the text's end."""
    sources: np.ndarray = field(default_factory=lambda: _NONE)
    """int32 [n] which of the proposer's sources."""
    drawn_from: np.ndarray = field(default_factory=lambda: _NONE)
    """int32 [n] row of ``q``, -1: no draw."""
    q: torch.Tensor | None = None
    """float32 [m, V'] what nodes were drawn from; None: nothing was drawn."""

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> DraftedTree:
        """Its first ``count`` nodes: of a tree that was drafted level by level its upper levels, of
        one grown best first the best."""
        if count >= len(self):
            return self
        return DraftedTree(
            self.tokens[:count], self.parents[:count], self.sources[:count],
            self.drawn_from[:count], self.q,
        )  # fmt: skip

    def path(self, node: int) -> list[int]:
        """Tokens from the text's end to ``node`` (-1: none)."""
        tokens = []
        while node >= 0:
            tokens.append(int(self.tokens[node]))
            node = int(self.parents[node])
        return tokens[::-1]

    def depths(self) -> np.ndarray:
        """int32 [n], from 1."""
        depths = np.ones(len(self), np.int32)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                depths[i] = depths[parent] + 1
        return depths


@dataclass(frozen=True, slots=True)
class Outcome:
    """An edge that a tree lacks."""

    node: int
    """Where the path ends, -1: at the text's end."""
    token: int


def likely_outcomes(
    tree: DraftedTree, ids: np.ndarray, log_q: np.ndarray, followed: np.ndarray, count: int,
    deepest: bool = False,
) -> list[Outcome]:  # fmt: skip
    """The ``count`` most probable outcomes of a tree of n nodes, the best first; fewer if there are
    not so many.

    ``ids`` int [n + 1, k], ``log_q`` float [n + 1, k]: the draft's k most probable tokens behind
    the text (row 0) and behind every node, best first, and their log-probabilities; ``followed``
    float [depths]: as ``Asked.followed``, of this request; ``deepest``: only behind the deepest
    nodes.

    To a node that is no draw the text comes with the draft's probability. A drawn one is there
    *because* it was drawn, and says nothing of what else was possible: it is accepted at the rate
    at which drawn nodes are. Siblings are tried one after the other.
    """
    nodes, depths = len(tree), tree.depths()
    reached = np.zeros(nodes + 1)  # log-probability that the path comes to each place
    left = np.zeros(nodes + 1)  # ... that it takes none of the place's drawn children
    rate = np.empty(nodes)
    for i, parent in enumerate(tree.parents):
        level = float(followed[min(depths[i], len(followed)) - 1])
        siblings = int((tree.parents == parent).sum())
        rate[i] = min(max(1 - (1 - level) ** (1 / siblings), _LEAST), 1 - _LEAST)
    for i, parent in enumerate(tree.parents):
        above = int(parent) + 1
        if tree.drawn_from[i] >= 0:
            reached[i + 1] = reached[above] + left[above] + np.log(rate[i])
            left[above] += np.log1p(-rate[i])
        else:
            same = np.flatnonzero(ids[above] == tree.tokens[i])
            reached[i + 1] = reached[above] + log_q[above, same[0] if len(same) else -1]
    places = np.arange(nodes + 1)
    if deepest:
        levels = np.append(np.int32(0), depths)
        places = places[levels == levels.max()]
    found: list[tuple[float, Outcome]] = []
    for place in places.tolist():
        children = tree.tokens[tree.parents == place - 1]
        for token, value in zip(ids[place].tolist(), log_q[place].tolist(), strict=True):
            if token not in children:
                outcome = Outcome(place - 1, token)
                found.append((float(reached[place] + left[place] + value), outcome))
    found.sort(key=lambda each: -each[0])  # stable: among equals the place that is higher up
    return [outcome for _, outcome in found[:count]]
