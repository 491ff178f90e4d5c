"""What a step is, computed from what the runner knows of its batch. NumPy only, no vLLM.

A :class:`BatchView` is what an adapter reads off vLLM's runner (``v1.py``); everything here is a
function of it, so that another runner needs another adapter and nothing else.

Letters: ``R`` requests, ``T`` token rows of the batch, ``L`` verified rows. A request's verified
rows are its last ones: the root, its newest token, and the drafted nodes below it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numba import njit

from vllm_specplus.control.cost import StepShape
from vllm_specplus.step import Acceptance, Rows
from vllm_specplus.tree import ancestor_mask, row_depths

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch before its forward pass. Host arrays, views of the runner's: good for this step."""

    request_ids: list[str]
    drafts: list[Sequence[int]]
    """[R] the drafted tokens of each request that are verified, ``tree.DraftTokens`` if they are
    a tree; empty where there are none."""
    num_scheduled: np.ndarray
    """int32 [R] token rows of each request."""
    num_computed: np.ndarray
    """int32 [R] tokens of each text whose keys and values were in the cache before."""
    token_ids: np.ndarray
    """int32 [R, max_model_len] the texts."""
    input_ids: np.ndarray
    """int32 [T] what the rows read; -1 where vLLM padded a draft."""


@dataclass(slots=True)
class Step:
    """One step between its hooks."""

    rows: Rows
    batch_rows: np.ndarray
    """int64 [L] index of each verified row among the batch's token rows."""
    tree_attention: np.ndarray
    """bool [R] requests that our attention serves, the others being the stock kernel's."""
    num_scheduled: np.ndarray
    """int32 [R] token rows of each request."""
    num_computed: np.ndarray
    """int32 [R] tokens of each text that were in the cache before."""
    previous: np.ndarray
    """int32 [L] the token before each row on its path; -1 at the start of a text."""
    shape: StepShape
    """What was in the step, for the cost model."""
    resumed: int
    """Trees that are verified as chains, because rows before their root are read again."""
    watched: bool = True
    """Are the proposer and the controller shown what comes of it?"""
    acceptance: Acceptance | None = None
    top_ids: np.ndarray | None = None
    """int32 [L, k] most probable next ids of each row, for the proposer."""
    target_probs: torch.Tensor | None = None
    """float32 [L, V] on the device: the target's distributions, for a proposer that asks."""
    broken: np.ndarray | None = None
    """bool [R] requests whose last output stands for none, see ``verify.Verdict``."""

    @property
    def drafted(self) -> bool:
        """Is some node verified?"""
        return self.shape.rows > self.shape.requests


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """The requests of a step that our attention serves; host arrays, shapes as those of
    ``attention.base.TreeAttentionMetadata``."""

    requests: np.ndarray
    """int64 [A] which they are."""
    rows: np.ndarray
    query_start_loc: np.ndarray
    context_lens: np.ndarray
    parents: np.ndarray
    depths: np.ndarray
    shifts: np.ndarray
    """int64 [T] what to add to the rows' sequential positions, so that the rotary phase follows
    depth."""
    max_rows: int

    def ancestors(self) -> np.ndarray:
        """bool [T, max_rows]: may a row see that row of its request?"""
        return ancestor_mask(self.parents, self.query_start_loc, self.max_rows)


def chain(count: int) -> np.ndarray:
    """int32 [count] parent rows of a chain: -1, 0, 1, ..."""
    return np.arange(-1, count - 1, dtype=np.int32)


def logits_rows(num_draft_tokens: np.ndarray, cu_num_scheduled: np.ndarray) -> np.ndarray:
    """int64 [L] the batch rows that need logits: the last ``num_draft_tokens`` int [R] plus one of
    each request, whose rows end at ``cu_num_scheduled`` int [R]."""
    counts = num_draft_tokens + 1
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(cu_num_scheduled - ends, counts)


