"""After how many layers a draft leaves the target: where most tokens per layer run are expected.

DEL (arXiv 2504.05598). For every exit it is known how often it said what the whole target said,
and how sure it was then and otherwise; lately, since traffic changes. ``l`` counts layers from 1.
"""

from __future__ import annotations

import copy

import numpy as np

#: Memory of what was right and wrong, per round.
MEMORY = 0.95


def tokens_per_layer(right: float, layers: int, num_layers: int, drafted: int) -> float:
    """Expected tokens per layer run (DEL, section 3), ``sum_{j <= g} a^j / (L + g l)``.

    ``right``: a, share of right predictions after ``layers`` l of ``num_layers`` L;
    ``drafted``: g, tokens per round.
    """
    return sum(right**j for j in range(drafted + 1)) / (num_layers + drafted * layers)


def best_exit(right: np.ndarray, exits: list[int], num_layers: int, most: int) -> tuple[int, int]:
    """The exit, and the number of drafted tokens up to ``most``, of the most tokens per layer.

    ``right`` float64 [exits], NaN where nothing is known, which no other number beats. Of equals
    the shallow exit, and the short draft.
    """
    found = [
        (tokens_per_layer(share, layers, num_layers, drafted), -layers, -drafted)
        for share, layers in zip(right.tolist(), exits, strict=True)
        for drafted in range(most + 1)
        if share == share or not drafted
    ]
    _, layers, drafted = max(found)
    return -layers, -drafted


class ExitChoice:
    """The exit by what :meth:`observe` was told of all requests together."""

    def __init__(self, exits: list[int], num_layers: int, max_depth: int):
        self.exits = sorted(exits)
        self._num_layers, self._max_depth = num_layers, max_depth
        self._right = np.zeros(len(exits))
        self._seen = 0.0

    def observe(self, right: np.ndarray, seen: int) -> None:
        """``right`` int64 [exits] of ``seen`` tokens were predicted after each exit."""
        self._right = MEMORY * self._right + right
        self._seen = MEMORY * self._seen + seen

    @property
    def best(self) -> int:
        """Layers to run, each exit judged at its best number of drafted tokens."""
        share = self._right / max(self._seen, 1)
        return best_exit(share, self.exits, self._num_layers, self._max_depth)[0]


class ExitStatistics:
    """Of one request: DEL's counts and confidences of all its exits."""

    def __init__(self, exits: int):
        self._counts, self._confidences = np.zeros((2, 2, exits))  # right, wrong

    def observe(self, right: np.ndarray, confidence: np.ndarray) -> None:
        """A round's positions, up to the first token that was rejected, that one included: was the
        exit's best token the target's, bool [n, exits], and how sure was it, float [n, exits]?"""
        for sums, each in ((self._counts, 1.0), (self._confidences, confidence)):
            news = np.stack(((right * each).sum(0), (~right * each).sum(0)))
            sums *= MEMORY
            sums += news

    def copy(self) -> ExitStatistics:
        """The same, to go on from."""
        return copy.deepcopy(self)

    @property
    def right(self) -> np.ndarray:
        """a_l, float64 [exits]; NaN before the first round."""
        seen = self._counts.sum(0)
        return np.divide(self._counts[0], seen, out=np.full_like(seen, np.nan), where=seen > 0)

    @property
    def tau(self) -> np.ndarray:
        """(c+ + c-) / 2, float64 [exits]: the confidence below which a draft stops; NaN where right
        or wrong ones have not been seen."""
        counts = self._counts
        mean = np.divide(
            self._confidences, counts, out=np.full_like(counts, np.nan), where=counts > 0
        )
        return mean.sum(0) / 2
