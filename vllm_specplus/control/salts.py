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


class SaltTables:
    """Arrays with a row per salt, which begin as they are given; see :class:`SaltRows`."""

    def __init__(self, *initial: np.ndarray):
        """``initial``: what a new salt's row of each array is."""
        self._initial = initial
        self._rows = SaltRows()
        self.arrays = [value[None].copy() for value in initial]
        """[salts, ...] each; the first row is that of requests without a salt."""

    def rows_of(self, cache_salts: Sequence[str] | None, requests: int) -> np.ndarray:
        """Which rows are those of the requests of ``cache_salts`` [R], int32 [R]. Makes room for
        new ones, so ``arrays`` are others afterwards."""
        rows, fresh = self._rows.of(cache_salts, requests)
        if not rows.any():
            return rows
        for i, (array, value) in enumerate(zip(self.arrays, self._initial, strict=True)):
            missing = int(rows.max(initial=0)) + 1 - len(array)
            if missing > 0:
                more = np.zeros((max(missing, len(array)), *value.shape))
                array = self.arrays[i] = np.concatenate((array, more))
            array[fresh] = value
        return rows
