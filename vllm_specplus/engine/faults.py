"""Faults of drafting in the log: each kind now and then, not only the first of all."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

#: Seconds in which a kind of fault is logged once.
INTERVAL_S = 60.0
#: Kinds that are told apart; beyond it the oldest is logged anew when it comes again.
MOST_KINDS = 64


class FaultLog:
    """Logs faults that cost drafts and nothing else.

    A fault's kind is the type of the exception and the line that raised it. Of each kind one
    warning is logged per :data:`INTERVAL_S`, with its traceback and the number of those since the
    last one: a harmless fault at start does not hide a lost device an hour later.
    """

    def __init__(
        self, logger: logging.Logger, method: str, clock: Callable[[], float] = time.monotonic
    ):
        """``method`` is named in the warnings; ``clock`` returns seconds."""
        self._logger, self._method, self._clock = logger, method, clock
        # Kind -> (when it was logged, how many were not since).
        self._kinds: dict[tuple, tuple[float, int]] = {}

    def __call__(self, error: Exception) -> None:
        kind, now = _kind(error), self._clock()
        logged_at, silent = self._kinds.pop(kind, (None, 0))
        if logged_at is not None and now - logged_at < INTERVAL_S:
            self._kinds[kind] = logged_at, silent + 1
            return
        if len(self._kinds) == MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]
        self._kinds[kind] = now, 0
        self._logger.warning(
            "drafting with %s failed, decoding goes on without drafts%s: %s",
            self._method,
            f" ({silent} more since the last warning of this kind)" if silent else "",
            error,
            exc_info=error,
        )


def _kind(error: Exception) -> tuple:
    """The type of an exception, and the file and line that raised it."""
    trace = error.__traceback__
    if trace is None:
        return (type(error),)
    while trace.tb_next is not None:
        trace = trace.tb_next
    return type(error), trace.tb_frame.f_code.co_filename, trace.tb_lineno
