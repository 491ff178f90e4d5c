"""The levels of a draft model's trees.

A draft model pays a forward pass per level, whatever the level holds, so its trees are planned
and priced level by level: the text follows a tree to a level with the probability that every
level above was followed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numba import njit

from vllm_specplus.control.outcomes import DraftedTrees
from vllm_specplus.step import StepContext


# A signature makes numba compile at import, while the engine starts, not in its first step.
@njit("int64[::1](int32[::1], int32[::1])", cache=True)
def tree_depths(parents, starts):
    """Levels int64 [R] of trees whose nodes, parents first, are ``parents`` int32 [N], those of
    each from ``starts`` int32 [R + 1] on. (A level may hold fewer nodes than were planned.)"""
    depths = np.zeros(starts.shape[0] - 1, np.int64)
    depth = np.zeros(parents.shape[0], np.int64)
    for r in range(starts.shape[0] - 1):
        for i in range(starts[r], starts[r + 1]):
            above = parents[i]
            depth[i] = 1 if above < 0 else depth[starts[r] + above] + 1
            depths[r] = max(depths[r], depth[i])
    return depths


class Levels:
    """``D`` levels of fixed sizes, of which a tree has the first few."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = np.array(sizes)
        """int64 [D] nodes of each level."""
        self._above = np.concatenate(([0], np.cumsum(self.sizes)))

    def depths(self, nodes: np.ndarray) -> np.ndarray:
        """How many levels, int64 [R], trees of ``nodes`` int [R] have."""
        return (self._above[:-1] < nodes[:, None]).sum(1)

    def nodes(self, depths: np.ndarray) -> np.ndarray:
        """How many nodes, int64 [R], trees of ``depths`` int [R] levels have."""
        return self._above[depths]

    def survival(self, acceptance: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """Probability that the text follows a tree to each level, float64 [R, D]; 0 below the
        ``depths`` int64 [R] of the trees. ``acceptance`` float32 [R, depths, S] is the step's."""
        levels = np.arange(len(self.sizes))
        table = acceptance[:, np.minimum(levels, acceptance.shape[1] - 1), 0]
        survival = np.cumprod(table, axis=1, dtype=np.float64)
        survival[levels >= depths[:, None]] = 0.0
        return survival

    def ranked(self, survival: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The levels of all requests, the one with the most tokens per row first.

        ``survival`` float64 [R, D]; levels that no text reaches are left out. Returns of each
        of the K others its request int64 [K], its level int64 [K] and its survival float64 [K].
        """
        density = np.minimum.accumulate(survival / self.sizes, axis=1)
        order = np.argsort(-density.reshape(-1), kind="stable")
        order = order[survival.reshape(-1)[order] > 0]
        return *np.divmod(order, len(self.sizes)), survival.reshape(-1)[order]

    def as_chains(
        self, trees: DraftedTrees, rows: np.ndarray, gained: np.ndarray, step: StepContext
    ) -> DraftedTrees:
        """Turn every tree into the chain of its levels, right as far as the text followed it.

        ``rows`` int32 [R] finds the requests of ``trees`` in ``step``, -1 = gone; ``gained``
        int32 [R] tokens of each tree became text.
        """
        depths = tree_depths(np.ascontiguousarray(trees.parents, np.int32), trees.starts)
        starts = np.zeros(len(depths) + 1, np.int32)
        np.cumsum(depths, out=starts[1:])
        level = np.arange(starts[-1]) - np.repeat(starts[:-1], depths)
        request = np.repeat(rows, depths)
        # A request that is gone has row -1 and teaches nothing, whatever its tokens.
        position = np.repeat(trees.drafted_at, depths) + level
        tokens = step.token_ids[request, np.minimum(position, step.token_ids.shape[1] - 1)]
        wrong = level >= np.repeat(gained, depths)
        return replace(
            trees,
            tokens=np.where(wrong, -1, tokens).astype(np.int32),
            parents=(level - 1).astype(np.int32),
            sources=np.zeros(len(level), np.int32),
            starts=starts,
        )
