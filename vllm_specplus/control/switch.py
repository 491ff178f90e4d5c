"""When speculation is off, and what keeps that decision honest.

What is not done teaches nothing: while speculation is off nobody learns that drafts would be
accepted again, and while it is on nobody learns what an undrafted step costs by now. Now and
then the switch therefore decides against what is known.
"""

from __future__ import annotations

from vllm_specplus.metrics import Counters

#: Speculation that is off comes back when it promises this much more goodput.
HYSTERESIS = 0.02
#: While off, one step in so many is speculated, to keep the step cost honest.
PROBE_INTERVALS = (16, 256)
#: While on, some steps are not speculated either, for the same reason: as many as cost
#: this share of the tokens, and at most one in EXPLORE_INTERVAL: where speculation barely
#: pays, undrafted steps cost nothing, but nor do they teach what drafts are worth.
EXPLORE_LOSS, EXPLORE_INTERVAL = 0.004, 4


class Switch:
    """Turns speculation off and on by what it promises."""

    def __init__(self, counters: Counters):
        self.counters = counters
        self.speculating = True
        self._idle_steps = 0  # since the last verified draft, while off
        self._interval = PROBE_INTERVALS[0]
        self._explore_credit = 0.0

    @property
    def probe_is_due(self) -> bool:
        return self._idle_steps >= self._interval

    def idle(self) -> None:
        """A step while off went by without drafts."""
        self._idle_steps += 1

    def probe_soon(self) -> None:
        """A probe has paid, which calls for the next."""
        if not self.speculating:
            self._interval = 1

    def decide(self, best: int, gain: float) -> int:
        """Returns how many nodes (or levels) to speculate on: ``best``, whose goodput is
        ``gain`` times that of none; 0 while speculation is off; or the contrary, to learn."""
        self.speculating = best > 0 and gain > (1.0 if self.speculating else 1.0 + HYSTERESIS)
        if self.speculating:
            self._idle_steps, self._interval = 0, PROBE_INTERVALS[0]
            return 0 if self._explores(gain) else best
        if self.probe_is_due:
            self.counters.add("probe_steps")
            self._idle_steps = 0
            self._interval = min(2 * self._interval, PROBE_INTERVALS[1])
            return max(best, 1)
        self._idle_steps += 1
        return 0

    def _explores(self, gain: float) -> bool:
        """Is this one of the steps that go undrafted although drafts pay?"""
        self._explore_credit += EXPLORE_LOSS
        if self._explore_credit < max(1.0 - 1.0 / gain, EXPLORE_INTERVAL * EXPLORE_LOSS):
            return False
        self._explore_credit = 0.0
        return True
