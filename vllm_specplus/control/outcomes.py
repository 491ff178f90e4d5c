"""What was drafted, and how it compares with what became text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(slots=True)
class DraftedTrees:
    """The trees of one step as they were grown, until the text tells which nodes were right."""

    request_ids: list[str]
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
        row_of = {name: i for i, name in enumerate(request_ids)}
        return np.array([row_of.get(name, -1) for name in self.request_ids], np.int32)


class Calibration:
    """Scales expected tokens by how earlier expectations came true.

    The nodes with the highest estimates are those that were overestimated most, so a choice by
    estimates expects too much.
    """

    MEMORY = 0.9
    """What a step's figures still count one step later."""
    PRIOR = 3.0
    """Tokens that the prior "exactly as expected" counts for."""

    def __init__(self) -> None:
        self._expected = self._gained = 0.0

    def observe(self, expected: np.ndarray, gained: np.ndarray) -> None:
        """Requests that expected ``expected`` float64 [R] tokens gained ``gained`` int [R]."""
        self._expected = self.MEMORY * self._expected + expected.sum()
        self._gained = self.MEMORY * self._gained + gained[expected > 0].sum()

    @property
    def factor(self) -> float:
        """Accepted over expected tokens, at most 1."""
        return min(float((self._gained + self.PRIOR) / (self._expected + self.PRIOR)), 1.0)
