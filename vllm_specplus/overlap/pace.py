"""When to wait for drafts that are made elsewhere, how long, and what they cost.

A step whose outcome was foreseen has its trees at once. After any other the engine may wait until
they are drafted, as it would without overlap, or verify no trees in this step (PEARL's pre-verify)
and have the outcome of *that* foreseen. Waiting costs the seconds ``D`` of drafting and brings the
tokens ``E`` of a tree. In return the next step need not wait if its outcome is foreseen, which
happens at the rate ``h`` after a step with trees and ``a`` after one without. A token is worth the
seconds that one takes at present, so that waiting pays if

    worth * E > D (1 - h + a)

which is a step of policy improvement for the average tokens per second. PEARL itself never waits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import numpy as np

#: Share of the newest value in averages.
NEWEST = 0.1
#: The engine waits as long as the slowest of so many of the latest rounds took per pass.
SLOWEST_OF = 16
#: Before any was measured.
FIRST_SECONDS = 1.0
#: A step that took so many times what they take was no step.
PAUSE = 20
#: Rates at which outcomes are foreseen, and nodes accepted, before anything is known.
UNKNOWN = 0.5


class Average:
    """A moving average; its first values are averaged plainly."""

    def __init__(self, value: float = 0.0):
        self.value, self._count = value, 0

    def add(self, value: float) -> None:
        self._count += 1
        self.value += max(NEWEST, 1 / self._count) * (value - self.value)


class Pace:
    """Of one engine and one draft."""

    def __init__(self, paper: bool, clock: Callable[[], float] = time.perf_counter):
        """``paper``: never wait for a draft that was not foreseen; ``clock`` returns seconds."""
        self._paper, self._clock = paper, clock
        self._passes: deque[float] = deque(maxlen=SLOWEST_OF)
        self._foreseen = {True: Average(UNKNOWN), False: Average(UNKNOWN)}
        self._step, self._tokens, self._waited = Average(), Average(), Average(1.0)
        self._last: tuple[float, dict[str, int]] | None = None

    # -- what happened ------------------------------------------------------------------

    def stepped(self, lengths: dict[str, int]) -> None:
        """A step is over: ``lengths`` of the texts by request."""
        now = self._clock()
        if self._last is not None:
            then, before = self._last
            gained = sum(n - before[name] for name, n in lengths.items() if name in before)
            if gained and not (self._step.value and now - then > PAUSE * self._step.value):
                self._step.add(now - then)
                self._tokens.add(gained)
        self._last = now, lengths

    def answered(self, foreseen: bool, verified: bool) -> None:
        """Was the outcome of a request's step foreseen, of one that ``verified`` a tree or not?"""
        self._foreseen[verified].add(float(foreseen))

    def passed(self, seconds: float | None) -> None:
        """The draft took so long per pass lately."""
        if seconds is not None:
            self._passes.append(seconds)

    def waited(self, seconds: float, depth: int) -> None:
        """Drafts of ``depth`` levels were waited for so long, and are verified."""
        if self._passes:
            self._waited.add(min(seconds / self.drafting(depth), 1.0))

    # -- what follows ---------------------------------------------------------------------

    def drafting(self, depth: int) -> float:
        """Seconds that drafting ``depth`` levels takes: a pass for each, and the one that reads."""
        mean = sum(self._passes) / len(self._passes) if self._passes else 0.0
        return (depth + 1) * mean

    def worth(self, followed: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """Seconds that trees of ``depths`` int [R] levels are worth, float64 [R]; ``followed`` as
        ``Asked.followed``."""
        levels = np.arange(int(depths.max(initial=0)))
        table = followed[:, np.minimum(levels, followed.shape[1] - 1)]
        expected = np.where(levels < depths[:, None], np.cumprod(table, 1, dtype=float), 0.0)
        token = self._step.value / self._tokens.value if self._tokens.value else 0.0
        return expected.sum(1) * token

    def price(self, depth: int) -> float:
        """Trees of ``depth`` levels that are not there are waited for if they are worth more."""
        if self._paper:
            return math.inf
        if not (self._passes and self._tokens.value):
            return -1.0  # as without overlap
        after, before = self._foreseen[True].value, self._foreseen[False].value
        return self.drafting(depth) * (1 - after + before)

    def limit(self, depth: int) -> float:
        """Seconds after which drafts are no longer waited for: what they take where nothing is
        drafted ahead."""
        return (depth + 1) * max(self._passes) if self._passes else FIRST_SECONDS

    def charged(self, seconds: float, depth: int) -> float:
        """Of ``seconds`` that drafts of ``depth`` levels were waited for, what they will be waited
        for on average. A foreseen outcome hides all of it and another none, which a controller that
        saw them one by one would take for disturbances."""
        return self._waited.value * self.drafting(depth) if self._passes else seconds
