"""Runs a P-EAGLE head over the batch: rows of text and masks in one pass.

Text is followed as that of EAGLE heads is (``head_executor.py``), with its keys and values in pages
numbered like the target's. A draft is one pass over the rows that wait, of which there are few, and
the masks behind them. All of these lie in pages of the draft, where they see each other; of the
rows of text the keys and values are kept in the text's pages as well.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplus.drafting.block_executor import laws_of
from vllm_specplus.drafting.block_trees import Laws
from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.drafting.head_executor import MOST_WAITING, HeadExecutor
from vllm_specplus.drafting.passes import Attend, PagedAttention, Rows
from vllm_specplus.drafting.peagle import ParallelHead
from vllm_specplus.step import TargetRows


class ParallelExecutor(HeadExecutor):
    """Runs ``head`` for all requests of a step."""

    model: ParallelHead

    def __init__(self, head: ParallelHead, pages: int, page: int, max_requests: int):
        """``pages``, ``page``: how many the target has, and slots per page."""
        self._masks = head.config.depth - 1
        super().__init__(head, MOST_WAITING + self._masks, max_requests, pages, page)

    def follow(self, requests: list[str], tokens: np.ndarray, rows: TargetRows) -> None:
        """As :meth:`HeadExecutor.follow`."""
        self._names = requests
        super().follow(requests, tokens, rows)

    @torch.inference_mode()
    def draft(
        self, rows: TargetRows, requests: np.ndarray, tokens: np.ndarray, lengths: np.ndarray,
        width: int,
    ) -> Laws:  # fmt: skip
        """As :meth:`~vllm_specplus.drafting.block_executor.BlockExecutor.draft`."""
        news = self.take([self._names[r] for r in requests], lengths)
        head, counts = self.model, np.array([len(states) for _, states in news])
        totals = counts + self._masks
        starts = np.concatenate(([0], np.cumsum(totals)))
        of = np.repeat(np.arange(len(news)), totals)
        depths = np.arange(starts[-1]) - starts[of]
        text = np.flatnonzero(depths < counts[of])
        firsts = np.array([first for first, _ in news])
        positions = firsts[of] + depths
        inputs = np.full(len(of), head.body.mask_token, np.int64)
        inputs[text] = self._tokens[requests[of[text]], positions[text] + 1]
        features = head.masked.expand(len(of), -1).clone()
        features[self._to_device(text)] = head.fuse(torch.cat([states for _, states in news]))

        slots = self._to_device(self._slots(requests[of[text]], positions[text]))
        self._read.view(-1)[slots] = True
        given = self._rows(requests, firsts, starts, depths, int(lengths.max()))
        attend = _KeepingText(
            PagedAttention(self.cache, given, self._read), self.cache, self._to_device(text), slots
        )
        rotary = head.rotary(given.positions)
        hidden = head(self._to_device(inputs), features, rotary, attend)
        # The newest token's row, and the masks.
        own = starts[1:, None] - 1 - np.arange(self._masks, -1, -1)
        newest = self._to_device(tokens.astype(np.int64))
        return laws_of(head, hidden[self._to_device(own)], newest, width)

    def _rows(
        self, requests: np.ndarray, firsts: np.ndarray, starts: np.ndarray, depths: np.ndarray,
        longest: int,
    ) -> Rows:  # fmt: skip
        """Chains in the draft's own pages, that of a request from position ``firsts`` int64 [A] on;
        ``starts`` int64 [A + 1] of their rows, ``depths`` int64 [T] of each row; ``longest``: most
        tokens of a text."""
        page, totals = self._page, np.diff(starts)
        width = -(-longest // page)
        own = self._first_tree_page + np.arange(len(requests) * self._pages_per_tree)
        table = np.concatenate(
            (self._pages[requests, :width], own.reshape(len(requests), -1)), 1, dtype=np.int32
        )
        of = np.repeat(np.arange(len(requests)), totals)
        slots = table[of, width + depths // page].astype(np.int64) * page + depths % page
        related = (
            depths.astype(np.int32) - 1
            if self.cache.packed
            else depths[:, None] >= np.arange(totals.max())
        )
        contexts = np.full(len(requests), width * page)
        ints = [each.astype(np.int32) for each in (starts, contexts, firsts, table, starts, depths)]
        arrays = (firsts[of] + depths, slots, *ints, related)
        return Rows(*map(self._to_device, arrays), int(totals.max()), width * page)


class _KeepingText:
    """An attention that also writes the keys and values of some rows where their text has them."""

    def __init__(self, attend: Attend, store: PageStore, rows: torch.Tensor, slots: torch.Tensor):
        """``rows`` int64 [n] of the pass; ``slots`` int64 [n] of the ``store``."""
        self._attend, self._store, self._rows, self._slots = attend, store, rows, slots

    def __call__(self, layer, query, keys, values, scale, window=0, soft_cap=0.0):
        self._store.write(layer, self._slots, keys[self._rows], values[self._rows])
        return self._attend(layer, query, keys, values, scale, window, soft_cap)
