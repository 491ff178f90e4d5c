"""Which drafted nodes can become text at all.

The one place that every method's drafts pass: ids outside the vocabulary (a prompt's placeholders
for pictures, copied by a method that looks texts up) are no tokens, and behind a token that ends
its request there is no text.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from vllm_specplus.control.budget import keep_nodes
from vllm_specplus.tree import DraftBatch

_NO_ENDS = np.empty(0, np.int32)


# A signature makes numba compile at import, while the engine starts, not in its first step.
@njit("bool_[::1](int32[::1], int32[::1], int32[::1], int64, int32[::1], int64[::1])", cache=True)
def _can_be_text(tokens, parents, counts, vocab, ends, end_starts):
    """Bool [N]: is the node, with all above it, in the vocabulary and behind no end?

    ``tokens``, ``parents`` int32 [N], ``counts`` int32 [R] as in ``DraftBatch``; request r ends
    with ``ends[end_starts[r] : end_starts[r + 1]]``.
    """
    kept = np.zeros(tokens.shape[0], np.bool_)
    ended = np.zeros(tokens.shape[0], np.bool_)
    first = 0
    for r in range(counts.shape[0]):
        for i in range(first, first + counts[r]):
            parent = first + parents[i]
            if parents[i] >= 0 and (ended[parent] or not kept[parent]):
                continue
            kept[i] = 0 <= tokens[i] < vocab
            for j in range(end_starts[r], end_starts[r + 1]):
                if tokens[i] == ends[j]:
                    ended[i] = True
        first += counts[r]
    return kept


def can_be_text(
    drafts: DraftBatch, vocab_size: int, ends: list[np.ndarray] | None = None
) -> DraftBatch:
    """``drafts`` without nodes that cannot become text, nor what hangs below them.

    ``ends`` [R] of int32 [K]: the ids with which each request ends; None: nothing ends them.
    """
    if not len(drafts.tokens):
        return drafts
    starts = np.zeros(len(drafts.counts) + 1, np.int64)
    flat = _NO_ENDS
    if ends is not None:
        np.cumsum([len(each) for each in ends], out=starts[1:])
        flat = np.concatenate(ends)
    kept = _can_be_text(
        np.ascontiguousarray(drafts.tokens, np.int32),
        np.ascontiguousarray(drafts.parents, np.int32),
        np.ascontiguousarray(drafts.counts, np.int32),
        vocab_size, flat, starts,
    )  # fmt: skip
    if kept.all():
        return drafts
    tokens, parents, counts = keep_nodes(drafts.tokens, drafts.parents, drafts.counts, kept)
    return DraftBatch(
        tokens, parents, counts,
        None if drafts.sources is None else drafts.sources[kept],
        drafts.draft_probs,
        None if drafts.drawn_from is None else drafts.drawn_from[kept],
    )  # fmt: skip
