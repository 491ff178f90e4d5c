"""A bound on how long a device waits for another.

Where messages are ordered by streams, no call waits for them: a lost peer shows in the next call
that needs a result, which then does not return. A thread looks at the last pass when its time is
over, and ends what it waits for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class LostPeer(RuntimeError):
    """A shard of the draft did not do its part in time."""


class Watchdog:
    """Ends, once, what is not over in time. Nothing is looked at before that."""

    def __init__(self, end: Callable[[], None], seconds: float):
        """``end`` makes whoever waits go on; it is called in another thread."""
        self._end, self.seconds = end, seconds
        self._changed = threading.Condition()
        self._watched: tuple[float, Callable[[], bool]] | None = None
        self._closed = self._lost = False
        self._thread = threading.Thread(target=self._run, name="specplus-watchdog", daemon=True)
        self._thread.start()

    def watch(self, is_over: Callable[[], bool]) -> None:
        """From now on, ``is_over`` has to be true in time; it stands for all that was watched
        before, since a stream runs in order."""
        with self._changed:
            # The thread sleeps until the time of what was watched first, and looks then.
            idle = self._watched is None
            self._watched = (time.monotonic() + self.seconds, is_over)
            if idle:
                self._changed.notify()

    def check(self) -> None:
        """Raise LostPeer if something had to be ended."""
        if self._lost:
            raise LostPeer(f"a shard of the draft did not answer within {self.seconds:.0f} s")

    def close(self) -> None:
        """Watch nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._watched is None and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                deadline, is_over = self._watched
                left = deadline - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                over, self._watched = is_over(), None
                if over:
                    continue
                self._lost = True
            self._end()
            return
