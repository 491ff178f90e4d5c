"""Rows of arrays that belong to requests for as long as these live."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class RequestSlots:
    """Arrays with a row per request: zeros until something is written there, and again once the
    request is forgotten."""

    def __init__(self, *shapes: tuple[int, ...]):
        """``shapes``: of a row of each array."""
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self.arrays = [np.zeros((0, *shape)) for shape in shapes]
        """Float64 [slots, ...] each."""
        self._grow()

    def find(self, request_ids: Sequence[str]) -> np.ndarray:
        """Where each request's rows are, int32 [R]; -1: it has none."""
        return np.array([self._slots.get(name, -1) for name in request_ids], np.int32)

    def take(self, request_id: str) -> int:
        """Where the request's row is from now on. ``arrays`` may be others afterwards."""
        slot = self._slots.get(request_id)
        if slot is None:
            if not self._free:
                self._grow()
            slot = self._slots[request_id] = self._free.pop()
        return slot

    def forget(self, request_id: str) -> None:
        """The request is gone; its row may serve another one."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            for array in self.arrays:
                array[slot] = 0.0
            self._free.append(slot)

    def _grow(self) -> None:
        size = len(self.arrays[0])
        more = max(size, 16)
        self.arrays = [
            np.concatenate((array, np.zeros((more, *array.shape[1:])))) for array in self.arrays
        ]
        self._free.extend(range(size, size + more))
