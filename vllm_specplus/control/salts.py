"""Rows of tables that are learnt per cache salt, so that no tenant's drafts tell of another's."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

#: Salts that are remembered at least; a step of more remembers all of its own.
MOST_SALTS = 1024


class SaltRows:
    """Gives every salt a row; 0 is that of requests without one, for good.

    The least recently used salt loses its row to a new one once there are ``MOST_SALTS``.
    """

    def __init__(self) -> None:
        self._rows: OrderedDict[str, int] = OrderedDict()

    def of(self, salts: Sequence[str] | None, requests: int) -> tuple[np.ndarray, list[int]]:
        """The row of each request, int32 [R], and those rows that begin anew; None: no salts."""
        rows = np.zeros(requests, np.int32)
        fresh: list[int] = []
        if salts is None or not any(salts):
            return rows, fresh
        names = [name for name in dict.fromkeys(salts) if name]
        for name in names:
            if name in self._rows:
                self._rows.move_to_end(name)
        for name in names:
            if name in self._rows:
                continue
            row = len(self._rows) + 1
            if len(self._rows) >= max(MOST_SALTS, len(names)):
                _, row = self._rows.popitem(last=False)
            self._rows[name] = row
            fresh.append(row)
        rows[:] = [self._rows.get(name, 0) for name in salts]
        return rows, fresh
