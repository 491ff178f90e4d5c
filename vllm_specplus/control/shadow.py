"""Drafts that are made and never verified: what would they have brought?

Undrafted, a text grows by one token a step, so the trees of a step are compared with it only after
as many steps as levels may have been followed.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from vllm_specplus.control.outcomes import DraftedTrees
from vllm_specplus.metrics import Counters

#: Steps that trees are kept for; of deeper levels nothing is learnt.
LEVELS = 8


class Shadow:
    """Keeps the trees of the last steps, and counts what they would have made of them."""

    def __init__(self, counters: Counters):
        self._counters = counters
        self._kept: deque[tuple[DraftedTrees, float, float]] = deque()
        self._seconds = (0.0, 0.0)  # of the step compared last

    def keep(self, trees: DraftedTrees, seconds: float, plain: float) -> None:
        """A step with these trees would have taken ``seconds``; it takes ``plain``."""
        self._kept.append((trees, seconds, plain))

    def due(self) -> DraftedTrees | None:
        """The trees that the texts have had the time to follow, if any; to be compared next."""
        if len(self._kept) <= LEVELS:
            return None
        trees, seconds, plain = self._kept.popleft()
        self._seconds = seconds, plain
        return trees

    def compared(self, gained: np.ndarray) -> None:
        """Those requests of the trees that go on would have gained ``gained`` int [R] tokens."""
        seconds, plain = self._seconds
        self._counters.add("shadow_request_steps", len(gained))
        self._counters.add("shadow_tokens", len(gained) + int(gained.sum()))
        self._counters.add("shadow_seconds", seconds)
        self._counters.add("shadow_plain_seconds", plain)

    def forget(self, request_id: str) -> None:
        """Its trees are no guess about what comes under that id from now on."""
        for trees, _, _ in self._kept:
            trees.forget(request_id)