# A signature makes numba compile at import, while the engine starts, not in its first step.
@njit("int32[::1](int32[::1], int32[::1], int32[::1], int32[::1])", cache=True)
def previous_tokens(tokens, parents, starts, before_root):
    """int32 [L] the token before each row on its path.

    ``tokens``, ``parents`` int32 [L], ``starts`` int32 [R + 1] as in ``Rows``; ``before_root``
    int32 [R] what precedes each root.
    """
    previous = np.empty_like(tokens)
    for r in range(starts.shape[0] - 1):
        previous[starts[r]] = before_root[r]
        for i in range(starts[r] + 1, starts[r + 1]):
            previous[i] = tokens[starts[r] + parents[i]]
    return previous


def read_trees(view: BatchView) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The trees that the drafts are: (``parents`` int32 [L] by row, ``counts`` int32 [R] verified
    rows, bool [R] which are trees and not chains, how many trees had to become chains)."""
    counts = np.ones(len(view.request_ids), np.int32)
    has_tree = np.zeros(len(counts), bool)
    parents, resumed = [], 0
    for i, drafts in enumerate(view.drafts):
        counts[i] += len(drafts)
        tree = getattr(drafts, "parents", None)
        if tree is not None and view.num_scheduled[i] != counts[i]:
            # Rows before the root (rescheduled context) are causal: verify all as a chain.
            tree, resumed = None, resumed + 1
        has_tree[i] = tree is not None
        own = chain(int(counts[i])) if tree is None else np.concatenate((chain(1), tree + 1))
        parents.append(own)
    return np.concatenate(parents), counts, has_tree, resumed


def describe(view: BatchView, batch_rows: np.ndarray, serves_chains: bool) -> Step:
    """The step of a batch; ``batch_rows`` int64 [L] are the rows that get logits.

    ``serves_chains``: in steps with drafts our attention also takes chains and single rows (of
    requests that read no prompt), being faster for them than the stock kernel.
    """
    if not any(view.drafts):
        return _undrafted(view, batch_rows)
    parents, counts, has_tree, resumed = read_trees(view)
    starts = offsets(counts)
    tokens = view.input_ids[batch_rows]
    rows = Rows(tokens, parents, starts, row_depths(parents, starts))
    tree_attention = has_tree
    if serves_chains and counts.max() > 1:
        tree_attention = view.num_scheduled == counts
    return Step(
        rows=rows,
        batch_rows=batch_rows,
        tree_attention=tree_attention,
        num_scheduled=view.num_scheduled,
        num_computed=view.num_computed,
        previous=previous_tokens(tokens, parents, starts, _before_root(view, counts)),
        shape=StepShape(
            requests=len(counts),
            rows=len(parents),
            context=int((view.num_computed + view.num_scheduled).sum()),
            prompt_rows=int(view.num_scheduled.sum()) - len(parents),
            tree=bool(has_tree.any()),
        ),
        resumed=resumed,
    )


def _undrafted(view: BatchView, batch_rows: np.ndarray) -> Step:
    """A step without drafts: most steps at high load, which the above would delay."""
    requests = len(view.request_ids)
    tokens = view.input_ids[batch_rows]
    scheduled = int(view.num_scheduled.sum())
    return Step(
        rows=Rows(
            tokens,
            np.full(requests, -1, np.int32),
            np.arange(requests + 1, dtype=np.int32),
            np.zeros(requests, np.int32),
        ),
        batch_rows=batch_rows,
        tree_attention=np.zeros(requests, bool),
        num_scheduled=view.num_scheduled,
        num_computed=view.num_computed,
        previous=_before_root(view, 1),
        shape=StepShape(
            requests=requests,
            rows=requests,
            context=int(view.num_computed.sum()) + scheduled,
            prompt_rows=scheduled - requests,
        ),
        resumed=0,
    )


def _before_root(view: BatchView, counts: np.ndarray | int) -> np.ndarray:
    """int32 [R] the token before each request's first verified row, of which it has ``counts`` int
    [R]; -1 at the start of a text."""
    before = view.num_computed + view.num_scheduled - counts - 1
    tokens = view.token_ids[np.arange(len(before)), np.maximum(before, 0)]
    return np.where(before >= 0, tokens, -1).astype(np.int32)


def offsets(counts: np.ndarray) -> np.ndarray:
    """int32 [R + 1] where the entries of each request begin."""
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def position_shifts(rows: Rows) -> np.ndarray:
    """int64 [L] the depth of each row less its place in the request."""
    in_request = np.arange(len(rows.parents)) - np.repeat(rows.starts[:-1], np.diff(rows.starts))
    return rows.depths.astype(np.int64) - in_request


def tree_batch(step: Step) -> TreeBatch:
    """The requests that our attention serves, without the others."""
    counts = np.diff(step.rows.starts)
    requests = np.flatnonzero(step.tree_attention)
    of_tree = np.repeat(step.tree_attention, counts)
    return TreeBatch(
        requests=requests,
        rows=step.batch_rows[of_tree],
        query_start_loc=offsets(counts[requests]),
        context_lens=step.num_computed[requests].astype(np.int32),
        parents=step.rows.parents[of_tree],
        depths=step.rows.depths[of_tree],
        shifts=position_shifts(step.rows)[of_tree],
        max_rows=int(counts[requests].max()),
    )


def accepted_rows(step: Step) -> np.ndarray:
    """bool [L]: is the row on the text that was kept?"""
    accepted = np.zeros(len(step.rows.tokens), bool)
    path = step.acceptance.path
    request, column = np.nonzero(path >= 0)
    accepted[step.rows.starts[request] + path[request, column]] = True
    return accepted


def kept_rows(step: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batch rows on the kept texts, of a prompt all, of a tree the accepted path: (``rows`` int64
    [K], their ``positions`` int64 [K] in the texts, ``starts`` int64 [R + 1])."""
    path = step.acceptance.path
    before = step.num_scheduled - np.diff(step.rows.starts)  # of a prompt, not verified
    kept = before + step.acceptance.lengths
    starts = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(kept, out=starts[1:])
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], kept)
    rows = np.repeat(np.cumsum(step.num_scheduled) - step.num_scheduled, kept) + within
    request, column = np.nonzero(path >= 0)
    at = starts[request] + before[request] + column
    rows[at] = step.batch_rows[step.rows.starts[request] + path[request, column]]
    positions = within + np.repeat(step.num_computed, kept)
    return rows, positions.astype(np.int64), starts


