"""Acceptance at a given rate, whatever target and draft say: for planning. **Texts are nonsense.**

What an engine would do with a draft of this quality, before there is one: steps, memory and times
are those of real trees, tokens are not. vLLM has the same for its own methods
(``rejection_sample_method="synthetic"``).
"""

from __future__ import annotations

import numpy as np

from vllm_specplus.samplers.rules import Nodes, Rule
from vllm_specplus.step import Rows


class Synthetic(Rule):
    """Accepts the first child of every accepted row with probability ``rate``, and no other."""

    name = "synthetic"
    verifies = frozenset({Nodes.DETERMINISTIC})

    def __init__(self, *, rate: float):
        self._rate = rate
        self._rng = np.random.default_rng(0)

    def choose(
        self, rows: Rows, sampled: np.ndarray, stops: list[frozenset[int] | None]
    ) -> tuple[np.ndarray, int]:
        """Returns the target's draws ``sampled`` int32 [L], with other tokens on the accepted
        paths, and how many of the accepted ones the target did not draw.

        A draw that a child holds makes room for another token where the child is not accepted. Rows
        of requests whose ``stops`` [R] are None are left as they are.
        """
        out, count = sampled.copy(), 0
        coins = self._rng.random(len(sampled))
        for r, stop in enumerate(stops):
            if stop is None:
                continue
            first, end = int(rows.starts[r]), int(rows.starts[r + 1])
            row = first
            while True:
                children = row + 1 + np.flatnonzero(rows.parents[row + 1 : end] == row - first)
                held = [int(token) for token in rows.tokens[children]]
                if not (held and self.reference(coins[row]) and held[0] not in stop):
                    break
                count += int(sampled[row]) != held[0]
                out[row], row = held[0], int(children[0])
            if int(sampled[row]) in held:
                taken = stop.union(held)
                out[row] = next(token for token in range(len(taken) + 1) if token not in taken)
        return out, count

    def reference(self, coin: float) -> bool:
        """Decides on one node by a uniform draw of [0, 1)."""
        return coin < self._rate
