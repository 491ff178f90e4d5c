"""Runs a block head over the batch: what the target computed becomes context, a pass is a block.

The head's keys and values lie in pages numbered like the target's: what the target's scheduler
decides about a text, prefix caching and preemption, then holds for the head as well. A row of
context needs its own hidden states only, so it is written in the step that computes it, for every
text, and is right for all texts that share its page. Rejected rows are not among those, and a
block's own keys and values lie apart and are overwritten by the next one's.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplus.drafting.block_heads import BlockHead, MedusaHead
from vllm_specplus.drafting.block_trees import Laws
from vllm_specplus.drafting.gathered import GatheredPages
from vllm_specplus.drafting.peagle import ParallelHead
from vllm_specplus.step import TargetRows

#: Logits, float32, that are made at once.
MOST_LOGITS = 1 << 26


class BlockExecutor:
    """Runs a head that reads the text through keys and values of its own."""

    def __init__(self, head: BlockHead, pages: int, page: int, max_requests: int):
        """``pages``, ``page``: how many the target has, and slots per page."""
        self.head, self._page = head, page
        # Behind the target's pages those of the blocks, by index in the batch.
        self._pages_per_block = -(-head.body.queries // page)
        self._first_block_page = pages
        self._cache = GatheredPages(
            head.attention_layers, head.kv_heads, head.head_dim,
            pages + max_requests * self._pages_per_block, page, head.dtype, head.device,
        )  # fmt: skip

    @torch.inference_mode()
    def follow(self, requests: list[str], tokens: np.ndarray, rows: TargetRows) -> None:
        """Take what the target has just computed. A row of context is made of its own states, so
        that ``requests`` and ``tokens``, see ``HeadExecutor.follow``, do not matter."""
        if not len(rows.positions):
            return
        of = np.repeat(np.arange(len(rows.starts) - 1), np.diff(rows.starts))
        pages = rows.pages[of, rows.positions // self._page].astype(np.int64)
        slots = self._to_device(pages * self._page + rows.positions % self._page)
        positions = self._to_device(rows.positions)
        self._cache.store(slots, self.head.context(rows.states, positions))

    def forget(self, request: str) -> None:
        """Nothing is kept by request."""

    @torch.inference_mode()
    def draft(
        self, rows: TargetRows, requests: np.ndarray, tokens: np.ndarray, lengths: np.ndarray,
        width: int,
    ) -> Laws:  # fmt: skip
        """The laws, of ``width`` candidates, of the blocks behind some texts.

        ``requests`` int64 [A] of those of ``rows``; ``tokens``, ``lengths`` int64 [A] the newest
        token of each, and how many tokens it has.
        """
        head, page = self.head, self._page
        reach = -(-int(lengths.max()) // page)
        text = self._to_device(rows.pages[requests, :reach].astype(np.int64))
        blocks = torch.arange(len(requests) * self._pages_per_block, device=head.device)
        blocks = self._first_block_page + blocks.view(len(requests), -1)
        anchors = self._to_device(lengths - 1)
        own = torch.arange(blocks.shape[1] * page, device=head.device)
        in_block = own < head.body.queries
        queries = anchors[:, None] + own[in_block]
        places = torch.cat(
            (
                torch.arange(reach * page, device=head.device).expand(len(requests), -1),
                torch.where(in_block, anchors[:, None] + own, -1),
            ),
            1,
        )
        of_block = torch.arange(places.shape[1], device=head.device) >= reach * page
        masks = head.masks(places, anchors, of_block.expand_as(places))
        slots = (blocks[:, :1] * page + own)[:, in_block]
        self._cache.begin_pass(slots, torch.cat((text, blocks), 1))
        newest = self._to_device(tokens.astype(np.int64))
        hidden = head(newest, head.rotary(queries), masks, self._cache)
        return laws_of(head, hidden, newest, width)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.head.device)


class MedusaExecutor:
    """Runs heads that read the last row of the text only."""

    def __init__(self, head: MedusaHead):
        self.head = head

    def follow(self, requests: list[str], tokens: np.ndarray, rows: TargetRows) -> None:
        """Nothing is kept."""

    def forget(self, request: str) -> None:
        """As well."""

    @torch.inference_mode()
    def draft(
        self, rows: TargetRows, requests: np.ndarray, tokens: np.ndarray, lengths: np.ndarray,
        width: int,
    ) -> Laws:  # fmt: skip
        """As :meth:`BlockExecutor.draft`."""
        last = torch.from_numpy(rows.starts[1:][requests] - 1).to(self.head.device)
        newest = torch.from_numpy(tokens.astype(np.int64)).to(self.head.device)
        hidden = self.head(rows.states[last].to(self.head.dtype))
        return laws_of(self.head, hidden, newest, width)


def laws_of(
    head: BlockHead | MedusaHead | ParallelHead,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    width: int,
) -> Laws:
    """``head.laws``, so many blocks at a time that their logits fit into :data:`MOST_LOGITS`."""
    most = max(MOST_LOGITS // (hidden.shape[1] * head.predicts), 1)
    groups = zip(hidden.split(most), tokens.split(most), strict=True)
    return Laws.joined([head.laws(*group, width) for group in groups])