def cache_slots(
    pages: np.ndarray, page_size: int, request: np.ndarray, position: np.ndarray
) -> np.ndarray:
    """Cache slot int64 [n] of each (``request``, ``position`` in its text) int64 [n]; ``pages``
    int32 [R, P] are the requests' pages of ``page_size`` slots."""
    page = pages[request, position // page_size].astype(np.int64)
    return page * page_size + position % page_size


def prompt_chunks(step: Step, size: int) -> Iterator[tuple[int, int, int, int]]:
    """The rows of prompts that are read and not verified, in chunks of at most ``size``:
    (request, first position in its text, number of rows, first batch row)."""
    unverified = step.num_scheduled - np.diff(step.rows.starts)
    first_rows = np.cumsum(step.num_scheduled) - step.num_scheduled
    for request in np.flatnonzero(unverified).tolist():
        for done in range(0, int(unverified[request]), size):
            count = min(size, int(unverified[request]) - done)
            begin = int(step.num_computed[request]) + done
            yield request, begin, count, int(first_rows[request]) + done


def text_before(text: np.ndarray, begin: int, count: int) -> np.ndarray:
    """int32 [count] the token before each of ``text[begin : begin + count]``; -1 before the
    first of all."""
    previous = np.full(count, -1, np.int32)
    head = min(begin, 1)
    previous[1 - head :] = text[begin - head : begin + count - 1]
    return previous


def draft_room(
    num_tokens: np.ndarray, limits: np.ndarray, decoding: np.ndarray, max_model_len: int
) -> np.ndarray:
    """int32 [R] nodes each request may draft: its own ``limits`` int [R], what the context window
    leaves behind ``num_tokens`` int32 [R], and none unless it is ``decoding`` bool [R]."""
    room = np.minimum(limits, max_model_len - 1 - num_tokens)
    return np.where(decoding, np.maximum(room, 0), 0).astype(np.int32)
