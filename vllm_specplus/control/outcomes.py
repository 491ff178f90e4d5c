"""What was drafted, and how it compares with what became text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplus.control.salts import SaltTables


@dataclass(slots=True)
class DraftedTrees:
    """The trees of one step as they were grown, until the text tells which nodes were right."""

    request_ids: list[str | None]
    """[R]; None: forgotten."""
    drafted_at: np.ndarray
    """int32 [R] tokens of each text that were known when the trees were drafted."""
    tokens: np.ndarray
    """int32 [N]."""
    parents: np.ndarray
    """int32 [N] parent within the request's nodes, -1 = root."""
    sources: np.ndarray
    """int32 [N]."""
    starts: np.ndarray
    """int32 [R + 1] first node of each request."""
    expected: np.ndarray
    """float64 [R] tokens each request was expected to gain by its verified nodes, before
    calibration."""

    def rows_in(self, request_ids: Sequence[str]) -> np.ndarray:
        """Where each request stands among ``request_ids`` now, int32 [R]; -1: it is gone."""
        row_of: dict[str | None, int] = {name: i for i, name in enumerate(request_ids)}
        return np.array([row_of.get(name, -1) for name in self.request_ids], np.int32)

    def forget(self, request_id: str) -> None:
        """Its tree is no guess about what comes under that id from now on."""
        if request_id in self.request_ids:
            self.request_ids[self.request_ids.index(request_id)] = None


class Calibration:
    """Scales expected tokens by how earlier expectations came true, for each cache salt.

    The nodes with the highest estimates are those that were overestimated most, so a choice by
    estimates expects too much.
    """

    MEMORY = 0.9
    """What a step's figures still count one step later."""
    PRIOR = 3.0
    """Tokens that the prior "exactly as expected" counts for."""

    def __init__(self) -> None:
        # Expected and gained tokens float64 [salts, 2].
        self._sums = SaltTables(np.zeros(2))

    def observe(
        self, expected: np.ndarray, gained: np.ndarray, cache_salts: Sequence[str] | None = None
    ) -> None:
        """Requests of ``cache_salts`` [R] that expected ``expected`` float64 [R] tokens gained
        ``gained`` int [R]."""
        rows = self._sums.rows_of(cache_salts, len(expected))
        (sums,) = self._sums.arrays
        sums[np.unique(rows)] *= self.MEMORY
        np.add.at(sums, rows, np.stack((expected, gained * (expected > 0)), axis=1))

    def factors(self, requests: int, cache_salts: Sequence[str] | None = None) -> np.ndarray:
        """Accepted over expected tokens, at most 1, for requests of ``cache_salts`` [R]: float64
        [R]."""
        rows = self._sums.rows_of(cache_salts, requests)
        expected, gained = (self._sums.arrays[0][rows] + self.PRIOR).T
        return np.minimum(gained / expected, 1.0)
