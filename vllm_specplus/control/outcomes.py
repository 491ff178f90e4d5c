"""What was drafted, and how it compares with what became text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from vllm_specplus.control.acceptance import label_nodes
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
    shadow: np.ndarray | None = None
    """bool [N] nodes that would have been verified; None: they were."""

    def gained(self, rows: np.ndarray, token_ids: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """Drafted tokens that each request gained, or would have gained, int32 [R].

        The texts by now: ``token_ids`` int32 [B, max_len], ``num_tokens`` int32 [B]; ``rows`` int32
        [R] finds a request there; -1: it is gone, and 0 is returned of it.
        """
        if self.shadow is not None:
            return _followed(
                self.tokens, self.parents, self.starts, self.shadow, self.drafted_at, rows,
                token_ids, num_tokens,
            )  # fmt: skip
        return np.where(rows < 0, 0, num_tokens[rows] - self.drafted_at - 1).astype(np.int32)

    def rows_in(self, request_ids: Sequence[str]) -> np.ndarray:
        """Where each request stands among ``request_ids`` now, int32 [R]; -1: it is gone."""
        row_of: dict[str | None, int] = {name: i for i, name in enumerate(request_ids)}
        return np.array([row_of.get(name, -1) for name in self.request_ids], np.int32)

    def forget(self, request_id: str) -> None:
        """Its tree is no guess about what comes under that id from now on."""
        if request_id in self.request_ids:
            self.request_ids[self.request_ids.index(request_id)] = None


@njit(cache=True)
def _followed(tokens, parents, starts, kept, drafted_at, rows, token_ids, num_tokens):
    """How many levels the text follows each request's ``kept`` nodes, int32 [R]."""
    out = np.zeros(rows.shape[0], np.int32)
    for r in range(rows.shape[0]):
        first, end = starts[r], starts[r + 1]
        if rows[r] < 0 or first == end:
            continue
        labels, depths = label_nodes(
            tokens[first:end], parents[first:end], token_ids[rows[r]], drafted_at[r],
            num_tokens[rows[r]],
        )  # fmt: skip
        for i in range(end - first):
            if kept[first + i] and labels[i] == 1:
                out[r] = max(out[r], depths[i])
    return out


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
        gained = gained * (expected > 0)
        if not rows.any():  # without salts: one row for all
            sums[0] = self.MEMORY * sums[0] + (expected.sum(), gained.sum())
            return
        sums[np.unique(rows)] *= self.MEMORY
        np.add.at(sums, rows, np.stack((expected, gained), axis=1))

    def factors(self, requests: int, cache_salts: Sequence[str] | None = None) -> np.ndarray:
        """Accepted over expected tokens, at most 1, for requests of ``cache_salts`` [R]: float64
        [R]."""
        rows = self._sums.rows_of(cache_salts, requests)
        expected, gained = (self._sums.arrays[0][rows] + self.PRIOR).T
        return np.minimum(gained / expected, 1.0)
