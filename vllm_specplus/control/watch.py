"""Which steps are looked at while nothing is verified.

Looking at a step (showing it to the proposer, growing trees, weighing them) is how drafts are seen
to pay again, and costs time in which no token is made. While drafts are verified every step is
looked at; once none has been for some steps, so few that looking takes a small share of the time.
"""

from __future__ import annotations

#: Share of the time that looking may take.
SHARE = 0.01
#: Steps that are looked at and verify nothing, before some are passed over; and how many are, at
#: most, between two that are looked at.
AFTER, MOST = 8, 15
#: Share of the newest time in the averages.
NEWEST = 0.1


class Watch:
    """Decides for every step, before it is verified."""

    def __init__(self) -> None:
        self._look = self._step = 0.0  # seconds, moving averages
        self._undrafted = 0  # steps looked at since drafts were chosen
        self._rest = 0  # steps to pass over

    def due(self) -> bool:
        """Is this step, which verifies nothing, to be looked at?"""
        if self._rest <= 0:
            return True
        self._rest -= 1
        return False

    def looked(self, seconds: float, nodes: int) -> None:
        """Looking took ``seconds``, and chose so many nodes for the next step."""
        self._look += NEWEST * (seconds - self._look) if self._look else seconds
        self._undrafted = 0 if nodes else self._undrafted + 1
        self._rest = 0
        if self._undrafted >= AFTER and self._step:
            self._rest = min(int(self._look / (SHARE * self._step)), MOST)

    def step_took(self, seconds: float) -> None:
        """The last step took so long, looking included."""
        self._step += NEWEST * (seconds - self._step) if self._step else seconds
